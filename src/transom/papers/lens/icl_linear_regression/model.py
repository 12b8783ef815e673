"""The data, the layers, and how their weights are read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError

Init = Literal["random", "small_id", "small_id_qk", "oppo_small_id"]


class Prompts(NamedTuple):
    """Tasks in context: tokens z (B, L, e), queries (B, 1, e) and their responses (B, 1, n)."""

    z: Tensor
    query: Tensor
    target: Tensor


def sample(
    count: int,
    length: int,
    d: int,
    noise: float = 0.1,
    *,
    covariance: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Prompts:
    """Fresh tasks: beta ~ N(0, I/d), x ~ N(0, covariance), y = beta . x + noise.

    Args:
        count: tasks, B.
        length: examples of a prompt, L.
        d: covariates.
        noise: variance of the noise on a response, that of the query included.
        covariance: (d, d) of the covariates; the identity by default.
        generator: of the random numbers.

    Returns:
        Tokens of width d + 1.
    """
    beta = torch.randn(count, d, 1, generator=generator) / math.sqrt(d)
    x = torch.randn(count, length + 1, d, generator=generator)
    if covariance is not None:
        x = x @ torch.linalg.cholesky(covariance).mT.to(x)
    error = torch.randn(count, length + 1, 1, generator=generator)
    return _prompts(x, x @ beta + math.sqrt(noise) * error)


def sample_tasks(
    count: int,
    length: int,
    d: int,
    widths: tuple[int, int],
    noise: float = 0.1,
    *,
    generator: torch.Generator | None = None,
) -> Prompts:
    """Two responses at once: one of the first covariates, one of the last; they may overlap.

    beta_i ~ N(0, I), noise of standard deviation sqrt(d_i noise), none on the query's responses.

    Args:
        count: prompts, B.
        length: examples of a prompt, L.
        d: covariates.
        widths: covariates of the first and of the second task.
        noise: variance of the noise in units of a task's width.
        generator: of the random numbers.

    Returns:
        Tokens of width d + 2.

    Raises:
        SettingsError: a task is wider than there are covariates.
    """
    if not all(1 <= width <= d for width in widths):
        raise SettingsError(f"widths are {widths}; expected each from 1 to d = {d}")
    x = torch.randn(count, length + 1, d, generator=generator)
    ys = []
    for width, part in zip(widths, (x[..., : widths[0]], x[..., d - widths[1] :]), strict=True):
        beta = torch.randn(count, width, 1, generator=generator)
        error = torch.randn(count, length + 1, 1, generator=generator)
        error[:, -1] = 0
        ys.append(part @ beta + math.sqrt(width * noise) * error)
    return _prompts(x, torch.cat(ys, -1))


def _prompts(x: Tensor, y: Tensor) -> Prompts:
    query = torch.cat([x[:, -1:], torch.zeros_like(y[:, -1:])], -1)
    return Prompts(torch.cat([x, y], -1)[:, :-1], query, y[:, -1:])


class _Projections(nn.Module):
    """q, k, v and o of heads that are each as wide as the token."""

    def __init__(
        self, width: int, heads: int, n_out: int | None, init: Init = "random", bias: bool = False
    ) -> None:
        super().__init__()
        if init not in get_args(Init):
            raise SettingsError(f"init is {init!r}; expected one of {get_args(Init)}")
        if min(width, heads) < 1:
            raise SettingsError(f"width is {width} and heads is {heads}; expected 1 or more")
        if init == "oppo_small_id" and heads % 2:
            raise SettingsError(f"init='oppo_small_id' needs an even number of heads; got {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(width, heads * width, bias=bias)
        self.k_proj = nn.Linear(width, heads * width, bias=bias)
        self.v_proj = nn.Linear(width, heads * width, bias=bias)
        self.o_proj = nn.Linear(heads * width, n_out or width, bias=bias)
        if init != "random":
            self._start(init, n_out is None)

    @torch.no_grad()
    def _start(self, init: Init, square: bool) -> None:
        eye = torch.eye(self.q_proj.in_features)
        if init == "oppo_small_id":  # half of the heads begin positive, half negative
            half = self.heads // 2
            self.q_proj.weight.copy_(1e-6 * torch.cat([eye] * half + [-eye] * half))
            self.k_proj.weight.copy_(1e-6 * torch.cat([eye] * self.heads))
            return
        size = 1e-6 if init == "small_id" else 1e-4
        chosen = [self.q_proj, self.k_proj] + ([self.v_proj] if init == "small_id" else [])
        for part in chosen:
            part.weight.copy_(size * eye.repeat(self.heads, 1))
        if init == "small_id" and square:
            self.o_proj.weight.copy_(size * eye.repeat(1, self.heads))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, x: Tensor) -> Tensor:
        out: Tensor = self.o_proj(x.transpose(1, 2).flatten(2))
        return out


class InContextAttention(_Projections):
    """One attention layer whose single query reads the context.

    Args:
        width: of a token, covariates and responses, e.
        heads: each of the full width.
        n_out: responses; None gives outputs of the token's width.
        init: torch's own, or identities scaled by 1e-6 (q, k and v), 1e-4 (q and k only), or with
            both signs.
        bias: whether the projections have one.
        linear: leave the softmax out and sum over the context, as linear transformers do; their
            predictions grow with its length.

    Raises:
        SettingsError: an argument is out of range.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        n_out: int | None = 1,
        *,
        init: Init = "random",
        bias: bool = False,
        linear: bool = False,
    ) -> None:
        super().__init__(width, heads, n_out, init, bias)
        self.linear = linear

    def forward(self, query: Tensor, z: Tensor) -> Tensor:
        """Query (B, 1, e) and context z (B, L, e) -> (B, 1, n_out)."""
        # one query, many keys: projecting the query back costs L times less than all the keys
        q = self.split(self.q_proj(query))
        wk, wv = (p.weight.unflatten(0, (self.heads, -1)) for p in (self.k_proj, self.v_proj))
        scores = q @ wk @ z[:, None].mT
        if self.k_proj.bias is not None:
            scores = scores + q @ self.k_proj.bias.unflatten(0, (self.heads, -1, 1))
        scores = scores / math.sqrt(q.shape[-1])
        weights = scores if self.linear else scores.softmax(-1)
        read = weights @ z[:, None] @ wv.mT
        if self.v_proj.bias is not None:
            bias = self.v_proj.bias.unflatten(0, (self.heads, 1, -1))
            read = read + weights.sum(-1, keepdim=True) * bias
        return self.join(read)


class CausalAttention(_Projections):
    """A causal layer of the stack, e -> e.

    Args:
        width: of a token, e.
        heads: each of the full width.
        double_softmax: as released: normalise over past and future, replace the future's weights
            by `bias`, and normalise the weights once more; attention is nearly uniform.
    """

    def __init__(self, width: int, heads: int, *, double_softmax: bool = False) -> None:
        super().__init__(width, heads, None)
        self.double_softmax = double_softmax
        self.register_buffer("bias", torch.tensor(-1e9))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, e) -> (B, N, e)."""
        q, k, v = (self.split(part(x)) for part in (self.q_proj, self.k_proj, self.v_proj))
        if not self.double_softmax:
            return self.join(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        past = torch.ones(weights.shape[-2:], dtype=torch.bool, device=x.device).tril()
        weights = torch.where(past, weights, self.get_buffer("bias").to(weights))
        return self.join(weights.softmax(-1) @ v)


class CausalStack(nn.Module):
    """Causal layers on context and query, and a linear read-out of the query.

    Args:
        layers: one is an :class:`InContextAttention`, as in the official code.
        width: of a token, e.
        heads: of each layer.
        n_out: responses.
        tied: whether all layers share their weights.
        double_softmax: the released attention, see :class:`CausalAttention`.

    Raises:
        SettingsError: an argument is out of range.
    """

    def __init__(
        self,
        layers: int,
        width: int,
        heads: int,
        n_out: int = 1,
        *,
        tied: bool = False,
        double_softmax: bool = False,
    ) -> None:
        super().__init__()
        if layers < 1:
            raise SettingsError(f"layers is {layers}; expected 1 or more")
        self.layers = layers
        if layers == 1:
            self.attention_layer = InContextAttention(width, heads, n_out)
            return
        made = [
            CausalAttention(width, heads, double_softmax=double_softmax)
            for _ in range(1 if tied else layers)
        ]
        self.attention_layers = nn.ModuleList(made * layers if tied else made)
        self.final_linear = nn.Linear(width, n_out, bias=False)

    def forward(self, query: Tensor, z: Tensor) -> Tensor:
        """Query (B, 1, e) and context z (B, L, e) -> (B, 1, n_out)."""
        out: Tensor
        if self.layers == 1:
            out = self.attention_layer(query, z)
            return out
        x = torch.cat([z, query], 1)
        for layer in self.attention_layers:
            x = layer(x)
        out = self.final_linear(x[:, -1:])
        return out


class Circuits(NamedTuple):
    """What each head compares, qk (H, D, D), and what it writes, ov (H, D, out); rows times these.

    qk is not divided by the scale of the scores.
    """

    qk: Tensor
    ov: Tensor


@torch.no_grad()
def circuits(q: Tensor, k: Tensor, v: Tensor, o: Tensor, heads: int) -> Circuits:
    """W_Q W_K^T and W_V W_O of every head, of any attention's weights.

    Args:
        q, k, v: (H d, D) as torch stores them; heads may have any width d.
        o: (out, H d).
        heads: H.

    Returns:
        Both in row-vector convention: a score is z_q W_QK z^T, an output z W_OV.

    Raises:
        SettingsError: the shapes do not belong to so many heads.
    """
    if heads < 1 or any(len(w) % heads for w in (q, k, v)) or o.shape[1] != len(v):
        shapes = [tuple(w.shape) for w in (q, k, v, o)]
        raise SettingsError(
            f"weights {shapes} do not split into {heads} heads; expected q, k, v (H d, D) and "
            "o (out, H d)"
        )
    wq, wk, wv = (w.unflatten(0, (heads, -1)).mT for w in (q, k, v))
    return Circuits(wq @ wk.mT, wv @ o.T.unflatten(0, (heads, -1)))


@dataclass(frozen=True)
class Patterns:
    """How far circuits are what in-context regression predicts.

    Attributes:
        omega: (H,), mean of the diagonal of W_QK over the covariates, in units of the score.
        mu: (H, n), what each response adds to its own output.
        off_diagonal: part of the squared entries of all W_QK that is not on the covariates'
            diagonal; 0 where the pattern holds. Rows that only a query's response would use count
            for nothing: it is always zero, so they never train.
        unequal: spread of the diagonals over their size; 0 where they are multiples of identity.
        elsewhere: part of the squared entries of all W_OV that no mu holds; 0 where the pattern
            holds.
        sum: |sum of mu over heads| / sum of |mu|, of the worst response; 0 where they cancel.
    """

    omega: Tensor
    mu: Tensor
    off_diagonal: float
    unequal: float
    elsewhere: float
    sum: float

    def roles(self, threshold: float = 0.1) -> list[str]:
        """Each head as 'positive', 'negative' or 'dummy'.

        Args:
            threshold: a head whose |omega| is below this part of the largest one is a dummy.
        """
        dummy = self.omega.abs() < threshold * self.omega.abs().max()
        names = ["positive" if w > 0 else "negative" for w in self.omega]
        return ["dummy" if d else name for name, d in zip(names, dummy, strict=True)]


def patterns(found: Circuits, covariates: int, scale: float | None = None) -> Patterns:
    """Score circuits against the predicted patterns.

    Args:
        found: of a layer on tokens of covariates, then responses.
        covariates: d; the token's other entries are responses.
        scale: of the scores; 1/sqrt(e) by default, as in :class:`InContextAttention`.

    Returns:
        The scores.

    Raises:
        SettingsError: W_OV writes fewer outputs than there are responses.
    """
    width, out = found.ov.shape[1:]
    if not 1 <= covariates < width or out < width - covariates:
        raise SettingsError(
            f"covariates is {covariates} for tokens of width {width} and {out} outputs; expected "
            "fewer covariates than the width, and an output for each of the other entries"
        )
    used = found.qk[:, :covariates]
    diagonal = used.diagonal(dim1=1, dim2=2)
    square = out == width  # outputs of the token's width: a response is written where it stood
    written = found.ov[:, covariates:, covariates:] if square else found.ov[:, covariates:]
    mu = written.diagonal(dim1=1, dim2=2)
    on, held = diagonal.square().sum(), mu.square().sum()
    mean = diagonal.mean(1, keepdim=True)
    return Patterns(
        diagonal.mean(1) * (width**-0.5 if scale is None else scale),
        mu,
        float(1 - on / used.square().sum()),
        float(((diagonal - mean).square().sum() / on).sqrt()),
        float(1 - held / found.ov.square().sum()),
        float((mu.sum(0).abs() / mu.abs().sum(0)).max()),
    )
