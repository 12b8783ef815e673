"""ComplexFormer: heads that compare magnitudes and stretched phases (CMHA).

The halves of a head are the real and imaginary parts of J = d/2 complex numbers, each with a
magnitude ρ = sqrt(re² + im² + 1e-9) and a phase φ. With δ and b (H, J) learned and
g_j = 10000^(-2j/d), the logit of the query at place m and the key at place n is

    Σ_j ρ_qj ρ_kj cos(δ_j (φ_qj - φ_kj) + b_j + (m - n) g_j)         not divided by sqrt(d)

x: (B, L, D), no biases; values stay real. A cache holds keys and values as projected.

Source: ComplexFormer: Disruptively Advancing Transformer Inference Ability via Head-Specific
Complex Vector Attention, 2025, a listing of which is marked as withdrawn; official code
shaojintian/complexFormer@f91ac74 (no licence; this file is our own, from the equations).

The official code makes the (L, L, J) cosines of every head in chunks of rows. That is not needed:
the angle is a difference, (δ φ_q + b + m g) - (δ φ_k + n g), so its cosine is an inner product and
the whole is plain attention between q and k turned by (δ - 1) φ + their part of the rest. One
rotation a token, fused kernels, no memory beyond theirs. With δ = 1 and b = 0 what is left is
rotary embedding (halves, base 10000), so a rotary checkpoint is an exact start: `from_rope` folds
1/sqrt(d) into W_q. That start is ours; the official one draws δ from N(0, 1/J) around 0, where
heads hardly see phases of the content.

Quirks. The training version of the official layer rounds g to bfloat16 (`frequencies`), an error
that grows with the distance. The phases are not wrapped: for δ that is no integer the logit jumps
where a component crosses the negative real axis, so it is no continuous function of q.

As a method it turns q and k of every attention of a host; it begins as the host (δ = 1, b = 0, no
positions of its own beside those of the host) or as the official code does. The host's scale
stays. In a host that rotates q and k itself, the phases hold its positions as well. Checked against
goldens of both official layers, the written-out cosines, and a rotary attention of transformers.
The results of the paper could not be checked: its experiments are not released.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError, TokensError
from transom.hosts.base import Host
from transom.hosts.heads import head_shape
from transom.ops import attention
from transom.projections import Affine, Projections
from transom.registry import Method, Offer
from transom.slots import Fill
from transom.tokens import Record

BASE = 10000.0
EPS = 1e-9
Frequencies = Literal["exact", "bfloat16"]

_log = logging.getLogger(__name__)


def frequencies(count: int, base: float = BASE) -> Tensor:
    """The g of `count` pairs of channels, from 1 downwards, in double."""
    return base ** -(torch.arange(count, dtype=torch.float64) / count)


def angles(places: Tensor, g: Tensor) -> Tensor:
    """Angle (..., J) of each place (...,), between 0 and 2π.

    In double: a product of hundreds of thousands has no digits left behind the point otherwise.
    """
    g = g.to(places.device, torch.float64)
    return torch.remainder(places.double()[..., None] * g, 2 * math.pi)


def turn(
    x: Tensor, delta: Tensor, shift: Tensor | None, angle: Tensor | None, eps: float = EPS
) -> Tensor:
    """The complex numbers of x with phases δ φ + shift + angle and magnitudes ρ.

    Args:
        x: (..., H, N, d), halves of d are real and imaginary parts.
        delta: (H, d/2).
        shift: (H, d/2), b of queries; None for none.
        angle: broadcastable to (..., H, N, d/2), of the places; None for none.
        eps: inside of the magnitude.

    Returns:
        As x.
    """
    kind = x.dtype
    real, imaginary = x.to(torch.promote_types(kind, torch.float32)).chunk(2, -1)
    square = real.square() + imaginary.square()
    there = square > 0
    # zero has phase zero, and no gradient
    square = torch.where(there, square, 1)
    real, imaginary = torch.where(there, real, 1), torch.where(there, imaginary, 0)
    grown = torch.where(there, ((square + eps) / square).sqrt(), math.sqrt(eps))
    by = (delta - 1).to(real.dtype)[:, None] * torch.atan2(imaginary, real)
    if shift is not None:
        by = by + shift.to(real.dtype)[:, None]
    if angle is not None:
        by = by + angle.to(real.dtype)
    cos, sin = grown * by.cos(), grown * by.sin()
    return torch.cat([real * cos - imaginary * sin, real * sin + imaginary * cos], -1).to(kind)


def reference(
    q: Tensor,
    k: Tensor,
    delta: Tensor,
    shift: Tensor,
    g: Tensor,
    past: int = 0,
    eps: float = EPS,
    chunk: int = 8,
) -> Tensor:
    """Logits as at the top, cosine by cosine; twin of the product of what :func:`turn` returns.

    Args:
        q: (B, H, L, d), at the places past … past + L - 1.
        k: (B, H, T, d), at the places 0 … T - 1.
        delta, shift: (H, d/2), δ and b.
        g: (d/2,).
        past: place of the first query.
        eps: inside of the magnitude.
        chunk: rows at a time.

    Returns:
        (B, H, L, T).
    """

    def polar(x: Tensor) -> tuple[Tensor, Tensor]:
        real, imaginary = x.chunk(2, -1)
        return (real**2 + imaginary**2 + eps).sqrt(), torch.atan2(imaginary, real)

    (rho_q, phi_q), (rho_k, phi_k) = polar(q), polar(k)
    m = past + torch.arange(q.shape[2], device=q.device)
    n = torch.arange(k.shape[2], device=q.device)
    out = []
    for rows in torch.arange(q.shape[2], device=q.device).split(chunk):
        apart = phi_q[:, :, rows, None] - phi_k[:, :, None]  # (B, H, c, T, J)
        place = (m[rows, None] - n)[..., None] * g
        theta = delta[:, None, None] * apart + shift[:, None, None] + place
        out.append((rho_q[:, :, rows, None] * rho_k[:, :, None] * theta.cos()).sum(-1))
    return torch.cat(out, 2)


class RelativePosition(nn.Module):
    """Holds the frequencies once more, by their official name."""

    g: Tensor

    def __init__(self, g: Tensor) -> None:
        super().__init__()
        self.register_buffer("g", g)


class ComplexAttention(nn.Module):
    """The official layer.

    Args:
        d_model: D.
        num_heads: H.
        frequencies: as they are (the official layer with a cache), or rounded to bfloat16 (the
            one that is trained).
        rope_base: of the frequencies.
        magnitude_eps: inside of the magnitude.
        bias: whether the maps to q, k, v and back have biases (ours).
    """

    g: Tensor

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        *,
        frequencies: Frequencies = "exact",
        rope_base: float = BASE,
        magnitude_eps: float = EPS,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if d_model % (2 * num_heads):
            raise SettingsError(
                f"d_model is {d_model}; expected a multiple of 2·{num_heads}, because a head "
                "holds real and imaginary parts"
            )
        self.heads, self.eps, self.rounded = num_heads, magnitude_eps, frequencies == "bfloat16"
        pairs = d_model // num_heads // 2
        self.W_q, self.W_k, self.W_v, self.W_o = (
            nn.Linear(d_model, d_model, bias) for _ in range(4)
        )
        for linear in (self.W_q, self.W_k, self.W_v, self.W_o):
            nn.init.xavier_uniform_(linear.weight)
        self.delta_params = nn.Parameter(torch.randn(num_heads, pairs) * pairs**-0.5)
        self.bias_params = nn.Parameter(torch.zeros(num_heads, pairs))
        g = _frequencies(pairs, rope_base)
        self.register_buffer("g", g)
        if not self.rounded:
            self.relative_pos_encoding = RelativePosition(g.clone())

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        past: tuple[Tensor, Tensor] | None = None,
        *,
        need_weights: bool = False,
    ) -> tuple[Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """Attend from x to what is cached and to x.

        Args:
            x: (B, L, D).
            mask: broadcastable to (B, H, L, T); added to the logits, or boolean, True for what
                is seen.
            past: keys and values (B, H, P, d) of the tokens before.
            need_weights: return the attention weights as well, which makes their matrix.

        Returns:
            (B, L, D), weights (B, H, L, T) or None, and keys and values (B, H, T, d) to cache.
        """
        q, k, v = (
            linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.W_q, self.W_k, self.W_v)
        )
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        g = self.g.bfloat16() if self.rounded else self.relative_pos_encoding.g
        angle = angles(torch.arange(k.shape[2], device=x.device), g)
        turned_q = turn(q, self.delta_params, self.bias_params, angle[-q.shape[2] :], self.eps)
        turned_k = turn(k, self.delta_params, None, angle, self.eps)
        if mask is not None and mask.dtype == torch.bool:
            lowest = torch.finfo(q.dtype).min
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(~mask, lowest)
        weights = None
        if need_weights:
            logits = turned_q @ turned_k.mT
            weights = (logits if mask is None else logits + mask).softmax(-1)
            out = weights @ v
        else:
            out = attention.attend(turned_q, turned_k, v, mask, scale=1.0)
        return self.W_o(out.transpose(1, 2).flatten(2)), weights, (k, v)


def _frequencies(pairs: int, base: float) -> Tensor:
    if base <= 1:
        raise SettingsError(f"the base of the frequencies is {base}; expected more than 1")
    return frequencies(pairs, base).float()


def from_rope(given: Projections, rope_base: float = BASE) -> ComplexAttention:
    """A layer that computes what a rotary attention does, ready to be tuned.

    Args:
        given: what the attention projects with; as many heads of keys as of queries. Its
            rotation has to pair the halves of a head, and its scale to be 1/sqrt(d).
        rope_base: of its frequencies.

    Returns:
        A layer with δ = 1, b = 0 and the scale in W_q.
    """
    maps: dict[str, Affine] = {"W_q": given.q, "W_k": given.k, "W_v": given.v, "W_o": given.out}
    width = len(given.q[0])
    wrong = [name for name, (weight, _) in maps.items() if weight.shape != (width, width)]
    if wrong:
        raise FitError(
            f"{wrong[0]} would be {tuple(maps[wrong[0]][0].shape)}; expected ({width}, {width}), "
            "an attention with as many heads of keys as of queries and no other width inside"
        )
    has_bias = any(bias is not None for _, bias in maps.values())
    layer = ComplexAttention(width, given.heads, rope_base=rope_base, bias=has_bias)
    scale = (width // given.heads) ** -0.5
    state = layer.state_dict()
    for name, (weight, bias) in maps.items():
        factor = scale if name == "W_q" else 1.0
        state[f"{name}.weight"] = weight * factor
        if has_bias:
            state[f"{name}.bias"] = torch.zeros(width) if bias is None else bias * factor
    state["delta_params"] = torch.ones_like(layer.delta_params)
    layer.load_state_dict(state)
    return layer.to(given.q[0])


class Phases(nn.Module):
    """Attention operator between a host's projections: phases of q and k stretched and shifted.

    Attributes:
        delta_params, bias_params: (H, d/2), δ and b.
    """

    def __init__(self, method: ComplexFormer, shape: tuple[int, int], rng: torch.Generator) -> None:
        super().__init__()
        heads, pairs = shape[0], shape[1] // 2
        self.positions, self.base = method.positions, method.rope_base
        delta = torch.ones(heads, pairs)
        if method.init == "official":
            delta = torch.randn(heads, pairs, generator=rng) * pairs**-0.5
        self.delta_params = nn.Parameter(delta)
        self.bias_params = nn.Parameter(torch.zeros(heads, pairs))

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
    ) -> Tensor:
        """Heads (B, H, N, d) from q, k, v (B, H, N, d)."""
        angle = None if self.positions == "none" else self._angle(q, record)
        q = turn(q, self.delta_params, self.bias_params, angle)
        return attention.attend(q, turn(k, self.delta_params, None, angle), v, bias, scale=scale)

    def _angle(self, q: Tensor, record: Record | None) -> Tensor:
        """(N, d/2)."""
        assert record is not None
        count, pairs, layout = q.shape[2], q.shape[3] // 2, record.layout
        if count != layout.count or record.size is not None:
            raise TokensError(
                f"complexformer with positions={self.positions!r} needs the tokens in their "
                f"original places, but this block has {count} where {layout.count} were "
                "expected; fit it without a method that reduces tokens, or with positions='none'"
            )
        if self.positions == "sequence":
            return angles(torch.arange(count, device=q.device), frequencies(pairs, self.base))
        if layout.grid is None:
            raise TokensError(
                f"complexformer with positions='axial' got {count} tokens, which are not those "
                "of the host's own image size; call it with such images"
            )
        # the first half of the frequencies turns by rows, the second by columns
        h, w = layout.grid
        down = angles(torch.arange(h, device=q.device), frequencies(pairs - pairs // 2, self.base))
        across = angles(torch.arange(w, device=q.device), frequencies(pairs // 2, self.base))
        grid = torch.cat([down[:, None].expand(h, w, -1), across.expand(h, w, -1)], -1)
        still = grid.new_zeros(layout.prefix, pairs)
        return torch.cat([still, grid.flatten(0, 1)])


@dataclass(frozen=True)
class ComplexFormer(Method):
    """Head-specific phases in every attention.

    Attributes:
        positions: phases by place of our own: "none" beside the host's, those of the "sequence"
            (prefix included), or "axial" ones by row and column of the grid (ours).
        rope_base: of the frequencies.
        init: δ = 1, with which content counts as it does in the "host", or the "official" draw
            around 0.
        seed: of that draw.
    """

    positions: Literal["none", "sequence", "axial"] = "none"
    rope_base: float = BASE
    init: Literal["host", "official"] = "host"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.rope_base <= 1:
            raise SettingsError(f"rope_base is {self.rope_base}; expected more than 1")

    def fit(self, host: Host) -> list[Fill]:
        if self.positions != "none" and host.follows:
            raise FitError(
                f"complexformer with positions={self.positions!r} would turn q and k by their "
                f"places once more; this {host.family} does so already. Use positions='none'"
            )
        if self.positions == "axial" and host.grid is None:
            raise FitError(
                f"complexformer with positions='axial' needs the patches on a known grid, and "
                f"this {host.family} has none; use positions='sequence'"
            )
        rng = torch.Generator().manual_seed(self.seed)
        fills = []
        for i, view in enumerate(host.views):
            shape = head_shape(view)
            if shape is None or shape[1] % 2:
                raise FitError(
                    "complexformer needs plain projections to q, k and v with heads of an even "
                    f"width; block {i} of this {host.family} has "
                    + ("others" if shape is None else f"heads of width {shape[1]}")
                )
            fills.append(Fill(attention=Phases(self, shape, rng)))
        if self.init == "official" or self.positions != "none":
            _log.warning("complexformer does not begin as the host: train the model before use")
        return fills

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{}, {"positions": "axial"}, {"positions": "axial", "init": "official"}]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {}


OFFERS = (
    Offer("operator", "complex-attention", ComplexAttention),
    Offer("operator", "from-rope", from_rope),
)
