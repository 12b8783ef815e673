"""MSA-Conv: attention inside a convolution window, and the released block."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from transom.errors import SettingsError

Pair = int | tuple[int, int]


def windows(x: Tensor, kernel: Pair, dilation: Pair = 1) -> list[Tensor]:
    """A map moved to each place of the window, with zeros outside.

    Args:
        x: (..., h, w).
        kernel: odd height and width of the window.
        dilation: distance of neighbouring places.

    Returns:
        One (..., h, w) a place, row by row: views of one padded map.

    Raises:
        SettingsError: a side of the window is even.
    """
    (kh, kw), (dy, dx) = checked_window(kernel), to_2tuple(dilation)
    h, w = x.shape[-2:]
    py, px = dy * (kh - 1) // 2, dx * (kw - 1) // 2
    padded = F.pad(x, (px, px, py, py))
    return [
        padded[..., a * dy : a * dy + h, b * dx : b * dx + w] for a in range(kh) for b in range(kw)
    ]


def unfolded(x: Tensor, kernel: Pair, dilation: Pair = 1) -> Tensor:
    """:func:`windows` of (B, C, h, w) as one tensor (B, C, J, h, w).

    One operator instead of one a place, which keeps graphs small; a compiler never stores it.
    """
    (kh, kw), (dy, dx) = checked_window(kernel), to_2tuple(dilation)
    padding = (dy * (kh - 1) // 2, dx * (kw - 1) // 2)
    columns = F.unfold(x, (kh, kw), (dy, dx), padding)
    return columns.unflatten(1, (x.shape[1], -1)).unflatten(-1, x.shape[-2:])


def checked_window(kernel: Pair) -> tuple[int, int]:
    """Height and width of the window.

    Raises:
        SettingsError: one of them is even, or below 1.
    """
    kh, kw = to_2tuple(kernel)
    if kh < 1 or kw < 1 or not kh % 2 or not kw % 2:
        raise SettingsError(
            f"the window is {kh} x {kw}; expected odd sides, as it has a pixel in its middle"
        )
    return kh, kw


def window_dots(q: Tensor, k: Tensor, kernel: Pair, dilation: Pair = 1) -> Tensor:
    """Products of each query with the keys of its window.

    Args:
        q, k: (B, C, h, w).
        kernel, dilation: of the window.

    Returns:
        (B, J, h, w), places of the window row by row.
    """
    if torch.compiler.is_compiling():
        return (q.unsqueeze(2) * unfolded(k, kernel, dilation)).sum(1)
    return torch.stack([(q * each).sum(1) for each in windows(k, kernel, dilation)], 1)


def window_sum(weight: Tensor, v: Tensor, kernel: Pair, dilation: Pair = 1) -> Tensor:
    """Weighted sum of the values of each window.

    Args:
        weight: (B, J, h, w).
        v: (B, C, h, w).
        kernel, dilation: of the window.

    Returns:
        (B, C, h, w).
    """
    if torch.compiler.is_compiling():
        return (weight.unsqueeze(1) * unfolded(v, kernel, dilation)).sum(2)
    places = zip(weight.unbind(1), windows(v, kernel, dilation), strict=True)
    first, *rest = (part.unsqueeze(1) * each for part, each in places)
    return sum(rest, first)


class MSAConv2d(nn.Module):
    """The released block, with heads and shifts as options.

    Attributes:
        num_heads: 1 is the released block.
        shift: whether groups of heads see keys and values rolled in four directions.
    """

    def __init__(
        self,
        input_channel: int,
        output_channel: int,
        kernel_size: Pair = 3,
        stride: Pair = 1,
        dilation: Pair = 1,
        padding: Pair = 1,
        bias: bool = False,
        *,
        dropout: float = 0.1,
        num_heads: int = 1,
        shift: bool = False,
    ) -> None:
        """Build the block; the arguments before the star are the released ones.

        Raises:
            SettingsError: a side of the window is even, or the heads do not divide the channels.
        """
        super().__init__()
        if input_channel % num_heads:
            raise SettingsError(f"{num_heads} heads do not divide {input_channel} channels")
        self.kernel_size, self.dilation = checked_window(kernel_size), to_2tuple(dilation)
        self.num_heads, self.shift, self.dropout = num_heads, shift, dropout
        self.qkv_conv = nn.Conv2d(input_channel, 3 * input_channel, 1)
        self.mlp = nn.Conv2d(input_channel, output_channel, kernel_size, stride, padding, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C', h', w') as the final convolution makes it."""
        q, k, v = self._projected(x)
        dots = window_dots(q, k, self.kernel_size, self.dilation) * q.shape[1] ** -0.5
        weight = F.dropout(dots.softmax(1), self.dropout, self.training)
        y = window_sum(weight, v, self.kernel_size, self.dilation)
        return F.relu(self.mlp(y.reshape(x.shape).to(x.dtype) + x))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v (B·H, C/H, h, w), not in half precision."""
        q, k, v = (wide(t).unflatten(1, (self.num_heads, -1)) for t in self.qkv_conv(x).chunk(3, 1))
        if self.shift:
            k, v = rolled(k), rolled(v)
        return tuple(t.flatten(0, 1) for t in (q, k, v))


def wide(x: Tensor) -> Tensor:
    """Half precision as float32, in which the released block attends; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def rolled(x: Tensor) -> Tensor:
    """Heads (B, H, d, h, w) in five groups, rolled by a quarter of the map but for the first.

    The directions are up, down, left and right.
    """
    h, w = x.shape[-2] // 4, x.shape[-1] // 4
    by = ((0, 0), (-h, 0), (h, 0), (0, -w), (0, w))
    groups = zip(x.tensor_split(len(by), 1), by, strict=True)
    return torch.cat([group.roll(each, (-2, -1)) for group, each in groups], 1)
