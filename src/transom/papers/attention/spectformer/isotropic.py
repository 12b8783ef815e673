"""The isotropic SpectFormer: a plain transformer whose first blocks filter instead of attending."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any, Literal

import torch
from timm.layers import (
    Attention,
    DropPath,
    Mlp,
    PatchEmbed,
    resample_abs_pos_embed,
    trunc_normal_,
)
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import Isotropic, narrow, rising
from transom.papers.attention.spectformer.gate import Grid, SpectralGate, resized

norm_layer = partial(nn.LayerNorm, eps=1e-6)


class SpectralBlock(nn.Module):
    """x + mlp(norm2(filter(norm1(x)))): one residual around both."""

    def __init__(
        self,
        dim: int,
        grid: Grid,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.filter = SpectralGate(dim, grid)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        y = self.filter(self.norm1(x).unflatten(1, grid)).flatten(1, 2)
        return x + self.drop_path(self.mlp(self.norm2(y)))


class AttentionBlock(nn.Module):
    """The usual pre-norm block."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias=True, proj_drop=drop)
        self.norm2 = norm_layer(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, grid: Grid) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class IsotropicSpectFormer(Isotropic):
    """Patches, learned positions, spectral blocks, attention blocks, norm, mean, head.

    Attributes:
        num_features: width of the tokens.
        feature_info: of every block, for `features_only`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        embed_dim: int = 384,
        depth: int = 12,
        alpha: int = 4,
        num_heads: int = 6,
        mlp_ratio: float = 4.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        """Build the model with random weights.

        Args:
            img_size: height and width, in pixels, that positions and filters are made for.
            patch_size: side of a patch, in pixels.
            in_chans: channels of an image.
            num_classes: outputs; 0 gives the pooled features.
            global_pool: "avg" or "" for the tokens.
            embed_dim: width.
            depth: number of blocks.
            alpha: how many of them, from the first on, are spectral.
            num_heads: of the attention blocks.
            mlp_ratio: hidden width of the ffn divided by the width.
            drop_rate: dropout before the head.
            proj_drop_rate: dropout in ffn and attention.
            drop_path_rate: of the last block; grows linearly from 0.

        Raises:
            SettingsError: the heads do not divide the width, or alpha exceeds the depth.
        """
        if not 0 <= alpha <= depth:
            raise SettingsError(f"alpha is {alpha}; expected 0 to {depth}, the depth of the model")
        if embed_dim % num_heads:
            raise SettingsError(
                f"{num_heads} heads do not divide a width of {embed_dim}; choose num_heads or "
                "embed_dim so that they do"
            )
        info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        super().__init__(num_classes, global_pool, info)
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=False
        )
        grid = self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], embed_dim))
        rates = rising(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            SpectralBlock(embed_dim, grid, mlp_ratio, proj_drop_rate, rate)
            if i < alpha
            else AttentionBlock(embed_dim, num_heads, mlp_ratio, proj_drop_rate, rate)
            for i, rate in enumerate(rates)
        )
        self.norm: nn.Module = norm_layer(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(narrow)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Make positions and filters those of another image size, in pixels."""
        old = self.patch_embed.grid_size
        self.patch_embed.set_input_size(img_size)
        new = self.patch_embed.grid_size
        positions = resample_abs_pos_embed(self.pos_embed.detach(), new, old, 0)
        self.pos_embed = nn.Parameter(positions, requires_grad=self.pos_embed.requires_grad)
        for module in self.modules():
            if isinstance(module, SpectralGate):
                module.resize(new)

    def _embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        grid = self.patch_embed.dynamic_feat_size((x.shape[-2], x.shape[-1]))
        positions = resample_abs_pos_embed(self.pos_embed, grid, self.patch_embed.grid_size, 0)
        return self.patch_embed(x) + positions, grid

    def trunk(self, x: Tensor, count: int, take: Collection[int] = ()) -> tuple[Any, list[Any]]:
        x, grid = self._embed(x)
        found = []
        for i, block in enumerate(self.blocks[:count]):
            x = self.run(block, x, grid)
            if i in take:
                found.append((x, grid))
        return (x, grid), found


def fitted_state(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A state dict with positions and filters of another image size, for this model's size.

    Square grids are assumed for what is stored; the official models are made of nothing else.
    """
    state = state.get("model", state)  # type: ignore[assignment]
    gates = {n: m for n, m in model.named_modules() if isinstance(m, SpectralGate)}
    out = dict(state)
    for name, gate in gates.items():
        key = f"{name}.complex_weight"
        if key in out and out[key].shape != gate.complex_weight.shape:
            side = out[key].shape[0]
            out[key] = resized(out[key], (side, side), gate.grid)
    own = getattr(model, "pos_embed", None)
    if own is not None and "pos_embed" in out and out["pos_embed"].shape != own.shape:
        grid = model.get_submodule("patch_embed").grid_size
        out["pos_embed"] = resample_abs_pos_embed(out["pos_embed"], grid, None, 0)
    return out
