"""Manhattan self-attention: the tables of a stage, the two forms of attention, the module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.ops.attention import attend

Form = Literal["full", "decomposed"]


def decays(
    heads: int, initial_value: float, heads_range: float, device: torch.device | None = None
) -> Tensor:
    """Logarithm of each head's decay per unit of distance: (n,) float32, none above 0.

    ln(1 - 2^-(a + r k / n)) for the heads k.

    Args:
        heads: n.
        initial_value: a, of head 0, which decays fastest.
        heads_range: r, how far the exponent runs over the heads.
        device: of the result.
    """
    places = torch.arange(heads, device=device, dtype=torch.float32)
    exponents = initial_value + heads_range / heads * places
    return torch.log1p(-torch.exp2(-exponents))


def axis_mask(decay: Tensor, length: int) -> Tensor:
    """Decay along one axis, decay_k |Δ|: (n, length, length) for decay (n,)."""
    places = torch.arange(length, device=decay.device, dtype=decay.dtype)
    return decay[:, None, None] * (places[:, None] - places).abs()


def grid_mask(decay: Tensor, height: int, width: int) -> Tensor:
    """Manhattan decay of a grid, decay_k (|Δrow| + |Δcolumn|): (n, h w, h w) for decay (n,)."""
    rows, columns = axis_mask(decay, height), axis_mask(decay, width)
    both = rows[:, :, None, :, None] + columns[:, None, :, None, :]  # (n, h, w, h, w)
    return both.flatten(3).flatten(1, 2)


def rotation(angle: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Sine and cosine, each (h, w, d), of the flattened position times the angles (d,)."""
    places = torch.arange(height * width, device=angle.device, dtype=angle.dtype)
    turns = (places[:, None] * angle).unflatten(0, (height, width))
    return turns.sin(), turns.cos()


def rotate(x: Tensor, sin: Tensor, cos: Tensor) -> Tensor:
    """Turn pairs of neighbouring channels of x (B, h, w, n, d) by tables (h, w, d)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([-odd, even], -1).flatten(-2)
    return x * cos[:, :, None] + turned * sin[:, :, None]


class Tables(NamedTuple):
    """What all blocks of a stage share for one size of map.

    Attributes:
        sin, cos: (h, w, d).
        mask: (n, h w, h w) of the full form; None in the decomposed one.
        mask_h, mask_w: (n, h, h) and (n, w, w) of the decomposed form; None in the full one.
    """

    sin: Tensor
    cos: Tensor
    mask: Tensor | None = None
    mask_h: Tensor | None = None
    mask_w: Tensor | None = None


class RelPos(nn.Module):
    """The tables of one stage; its two buffers are constants that official state dicts hold.

    The buffers stay in at least single precision when a model is cast: an angle in bfloat16 is
    off by whole turns at the end of a map of 56 x 56.
    """

    angle: Tensor
    decay: Tensor

    def __init__(self, dim: int, heads: int, initial_value: float, heads_range: float) -> None:
        super().__init__()
        if dim % heads or dim // heads % 2:
            raise SettingsError(
                f"{dim} channels in {heads} heads give a head width of {dim / heads:g}; the "
                "rotation works on pairs of channels, so an even integer is expected"
            )
        steps = torch.linspace(0, 1, dim // heads // 2)
        self.register_buffer("angle", (10000.0**-steps).repeat_interleave(2))
        self.register_buffer("decay", decays(heads, initial_value, heads_range))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RelPos:
        exact = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in exact.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype.itemsize < 4:
                self._buffers[name] = before.to(after.device)
        return self

    def forward(self, height: int, width: int, form: Form) -> Tables:
        """Tables for maps of h x w."""
        sin, cos = rotation(self.angle, height, width)
        if form == "full":
            return Tables(sin, cos, mask=grid_mask(self.decay, height, width))
        rows, columns = axis_mask(self.decay, height), axis_mask(self.decay, width)
        return Tables(sin, cos, mask_h=rows, mask_w=columns)


def full(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Every position looks at every other: softmax(q kᵀ / √d + mask) v.

    Args:
        q, k, v: (B, h, w, n, d).
        mask: (n, h w, h w).

    Returns:
        (B, h, w, n, d).
    """
    one, two, three = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    y = attend(one, two, three, mask.to(q.dtype)[None])
    return y.transpose(1, 2).unflatten(1, q.shape[1:3])


def decomposed(q: Tensor, k: Tensor, v: Tensor, mask_h: Tensor, mask_w: Tensor) -> Tensor:
    """Attention within each row, then within each column with that result as values.

    Args:
        q, k, v: (B, h, w, n, d).
        mask_h: (n, h, h).
        mask_w: (n, w, w).

    Returns:
        (B, h, w, n, d).
    """
    v = _along_rows(q, k, v, mask_w)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return _along_rows(q, k, v, mask_h).transpose(1, 2)


def _along_rows(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of (B, h, w, n, d) within each row, with a mask (n, w, w)."""
    # fused kernels know one batch dimension, so rows become batch items
    one, two, three = (t.flatten(0, 1).transpose(1, 2) for t in (q, k, v))
    y = attend(one, two, three, mask.to(q.dtype)[None])
    return y.transpose(1, 2).unflatten(0, q.shape[:2])


class DWConv2d(nn.Module):
    """Depthwise convolution of maps with the channels last, (B, h, w, C)."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(dim, dim, kernel_size, padding=kernel_size // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x.permute(0, 3, 1, 2))
        return y.permute(0, 2, 3, 1)


class MaSA(nn.Module):
    """Manhattan self-attention of maps (B, h, w, C), in either form."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.lepe = DWConv2d(dim, 5)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """Mixed features (B, h, w, C); the tables say in which form."""
        v = self.v_proj(x)
        split: Any = (self.heads, -1)
        sin, cos = tables.sin.to(v.dtype), tables.cos.to(v.dtype)
        q = rotate(self.q_proj(x).unflatten(-1, split), sin, cos)
        k = rotate(self.k_proj(x).unflatten(-1, split), sin, cos)
        values = v.unflatten(-1, split)
        if tables.mask is not None:
            y = full(q, k, values, tables.mask)
        else:
            assert tables.mask_h is not None and tables.mask_w is not None
            y = decomposed(q, k, values, tables.mask_h, tables.mask_w)
        out: Tensor = self.out_proj(y.flatten(-2) + self.lepe(v))
        return out
