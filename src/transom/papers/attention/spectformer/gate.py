"""The spectral gate: a learned filter over the whole grid, applied in the Fourier domain."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

Grid = tuple[int, int]


def filtered(x: Tensor, weight: Tensor) -> Tensor:
    """Multiply the spectrum of a map with a weight.

    Args:
        x: (B, h, w, D), real. Half precision is transformed in float32.
        weight: (h, w // 2 + 1, D, 2), real and imaginary part of the filter at each frequency.

    Returns:
        (B, h, w, D) in the dtype of x.
    """
    if torch.compiler.is_exporting():
        return filtered_by_matrices(x, weight)
    wide, parts = _wide(x), _wide(weight)
    spectrum = torch.fft.rfft2(wide, dim=(1, 2), norm="ortho") * torch.view_as_complex(parts)
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho").to(x.dtype)


def filtered_by_matrices(x: Tensor, weight: Tensor) -> Tensor:
    """:func:`filtered` written with real matrix products, for graphs without complex numbers.

    The inverse transform along w takes the real part, so imaginary parts at frequency 0 and, for
    even w, at the Nyquist frequency drop out as they do in `irfft2`.
    """
    wide, parts = _wide(x), _wide(weight)
    h, w = x.shape[1:3]
    row_cos, row_sin = _waves(h, h, wide)
    cos, sin = _waves(w, w // 2 + 1, wide)
    real, imag = _along_columns(wide, cos), -_along_columns(wide, sin)
    real, imag = (
        _along_rows(real, row_cos) + _along_rows(imag, row_sin),
        _along_rows(imag, row_cos) - _along_rows(real, row_sin),
    )
    a, b = parts.unbind(-1)
    real, imag = real * a - imag * b, real * b + imag * a
    real, imag = (
        _along_rows(real, row_cos) - _along_rows(imag, row_sin),
        _along_rows(imag, row_cos) + _along_rows(real, row_sin),
    )
    # each frequency but the first and the Nyquist one stands for its mirror image as well
    alone = 2 * torch.arange(w // 2 + 1, device=x.device) % w == 0
    twice = (2 - alone.to(wide.dtype))[:, None] / (h * w)
    y = _along_columns(real, twice * cos.mT) - _along_columns(imag, twice * sin.mT)
    return y.to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _waves(n: int, frequencies: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines (n, frequencies) of the discrete Fourier transform."""
    place = torch.arange(n, dtype=torch.float64, device=like.device)
    angle = place[:, None] * place[:frequencies] * (2 * math.pi / n)
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def _along_rows(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("bhwd,hu->buwd", x, matrix)


def _along_columns(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("bhwd,wv->bhvd", x, matrix)


def resized(weight: Tensor, old: Grid, new: Grid) -> Tensor:
    """The same filter for another grid.

    A gate is a circular convolution of each channel; its kernel keeps its taps, and gets zeros
    around them on a larger grid or loses the outermost on a smaller one. In the spectrum this is
    trigonometric interpolation.

    Args:
        weight: (h, w // 2 + 1, D, 2) for the grid `old`.
        old, new: (h, w).

    Returns:
        (h', w' // 2 + 1, D, 2) for the grid `new`.
    """
    if old == new:
        return weight
    kernel = torch.fft.irfft2(torch.view_as_complex(_wide(weight)), s=old, dim=(0, 1))
    for axis in (0, 1):
        kernel = _taps(kernel.movedim(axis, 0), new[axis]).movedim(0, axis)
    return torch.view_as_real(torch.fft.rfft2(kernel, dim=(0, 1))).to(weight.dtype)


def _taps(kernel: Tensor, m: int) -> Tensor:
    """A circular kernel (n, ...) with tap 0 in front, as one of length m."""
    n = kernel.shape[0]
    if n == m:
        return kernel
    small = min(n, m)
    half = (small - 1) // 2
    front, back = kernel[: half + 1], kernel[n - half :]
    opposite = kernel[:0]
    if small % 2 == 0:  # the tap opposite to tap 0 lies on both sides of it
        both = kernel[small // 2] + kernel[n - small // 2]
        opposite = (both if m < n else both / 4).unsqueeze(0)
    if m < n:
        return torch.cat([front, opposite, back])
    gap = kernel.new_zeros(m - n - len(opposite), *kernel.shape[1:])
    return torch.cat([front, opposite, gap, opposite, back])


class SpectralGate(nn.Module):
    """A filter of its own for each channel.

    Attributes:
        grid: (h, w) that the weight belongs to; a map of another size gets the resized filter.
    """

    def __init__(self, dim: int, grid: Grid) -> None:
        super().__init__()
        self.grid = grid
        h, w = grid
        self.complex_weight = nn.Parameter(torch.randn(h, w // 2 + 1, dim, 2) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Filter a map (B, h, w, D)."""
        h, w = x.shape[1:3]
        return filtered(x, resized(self.complex_weight, self.grid, (h, w)))

    def resize(self, grid: Grid) -> None:
        """Let the weight belong to another grid."""
        weight = self.complex_weight
        new = resized(weight.detach(), self.grid, grid)
        self.complex_weight = nn.Parameter(new, requires_grad=weight.requires_grad)
        self.grid = grid
