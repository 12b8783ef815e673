"""The four-stage network, registered with timm."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import Staged, fan_out, narrow, one_a_stage, rising
from transom.papers.attention.transnext.geometry import Geometry, Grid, Tables, stage_sizes
from transom.papers.attention.transnext.mixer import AggregatedAttention, ConvGLU, GlobalAttention


class PatchEmbed(nn.Module):
    """Overlapping convolution and LayerNorm: maps (B, C, H, W) to tokens (B, N, D)."""

    def __init__(self, channels: int, dim: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Grid]:
        x = self.proj(x)
        return self.norm(x.flatten(2).mT), (x.shape[2], x.shape[3])


class Block(nn.Module):
    """x + attention(norm1(x)), then x + glu(norm2(x)); a ratio of 1 makes attention global."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float,
        window: int | None,
        qkv_bias: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn: AggregatedAttention | GlobalAttention
        if window is None:
            self.attn = GlobalAttention(dim, heads, qkv_bias)
        else:
            self.attn = AggregatedAttention(dim, heads, window, qkv_bias)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = ConvGLU(dim, int(dim * mlp_ratio))
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()

    def forward(self, x: Tensor, grid: Grid, tables: Geometry) -> Tensor:
        """Tokens (B, N, C) on a grid."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid, tables))
        return x + self.drop_path(self.mlp(self.norm2(x), grid))


class TransNeXt(Staged):
    """TransNeXt.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: as everywhere in timm.
        img_size: that the size tables are made for; other sizes work and make their own.
        pretrain_size: image size the weights were trained at, which fixes the scale of the
            coordinates; img_size when None.
        patch_size: stride of the first convolution, whose kernel is 2 patch_size - 1.
        embed_dims, depths, num_heads, mlp_ratios: one a stage.
        sr_ratios: positions pooled into one key along each axis; 1 makes a stage global.
        window_size: positions of the local window, one a stage, not read in a global one.
        fixed_pool_size: side of the pooled grid whatever the image (the linear mode).
        qkv_bias: whether the projections to q, k and v have a bias.

    Raises:
        SettingsError: the settings of the stages do not fit each other, or the image is too small.
    """

    output_fmt = "NHWC"
    head: nn.Module

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        pretrain_size: int | tuple[int, int] | None = None,
        patch_size: int = 4,
        embed_dims: Sequence[int] = (48, 96, 192, 384),
        depths: Sequence[int] = (2, 2, 15, 2),
        num_heads: Sequence[int] = (2, 4, 8, 16),
        mlp_ratios: Sequence[float] = (8, 8, 4, 4),
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        window_size: Sequence[int | None] = (3, 3, 3, None),
        fixed_pool_size: int | None = None,
        qkv_bias: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        count = len(embed_dims)
        one_a_stage(
            count,
            depths=depths,
            num_heads=num_heads,
            mlp_ratios=mlp_ratios,
            sr_ratios=sr_ratios,
            window_size=window_size,
        )
        for dim, heads in zip(embed_dims, num_heads, strict=True):
            if dim % heads:
                raise SettingsError(
                    f"a stage of width {dim} has {heads} heads; expected heads that divide it"
                )
        info = [
            {"num_chs": dim, "reduction": patch_size * 2**i, "module": f"norm{i + 1}"}
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(num_classes, global_pool, info)
        self.in_chans = in_chans

        rates = rising(drop_path_rate, sum(depths))
        size: Grid = to_2tuple(img_size)
        self.patch_size = patch_size
        before: Grid = size if pretrain_size is None else to_2tuple(pretrain_size)
        trained = stage_sizes(before, patch_size, count)
        grids = stage_sizes(size, patch_size, count)
        for i, dim in enumerate(embed_dims):
            window = None if sr_ratios[i] == 1 else (window_size[i] or 3)
            tables = Tables(grids[i], sr_ratios[i], window, fixed_pool_size, trained[i])
            if i == 0:
                embed = PatchEmbed(in_chans, dim, 2 * patch_size - 1, patch_size)
            else:
                embed = PatchEmbed(embed_dims[i - 1], dim, 3, 2)
            blocks = [
                Block(dim, num_heads[i], mlp_ratios[i], window, qkv_bias, rates.pop(0))
                for _ in range(depths[i])
            ]
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"tables{i + 1}", tables)
            self.add_module(f"block{i + 1}", nn.ModuleList(blocks))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(dim, eps=1e-6))
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.apply(narrow)
        self.apply(fan_out)

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Keep the tables of this image size; the scale of the coordinates stays as trained."""
        stages = len(self.feature_info)
        for i, grid in enumerate(stage_sizes(to_2tuple(img_size), self.patch_size, stages)):
            tables: Any = getattr(self, f"tables{i + 1}")
            tables.resize(grid, tables.pair.device)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beside those of one dimension."""
        kinds = ("query_embedding", "relative_pos_bias_local", "cpb_fc", "temperature")
        return {n for n, _ in self.named_parameters() if any(kind in n for kind in kinds)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem, blocks and head."""
        fine = [
            (r"^block(\d+)\.(\d+)", None),
            (r"^patch_embed(\d+)", (0,)),
            (r"^norm(\d+)", (99999,)),
        ]
        return {
            "stem": r"^patch_embed1",
            "blocks": r"^(?:block|patch_embed|norm)(\d+)" if coarse else fine,
        }

    def trunk(
        self, x: Tensor, count: int, take: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        found = []
        own: Any = self
        for i in range(1, count + 1):
            y, grid = getattr(own, f"patch_embed{i}")(x)
            tables = getattr(own, f"tables{i}")(grid, y.device)
            for block in getattr(own, f"block{i}"):
                y = self.run(block, y, grid, tables)
            y = getattr(own, f"norm{i}")(y).unflatten(1, grid)
            if i - 1 in take:
                found.append(y)
            x = y.permute(0, 3, 1, 2)
        return y, found

    def cut(self, count: int) -> None:
        for i in range(count, len(self.feature_info)):
            for part in ("patch_embed", "tables", "block", "norm"):
                delattr(self, f"{part}{i + 1}")


def _cfg(size: int = 224, **changes: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (size // 32, size // 32),
        "crop_pct": 0.875 if size == 224 else 1.0,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed1.proj",
        "classifier": "head",
        "paper_name": "TransNeXt: Robust Foveal Visual Perception for Vision Transformers",
        "paper_ids": "arXiv:2311.17132",
        "origin_url": "https://github.com/DaiShiResearch/TransNeXt",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {
        "transnext_micro": _cfg(),
        "transnext_tiny": _cfg(),
        "transnext_small": _cfg(),
        "transnext_base": _cfg(),
        "transnext_small_384": _cfg(384),
        "transnext_base_384": _cfg(384),
        "transnext_micro_aaaa_256": _cfg(256),
    }
)


def _create(variant: str, pretrained: bool, **settings: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        TransNeXt,
        variant,
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **settings,
    )
    return model


_MICRO: dict[str, Any] = {}
_TINY: dict[str, Any] = {"embed_dims": (72, 144, 288, 576), "num_heads": (3, 6, 12, 24)}
_SMALL: dict[str, Any] = {**_TINY, "depths": (5, 5, 22, 5)}
_BASE: dict[str, Any] = {
    "embed_dims": (96, 192, 384, 768),
    "num_heads": (4, 8, 16, 32),
    "depths": (5, 5, 23, 5),
}
_LARGER = {"img_size": 384, "pretrain_size": 224}


@register_model
def transnext_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Micro."""
    return _create("transnext_micro", pretrained, **{**_MICRO, **kwargs})


@register_model
def transnext_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Tiny."""
    return _create("transnext_tiny", pretrained, **{**_TINY, **kwargs})


@register_model
def transnext_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Small."""
    return _create("transnext_small", pretrained, **{**_SMALL, **kwargs})


@register_model
def transnext_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Base."""
    return _create("transnext_base", pretrained, **{**_BASE, **kwargs})


@register_model
def transnext_small_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Small at 384 pixels, with coordinates on the scale of 224."""
    return _create("transnext_small_384", pretrained, **{**_SMALL, **_LARGER, **kwargs})


@register_model
def transnext_base_384(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Base at 384 pixels, with coordinates on the scale of 224."""
    return _create("transnext_base_384", pretrained, **{**_BASE, **_LARGER, **kwargs})


@register_model
def transnext_micro_aaaa_256(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """TransNeXt-Micro at 256 pixels with aggregated attention in every stage."""
    settings = {"img_size": 256, "sr_ratios": (16, 8, 4, 2), "window_size": (3, 3, 3, 3)}
    return _create("transnext_micro_aaaa_256", pretrained, **{**settings, **kwargs})
