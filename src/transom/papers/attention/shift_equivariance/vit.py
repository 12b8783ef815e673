"""The anchored patch embedding, positions as a circular convolution, and the ViT made of them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from transom.errors import TokensError
from transom.papers.attention.shift_equivariance.polyphase import anchor


class AnchoredPatchEmbed(PatchEmbed):
    """timm's patch embedding of the anchored image, then LayerNorm (eps 1e-5)."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("norm_layer", partial(nn.LayerNorm, eps=1e-5))
        super().__init__(*args, **kwargs)

    def forward(self, x: Tensor) -> Tensor:
        """Pixels (B, C, H, W) -> tokens (B, N, D), or (B, h, w, D) as timm lays them out."""
        return super().forward(anchor(x, self.patch_size))


class CircularPosition(nn.Module):
    """Depth-wise 3 x 3 convolution around the borders, plus the identity at stride 1.

    Args:
        width: D.
        stride: of the convolution; any other than 1 drops the identity.
    """

    def __init__(self, width: int, stride: int = 1) -> None:
        super().__init__()
        self.proj = nn.Conv2d(
            width, width, 3, stride, padding=1, padding_mode="circular", groups=width
        )

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens (B, h·w, D), row by row -> tokens of the same or of the strided grid."""
        if grid[0] * grid[1] != x.shape[1]:
            raise TokensError(
                f"positions of a {grid[0]} x {grid[1]} grid got {x.shape[1]} tokens; expected "
                f"{grid[0] * grid[1]}"
            )
        map_ = x.mT.unflatten(2, grid)
        y = self.proj(map_)
        return (y + map_ if self.proj.stride == (1, 1) else y).flatten(2).mT


class PolyViT(VisionTransformer):
    """timm's ViT whose class token is the same for every circular shift of the image.

    Takes timm's arguments; there is no table of positions.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.update(embed_layer=AnchoredPatchEmbed, pos_embed="none")
        super().__init__(*args, **kwargs)
        self.pos_conv = CircularPosition(self.embed_dim)

    def _pos_embed(self, x: Tensor) -> Tensor:
        grid = self.patch_embed.grid_size
        if x.dim() == 4:
            grid, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        x = self.pos_conv(x, grid)
        front = [
            t.expand(x.shape[0], -1, -1) for t in (self.cls_token, self.reg_token) if t is not None
        ]
        return self.pos_drop(torch.cat([*front, x], 1))
