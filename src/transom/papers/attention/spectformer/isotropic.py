"""The isotropic SpectFormer: a plain transformer whose first blocks filter instead of attending."""

from __future__ import annotations

from collections.abc import Callable
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
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from transom.errors import SettingsError
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


class IsotropicSpectFormer(nn.Module):
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
        super().__init__()
        if not 0 <= alpha <= depth:
            raise SettingsError(f"alpha is {alpha}; expected 0 to {depth}, the depth of the model")
        if embed_dim % num_heads:
            raise SettingsError(
                f"{num_heads} heads do not divide a width of {embed_dim}; choose num_heads or "
                "embed_dim so that they do"
            )
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.grad_checkpointing = False
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, strict_img_size=False
        )
        grid = self.patch_embed.grid_size
        self.pos_embed = nn.Parameter(torch.zeros(1, grid[0] * grid[1], embed_dim))
        rates = drop_rates(drop_path_rate, depth)
        self.blocks = nn.ModuleList(
            SpectralBlock(embed_dim, grid, mlp_ratio, proj_drop_rate, rate)
            if i < alpha
            else AttentionBlock(embed_dim, num_heads, mlp_ratio, proj_drop_rate, rate)
            for i, rate in enumerate(rates)
        )
        self.norm: nn.Module = norm_layer(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = classifier(embed_dim, num_classes)
        self.feature_info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed."""
        return {"pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into layers."""
        return {
            "stem": r"^pos_embed|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: Literal["avg", ""] | None = None
    ) -> None:
        """Give the model a new head."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        self.head = classifier(self.embed_dim, num_classes).to(self.pos_embed)

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

    def _step(self, block: nn.Module, x: Tensor, grid: Grid) -> Tensor:
        run: Callable[..., Tensor] = block
        return checkpoint(block, x, grid) if self.grad_checkpointing else run(x, grid)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Features behind chosen blocks.

        Args:
            x: (B, 3, H, W) images.
            indices: the last so many blocks, or which; None for all.
            norm: put the final norm over them.
            stop_early: do not run the blocks behind the last chosen one.
            output_fmt: maps (B, D, h, w) or tokens (B, N, D).
            intermediates_only: leave the final features away.

        Returns:
            The final features (B, N, D) and the list, or the list.
        """
        chosen, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self._embed(x)
        found = []
        for i, block in enumerate(self.blocks):
            if stop_early and i > last:
                break
            x = self._step(block, x, grid)
            if i in chosen:
                y = self.norm(x) if norm else x
                found.append(y.mT.unflatten(-1, grid) if output_fmt == "NCHW" else y)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what features behind chosen blocks do not need; returns their indices."""
        chosen, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) behind the final norm."""
        x, grid = self._embed(x)
        for block in self.blocks:
            x = self._step(block, x, grid)
        return self.norm(x)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) from tokens, or pooled features (B, D)."""
        x = x.mean(1) if self.global_pool == "avg" else x
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))


def drop_rates(last: float, depth: int) -> list[float]:
    """Rates of stochastic depth that grow linearly from 0."""
    return [last * i / max(depth - 1, 1) for i in range(depth)]


def classifier(width: int, classes: int) -> nn.Module:
    """A head, or nothing for 0 classes."""
    return nn.Linear(width, classes) if classes else nn.Identity()


def init_weights(module: nn.Module) -> None:
    """Linear layers as in ViT; filters draw their own weights."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
