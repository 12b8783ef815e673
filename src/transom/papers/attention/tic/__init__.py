"""TiC: self-attention inside a convolution window (MSA-Conv).

Each pixel's query meets the keys of its k x k window, dilated by δ, on maps q, k, v (B, C, h, w):

    dots[j, y, x] = Σ_c q[c, y, x] · k[c, y + δ(a - r), x + δ(b - r)]
    out[c, y, x]  = Σ_j softmax_j(scale · dots)[j, y, x] · v[c, y + δ(a - r), x + δ(b - r)]

where j = (a, b) is a place of the window and r = (k - 1)/2.

Outside the image keys and values are zero, as in a padded convolution: such a place has logit 0,
takes its part of the softmax and returns nothing. This is neither a masked softmax nor a window
that is moved inside. The cost is linear in h·w, and any image size works without position tables.

The released block (:class:`MSAConv2d`) projects with a 1x1 convolution, attends with one head and
scale C^-½, adds its input, and ends with an ordinary k x k convolution and a ReLU.

Source: Zhang et al., TiC: Exploring Vision Transformer in Convolution, 2023 (abstract); official
code zs670980918/MSA-Conv@2d96f54 (no licence file; this file is our own): operator and block only.

Checked: operator and block against golden cases, with gradients; the operator against a loop over
pixels. Not checked: everything beyond the block, because the network is not released. Here is a
reconstruction of what the abstract names, and nothing more should be read into it:

* multiple heads: the channels in groups, scale (C/H)^-½;
* multi-directional cyclic shift: keys and values of each group of heads are rolled by a quarter of
  the map up, down, left or right, so that windows meet distant tokens; one group stays;
* inter-pooling: between two blocks of a stage a map is averaged with its 3 x 3 means;
* `tic_tiny`: four stages of pre-norm residual blocks with these, of our own sizes.

As a method, MSA-Conv is an attention operator between the projections of a host, with its heads
and scale. Prefix tokens attend to all tokens and are seen by all; they are no part of the window.
`border="mask"` leaves places outside the image out of the softmax, and with a window over the
whole grid equals the host.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.ops import attention
from transom.papers.attention.tic.network import TiCNet
from transom.papers.attention.tic.operator import (
    MSAConv2d,
    checked_window,
    wide,
    window_dots,
    window_sum,
    windows,
)
from transom.registry import Backbone, Method, Offer
from transom.settings import named_blocks
from transom.slots import Fill
from transom.tokens import Record


@dataclass(frozen=True)
class WindowAttention:
    """Attention operator: MSA-Conv over the patches of a host.

    Attributes:
        kernel: odd side of the window.
        dilation: distance of neighbouring places.
        masked: whether places outside the image are left out of the softmax.
    """

    kernel: int
    dilation: int
    masked: bool

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
    ) -> Tensor:
        assert record is not None
        patches = record.as_map(q.transpose(1, 2))[1]
        prefix, grid = record.layout.prefix, (patches.shape[1], patches.shape[2])
        if self.masked and self.dilation == 1 and self.kernel >= 2 * max(grid) - 1:
            return attention.attend(q, k, v, bias, scale=scale)  # every window is the whole grid
        out = self._patches(q, k, v, bias, scale, prefix, grid)
        if not prefix:
            return out
        rows = bias if bias is None or bias.shape[2] == 1 else bias[:, :, :prefix]
        first = attention.attend(q[:, :, :prefix], k, v, rows, scale=scale)
        return torch.cat([first, out], 2)

    def _patches(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        bias: Tensor | None,
        scale: float,
        prefix: int,
        grid: tuple[int, int],
    ) -> Tensor:
        """What leaves the attention of the patches, (B, H, h·w, d)."""
        batch, heads = q.shape[:2]
        window = self._reach(grid)

        def as_map(x: Tensor) -> Tensor:
            return wide(x[:, :, prefix:]).mT.flatten(0, 1).unflatten(-1, grid)

        dots = window_dots(as_map(q), as_map(k), window, self.dilation).flatten(2) * scale
        dots = dots.unflatten(0, (batch, heads))  # (B, H, J, h·w)
        ones = torch.ones(grid, device=q.device, dtype=torch.bool)
        inside = torch.stack(windows(ones, window, self.dilation)).flatten(1)  # (J, h·w)
        if bias is not None:
            dots = dots + self._window_bias(bias, prefix, grid, window, inside)
        if self.masked:
            dots = dots.masked_fill(~inside, -math.inf)
        seen = wide(k[:, :, :prefix]) @ wide(q[:, :, prefix:]).mT * scale  # (B, H, P, h·w)
        if bias is not None and prefix:
            rows = bias if bias.shape[2] == 1 else bias[:, :, prefix:]
            seen = seen + rows[..., :prefix].mT
        weight = torch.cat([seen, dots], 2).softmax(2)
        far, near = weight.split([prefix, dots.shape[2]], 2)
        near = near.flatten(0, 1).unflatten(-1, grid)
        y = window_sum(near, as_map(v), window, self.dilation)
        y = y.flatten(2).mT.unflatten(0, (batch, heads))
        return (y + far.mT @ wide(v[:, :, :prefix])).to(v.dtype)

    def _reach(self, grid: tuple[int, int]) -> tuple[int, int]:
        """The window, without places that are outside the image for every pixel."""
        if not self.masked:
            return self.kernel, self.kernel
        h, w = (min(self.kernel, 2 * ((side - 1) // self.dilation) + 1) for side in grid)
        return h, w

    def _window_bias(
        self,
        bias: Tensor,
        prefix: int,
        grid: tuple[int, int],
        window: tuple[int, int],
        inside: Tensor,
    ) -> Tensor:
        """The bias (B, H, 1 or N, N) of each place of the window, (B, H, J, h·w)."""
        count = grid[0] * grid[1]
        place = torch.arange(count, device=bias.device)
        key = torch.stack(windows(place.view(grid), window, self.dilation)).flatten(1)
        rows = bias[..., prefix:] if bias.shape[2] == 1 else bias[:, :, prefix:, prefix:]
        query = place if rows.shape[2] > 1 else torch.zeros_like(place)
        return torch.where(inside, wide(rows)[:, :, query, key], 0.0)


@dataclass(frozen=True)
class TiC(Method):
    """Attention of each patch to the window around it.

    Attributes:
        kernel: odd side of the window, in patches.
        dilation: distance of neighbouring places, in patches.
        border: "zero", as released: places outside the image have logit 0 and value 0; "mask":
            they are left out.
        layers: blocks that get it; None for all.
    """

    kernel: int = 3
    dilation: int = 1
    border: Literal["zero", "mask"] = "zero"
    layers: tuple[int, ...] | None = None
    needs_grid = True
    needs_training = True

    def __post_init__(self) -> None:
        checked_window(self.kernel)
        if self.dilation < 1:
            raise SettingsError(f"dilation is {self.dilation}; expected at least 1")

    def fit(self, host: Host) -> list[Fill]:
        every = range(host.depth)
        layers = named_blocks(every if self.layers is None else self.layers, host.depth)
        operator = WindowAttention(self.kernel, self.dilation, self.border == "mask")
        return [Fill(attention=operator if i in layers else None) for i in range(host.depth)]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"kernel": side} for side in (7, 5, 3)]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"kernel": 255, "border": "mask"}


BACKBONES = (Backbone("tic_tiny"),)
OFFERS = (Offer("operator", "msa-conv", MSAConv2d),)
default_cfgs = generate_default_cfgs(
    {
        "tic_tiny": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": (7, 7),
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": False,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "stem.0",
            "classifier": "head",
        }
    }
)


@register_model
def tic_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """The reconstruction: 40 to 320 channels, 10 blocks, windows of 3 x 3."""
    indices = kwargs.pop("out_indices", (0, 1, 2, 3))
    return build_model_with_cfg(
        TiCNet,
        "tic_tiny",
        pretrained,
        feature_cfg={"out_indices": indices, "feature_cls": "getter"},
        **kwargs,
    )
