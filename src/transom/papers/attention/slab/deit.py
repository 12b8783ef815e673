"""DeiT with PRepBN, and with simplified linear attention (SLAB-DeiT)."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.layers import DropPath, Mlp, to_2tuple
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from transom.papers.attention.slab.attention import SimplifiedLinearAttention
from transom.papers.attention.slab.norm import PRepBN, progressive


def deit_norm(
    dim: int,
    total_step: int = 60_000,
    device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> PRepBN:
    """PRepBN as timm's VisionTransformer asks for a norm."""
    return progressive(dim, ln_eps=1e-6, total_step=total_step).to(device=device, dtype=dtype)


class SlabBlock(nn.Module):
    """Pre-norm block with simplified linear attention over the whole map."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        grid: tuple[int, int],
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        kernel_size: int = 5,
        norm_layer: Any = deit_norm,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **_: Any,
    ) -> None:
        """Build the block; arguments as timm gives them to its blocks, and the grid."""
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = SimplifiedLinearAttention(
            dim, grid, num_heads, qkv_bias, proj_drop, kernel_size
        )
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=proj_drop)
        self.to(device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) to tokens of the same shape."""
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class SlabDeiT(VisionTransformer):
    """DeiT without a class token whose attention is linear and whose norms fold away.

    Attributes:
        cls_token: in the official checkpoints, and used by nothing; it is not trained.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        kernel_size: int = 5,
        total_step: int = 60_000,
        **settings: Any,
    ) -> None:
        """Build the network.

        Args:
            img_size: pixels, one number or (H, W).
            patch_size: pixels of a patch.
            kernel_size: of the convolution in linear attention.
            total_step: training steps in which PRepBN becomes RepBN.
            **settings: as for timm's VisionTransformer.
        """
        size, patch = to_2tuple(img_size), to_2tuple(patch_size)
        grid = size[0] // patch[0], size[1] // patch[1]
        settings.setdefault("norm_layer", partial(deit_norm, total_step=total_step))
        block: Any = partial(SlabBlock, grid=grid, kernel_size=kernel_size)
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            class_token=False,
            block_fn=block,
            **{"global_pool": "avg", "fc_norm": False, **settings},
        )
        unused = torch.zeros(1, 1, self.embed_dim)
        del self.cls_token
        self.cls_token = nn.Parameter(unused, requires_grad=False)

    def _pos_embed(self, x: Tensor) -> Tensor:
        assert self.pos_embed is not None
        out: Tensor = self.pos_drop(x + self.pos_embed)
        return out

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Take images of another size from now on; tables of positions are interpolated."""
        super().set_input_size(img_size, patch_size)
        blocks: Any = self.blocks
        for block in blocks:
            block.attn.set_window(tuple(self.patch_embed.grid_size))

    def no_weight_decay(self) -> set[str]:
        """Position tables."""
        tables = {n for n, _ in self.named_parameters() if n.endswith("positional_encoding")}
        return super().no_weight_decay() | tables
