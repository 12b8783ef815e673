"""How much each attention value matters for the loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError


def influence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    *,
    scale: float | None = None,
    causal: bool = True,
    eps: float | None = None,
) -> Tensor:
    """First-order change of the loss when one attention value is removed and its row renormalised.

        E_ij = -A_ij (G_ij - Σ_n G_in A_in) / (1 - A_ij + eps),   G = grad vᵀ

    Where a query sees one key only, as the first one of a causal matrix does, nothing is left to
    renormalise and E = -G A.

    Args:
        q: (..., N, d).
        k, v: (..., M, d).
        grad: (..., N, d), gradient of the loss with respect to the output of the attention.
        scale: of the logits; 1/sqrt(d) when None.
        causal: whether query i sees keys up to i only.
        eps: keeps the quotient finite; the machine epsilon of the dtype when None.

    Returns:
        (..., N, M); 0 where nothing is seen.
    """
    eps = torch.finfo(q.dtype).eps if eps is None else eps
    logits = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
        logits = logits.masked_fill(hidden, -torch.inf)
    a = logits.softmax(-1)
    g = grad @ v.mT
    effect = -a * (g - (g * a).sum(-1, keepdim=True)) / (eps + 1 - a)
    if causal:
        effect[..., 0, :] = -(g * a)[..., 0, :]
    return effect


def block_sums(effect: Tensor, block: int) -> Tensor:
    """Sum of |effect| in each block of block x block values; a last, partial block counts as one.

    Args:
        effect: (..., N, M), 0 where nothing is seen.
        block: side of a block, in tokens.

    Returns:
        (..., ceil(N / block), ceil(M / block)).
    """
    rows, columns = (-n % block for n in effect.shape[-2:])
    x = F.pad(effect.abs(), (0, columns, 0, rows))
    x = x.unflatten(-2, (-1, block)).unflatten(-1, (-1, block))
    return x.sum((-1, -3))


def profile(
    model: nn.Module, batches: Iterable[Mapping[str, Tensor]], *, block: int = 64
) -> Tensor:
    """Influence of every attention value of a decoder, over texts of one length.

    The gradient of the mean cross-entropy of the labels is taken with respect to the output of
    each attention; the matrices are then made head by head, so that only one is there at a time.

    Args:
        model: a causal language model of transformers, or one that sees.
        batches: arguments of the model, with `input_ids` and `labels` (B, N), -100 where a token
            does not count. Labels written by the model itself tell most, see the paper.
        block: side of a block in tokens.

    Returns:
        (layers, heads, n, n) float32 on the CPU: mean over texts of the sums of |E| in each block.

    Raises:
        HostError: the model holds no decoder that transom knows.
        SettingsError: there is no batch, or one has no labels.
    """
    from transom.lens.capture import capture

    names = ("query", "key", "value", "head_output")
    total, texts = None, 0
    asked = [p for p in model.parameters() if not p.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(True)  # gradients have to reach the first layer
    try:
        for batch in batches:
            if "labels" not in batch:
                raise SettingsError(
                    f"a batch has {sorted(batch)}, but no labels to take the loss of"
                )
            kept = [f"blocks.*.attention.{name}" for name in names]
            with torch.enable_grad(), capture(model, *kept, detach=False, decoder=True) as seen:
                loss = model(**batch, use_cache=False).loss
            held: dict[str, list[Tensor]] = {
                name: [x for full, x in seen.items() if full.endswith(f".{name}")] for name in names
            }
            grads = torch.autograd.grad(loss, held["head_output"])
            with torch.no_grad():
                layers = zip(held["query"], held["key"], held["value"], grads, strict=True)
                each = [torch.stack(list(_by_head(layer, block))) for layer in layers]
            now = torch.stack(each).cpu()
            total = now if total is None else total + now
            texts += len(batch["input_ids"])
    finally:
        for parameter in asked:
            parameter.requires_grad_(False)
    if total is None:
        raise SettingsError("there is no batch to measure influence on")
    return total / texts


def _by_head(layer: Sequence[Tensor], block: int) -> Iterator[Tensor]:
    """Sums (n, n) over all texts, of each head of q, k, v and the gradient (B, H, N, d)."""
    for head in zip(*(x.float().unbind(1) for x in layer), strict=True):
        yield block_sums(influence(*head), block).sum(0)


def shared(importance: Tensor, heads: int) -> Tensor:
    """Importance (layers, H, n, n) for heads that share keys: the largest of each group.

    Args:
        importance: of query heads.
        heads: of keys.
    """
    return importance.unflatten(1, (heads, -1)).amax(2)
