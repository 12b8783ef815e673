"""The network around reversed attention, registered with timm."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from timm.layers import DropPath, LayerScale, Mlp, PatchEmbed, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from transom.networks import Isotropic, narrow
from transom.ops import rows
from transom.papers.tokens.dependency_vit.attention import ReversedAttention
from transom.papers.tokens.dependency_vit.pruning import kept, loudest, schedule

Norm = partial(nn.LayerNorm, eps=1e-6)


class Flow(NamedTuple):
    """What travels between the blocks.

    x: (B, N, D) tokens that are left.
    m: (B, N) how much each still says; None before the first block, where it is 1.
    place: (B, N) where each stands in the original sequence; None while all are there.
    """

    x: Tensor
    m: Tensor | None = None
    place: Tensor | None = None


class Block(nn.Module):
    """Reversed attention, perhaps pruning, ffn.

    Args:
        dim: channels D.
        heads: of the attention.
        mlp_ratio: hidden width of the ffn divided by D.
        keep: part of the tokens that stays behind the attention; None prunes nothing.
        qkv_bias: whether the projections to q, k and v have one.
        temperature: of the head selector.
        init_values: of the layer scales.
        drop: dropout in the ffn.
        drop_path: probability of leaving out a branch.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        keep: float | None = None,
        qkv_bias: bool = False,
        temperature: float = 0.1,
        init_values: float = 1e-6,
        drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.keep = keep
        self.norm1 = Norm(dim)
        self.attn = ReversedAttention(dim, heads, qkv_bias, temperature)
        self.ls1 = LayerScale(dim, init_values)
        self.norm2 = Norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), drop=drop)
        self.ls2 = LayerScale(dim, init_values)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, flow: Flow) -> Flow:
        """One layer."""
        x, m, place = flow
        y, m = self.attn(self.norm1(x), m)
        x = x + self.drop_path(self.ls1(y))
        if self.keep is not None and (left := kept(x.shape[1], self.keep)) < x.shape[1]:
            stay = loudest(m, left)
            place = stay if place is None else place.gather(1, stay)
            x, m = rows.take(x, stay), m.gather(1, stay)
        return Flow(x + self.drop_path(self.ls2(self.mlp(self.norm2(x)))), m, place)


class DependencyViT(Isotropic):
    """A ViT without class token whose tokens send to their parents.

    Attributes:
        num_features: width D.
        feature_info: of every block, for `features_only`.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        embed_dim: int = 192,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = False,
        head_selector_temperature: float = 0.1,
        init_values: float = 1e-6,
        prune_layers: Sequence[int] = (),
        prune_ratio: float = 0.0,
        drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        """Build the model with random weights.

        Args:
            img_size: height and width in pixels.
            patch_size: side of a patch in pixels.
            in_chans: channels of an image.
            num_classes: outputs; 0 gives pooled features.
            global_pool: "avg", or "" for all tokens.
            embed_dim: width D.
            depth: number of blocks.
            num_heads: of each block.
            mlp_ratio: hidden width of the ffn divided by D.
            qkv_bias: whether the projections to q, k and v have one.
            head_selector_temperature: of the softmax over heads.
            init_values: of the layer scales.
            prune_layers: layers, counted from 1, behind whose attention tokens go.
            prune_ratio: part of the original tokens that each of them removes.
            drop_rate: dropout before the head.
            proj_drop_rate: dropout in the ffn.
            drop_path_rate: of the last block; grows linearly from 0.

        Raises:
            SettingsError: a setting is out of range.
        """
        info = [
            {"num_chs": embed_dim, "reduction": patch_size, "module": f"blocks.{i}"}
            for i in range(depth)
        ]
        super().__init__(num_classes, global_pool, info)
        shares = schedule(prune_layers, prune_ratio, depth)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.patch_embed.num_patches, embed_dim))
        self.blocks = nn.ModuleList(
            Block(
                embed_dim,
                num_heads,
                mlp_ratio,
                shares.get(i),
                qkv_bias,
                head_selector_temperature,
                init_values,
                proj_drop_rate,
                drop_path_rate * i / max(1, depth - 1),
            )
            for i in range(depth)
        )
        self.norm: nn.Module = Norm(embed_dim)
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        trunc_normal_(self.pos_embed, std=0.02)
        self.apply(narrow)

    def embed(self, x: Tensor) -> Flow:
        """Tokens of images (B, 3, H, W), as they enter the first block."""
        return Flow(self.patch_embed(x) + self.pos_embed)

    def final(self, x: Flow) -> Tensor:
        """Tokens (B, N, D) that are left, normed, each times what it still says."""
        y: Tensor = self.norm(x.x)
        return y if x.m is None else y * x.m[..., None]

    def trunk(self, x: Tensor, count: int, take: Collection[int] = ()) -> tuple[Any, list[Any]]:
        """As everywhere; in the features of a unit a pruned token keeps those it left with."""
        flow, found = self.embed(x), []
        full = flow.x
        for i, block in enumerate(self.blocks[:count]):
            flow = self.run(block, flow)
            if take:
                full = _restored(full, flow)
            if i in take:
                found.append((full, self.patch_embed.grid_size))
        return flow, found


def _restored(full: Tensor, flow: Flow) -> Tensor:
    if flow.place is None:
        return flow.x
    return full.scatter(1, flow.place[..., None].expand_as(flow.x), flow.x)


def _cfg() -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "origin_url": "https://github.com/dingmyu/DependencyViT",
    }


TINY: dict[str, Any] = {"embed_dim": 192, "depth": 12, "num_heads": 12}
SMALL: dict[str, Any] = {"embed_dim": 384, "depth": 12, "num_heads": 12}
LITE: dict[str, Any] = {"prune_layers": (2, 5, 8, 11), "prune_ratio": 0.16}

default_cfgs = generate_default_cfgs(
    {
        "dependencyvit_tiny_patch16_224": _cfg(),
        "dependencyvit_small_patch16_224": _cfg(),
        "dependencyvit_lite_tiny_patch16_224": _cfg(),
    }
)


def _create(name: str, pretrained: bool, own: dict[str, Any], settings: dict[str, Any]) -> Any:
    return build_model_with_cfg(
        DependencyViT,
        name,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        **{**own, **settings},
    )


@register_model
def dependencyvit_tiny_patch16_224(pretrained: bool = False, **settings: Any) -> Any:
    """DependencyViT-T."""
    return _create("dependencyvit_tiny_patch16_224", pretrained, TINY, settings)


@register_model
def dependencyvit_small_patch16_224(pretrained: bool = False, **settings: Any) -> Any:
    """DependencyViT-S."""
    return _create("dependencyvit_small_patch16_224", pretrained, SMALL, settings)


@register_model
def dependencyvit_lite_tiny_patch16_224(pretrained: bool = False, **settings: Any) -> Any:
    """DependencyViT-Lite-T."""
    return _create("dependencyvit_lite_tiny_patch16_224", pretrained, TINY | LITE, settings)
