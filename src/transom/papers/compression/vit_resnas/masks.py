"""Leading channels: masks, the norm that knows them, importance, slices.

A sub-network keeps the first channels, heads and hidden units of the super-network. While the
super-network trains, what a sub-network lacks is zeroed by a mask; afterwards it is cut away.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def leading(kept: Tensor, channels: int) -> Tensor:
    """Mask of the first channels of each image.

    Args:
        kept: (B,) how many stay.
        channels: there are.

    Returns:
        (B, 1, channels) bool.
    """
    places = torch.arange(channels, device=kept.device)
    return places < kept[:, None, None]


def masked_layer_norm(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm whose mean and mean square count only the kept channels (sec. 4.2).

        mean = sum_c x / k,  var = sum_c x² / k - mean²
        y = mask · (w (x - mean) / sqrt(var + eps) + b)

    k is the number of kept channels. The sums run over all channels: x has to be zero outside the
    mask, as it is behind every masking point. Statistics in float32 or better.

    Args:
        x: (B, N, C), zero outside the mask.
        mask: (B, 1, C) bool.
        weight, bias: (C,).
        eps: added to the variance.

    Returns:
        (B, N, C), zero outside the mask.
    """
    wide = x if x.dtype == torch.float64 else x.float()
    kept = mask.sum(-1, keepdim=True)
    mean = wide.sum(-1, keepdim=True) / kept
    var = wide.square().sum(-1, keepdim=True) / kept - mean.square()
    normed = (wide - mean) * (var.clamp(min=0) + eps).rsqrt()
    return ((normed * weight + bias) * mask).to(x.dtype)


class MaskedLayerNorm(nn.LayerNorm):
    """LayerNorm that takes a mask of leading channels; without one it is LayerNorm."""

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__(dim, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normed x (B, N, C) from x and a mask (B, 1, C) of bool."""
        if mask is None:
            return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return masked_layer_norm(x, mask, self.weight, self.bias, self.eps)


def head_importance(state: Mapping[str, Tensor], heads: int) -> Tensor:
    """L1 of what belongs to each head: rows of q, k and v, their biases, columns of proj.

    Args:
        state: `attn.qkv.weight`, `attn.qkv.bias`, `attn.proj.weight`.
        heads: number of them.

    Returns:
        (heads,).
    """
    rows = state["attn.qkv.weight"].abs().sum(1) + state["attn.qkv.bias"].abs()
    columns = state["attn.proj.weight"].abs().sum(0)
    return rows.view(3, heads, -1).sum((0, 2)) + columns.view(heads, -1).sum(1)


def unit_importance(state: Mapping[str, Tensor]) -> Tensor:
    """L1 of what belongs to each hidden unit: row of fc1, its bias, column of fc2; (hidden,)."""
    columns = state["mlp.fc2.weight"].abs().sum(0)
    return columns + state["mlp.fc1.weight"].abs().sum(1) + state["mlp.fc1.bias"].abs()


def sorted_block(state: Mapping[str, Tensor], heads: int) -> dict[str, Tensor]:
    """A block with its heads and hidden units in descending order of importance.

    The function of the block stays the same; equal ones keep their order.

    Args:
        state: of one block.
        heads: of its attention.

    Returns:
        The tensors that change.
    """
    order = head_importance(state, heads).argsort(descending=True, stable=True)
    units = unit_importance(state).argsort(descending=True, stable=True)
    qkv, proj = state["attn.qkv.weight"], state["attn.proj.weight"]
    return {
        "attn.qkv.weight": qkv.unflatten(0, (3, heads, -1))[:, order].flatten(0, 2),
        "attn.qkv.bias": state["attn.qkv.bias"].unflatten(0, (3, heads, -1))[:, order].flatten(),
        "attn.proj.weight": proj.unflatten(1, (heads, -1))[:, order].flatten(1),
        "mlp.fc1.weight": state["mlp.fc1.weight"][units],
        "mlp.fc1.bias": state["mlp.fc1.bias"][units],
        "mlp.fc2.weight": state["mlp.fc2.weight"][:, units],
    }


def sliced(tensor: Tensor, shape: tuple[int, ...], *, qkv: bool = False) -> Tensor:
    """The leading part of a tensor.

    Args:
        tensor: of the super-network.
        shape: of the sub-network's, no larger in any place.
        qkv: whether the first axis holds q, k and v, each with its own leading part.

    Returns:
        A copy of this shape.
    """
    if qkv:
        parts = tensor.chunk(3)
        return torch.cat([sliced(part, (shape[0] // 3, *shape[1:])) for part in parts])
    return tensor[tuple(slice(n) for n in shape)].clone()


def sliced_state(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Tensor]:
    """The leading part of every tensor; see :func:`sliced`.

    Args:
        state: of the super-network.
        shapes: of the sub-network, by the same names.
    """
    return {name: sliced(state[name], shape, qkv=".qkv." in name) for name, shape in shapes.items()}
