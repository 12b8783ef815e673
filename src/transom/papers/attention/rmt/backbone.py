"""The hierarchical network around Manhattan self-attention, registered with timm."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from transom.networks import Staged, classifier, narrow, one_a_stage, rising
from transom.papers.attention.rmt.attention import DWConv2d, Form, MaSA, RelPos, Tables

Box = tuple[int, int, int, int]

# Positions of the stem's map along one position of the last stage's.
_BOX_GRID = 8


class FFN(nn.Module):
    """fc2(u + DW3x3(u)) with u = GELU(fc1(x)), on maps (B, h, w, C)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.dwconv = DWConv2d(hidden, 3)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        u = self.act(self.fc1(x))
        y: Tensor = self.fc2(u + self.dwconv(u))
        return y


class RetBlock(nn.Module):
    """Position from a depthwise convolution, Manhattan self-attention, FFN; all residual."""

    def __init__(
        self, dim: int, heads: int, hidden: int, drop_path: float, layer_scale: float | None
    ) -> None:
        super().__init__()
        self.pos = DWConv2d(dim, 3)
        self.retention_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.retention = MaSA(dim, heads)
        self.final_layer_norm = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = FFN(dim, hidden)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.gamma_1 = self.gamma_2 = None
        if layer_scale is not None:
            self.gamma_1 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale))
            self.gamma_2 = nn.Parameter(torch.full((1, 1, 1, dim), layer_scale))

    def forward(self, x: Tensor, tables: Tables) -> Tensor:
        """x: (B, h, w, C)."""
        x = x + self.pos(x)
        y = self.retention(self.retention_layer_norm(x), tables)
        x = x + self.drop_path(y if self.gamma_1 is None else self.gamma_1 * y)
        y = self.ffn(self.final_layer_norm(x))
        return x + self.drop_path(y if self.gamma_2 is None else self.gamma_2 * y)


class Downsample(nn.Module):
    """Half the map: 3x3 convolution with stride 2, then batch norm; channels last."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.reduction = nn.Conv2d(dim, out, 3, 2, 1)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(self.reduction(x.permute(0, 3, 1, 2)))
        return y.permute(0, 2, 3, 1)


class Stage(nn.Module):
    """Blocks that share their tables; the backbone runs them."""

    def __init__(self, relpos: RelPos, blocks: Sequence[RetBlock], form: Form) -> None:
        super().__init__()
        self.Relpos = relpos
        self.blocks = nn.ModuleList(blocks)
        self.downsample: nn.Module = nn.Identity()
        self.form = form


class Stem(nn.Module):
    """Images (B, 3, H, W) to maps (B, ceil(H / 4), ceil(W / 4), C) by four convolutions."""

    def __init__(self, channels: int, dim: int) -> None:
        super().__init__()
        widths = (channels, dim // 2, dim // 2, dim, dim)
        layers: list[nn.Module] = []
        for i, stride in enumerate((2, 1, 2, 1)):
            layers += [nn.Conv2d(widths[i], widths[i + 1], 3, stride, 1)]
            layers += [nn.BatchNorm2d(widths[i + 1]), nn.GELU()]
        self.proj = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x)
        return y.permute(0, 2, 3, 1)


class VisRetNet(Staged):
    """RMT.

    Args:
        in_chans, num_classes, global_pool, drop_rate, drop_path_rate: as everywhere in timm.
        embed_dims, depths, num_heads, init_values, heads_ranges, mlp_ratios: one a stage; a and r
            of the decay are init_values and heads_ranges.
        decomposed: stages whose attention works along rows, then columns.
        layerscales: stages whose residuals are scaled by a learned factor.
        layer_init_values: what that factor begins with.
        projection: width between the last stage and the classifier.
        token_label: adds the classifier of single positions that token labelling trains. In
            training mode a call then returns (logits (B, K), logits of positions (B, N, K), box);
            in evaluation half the highest logit over positions joins the logits.

    Raises:
        SettingsError: the settings of the stages do not fit each other.
    """

    output_fmt = "NHWC"
    layers: Any  # nn.ModuleList of Stage
    aux_head: nn.Module | None

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        num_heads: Sequence[int] = (4, 4, 8, 16),
        init_values: Sequence[float] = (2, 2, 2, 2),
        heads_ranges: Sequence[float] = (4, 4, 6, 6),
        mlp_ratios: Sequence[float] = (3, 3, 3, 3),
        decomposed: Sequence[bool] = (True, True, False, False),
        layerscales: Sequence[bool] = (False, False, False, False),
        layer_init_values: float = 1e-6,
        projection: int = 1024,
        token_label: bool = False,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        count = len(embed_dims)
        one_a_stage(
            count,
            depths=depths,
            num_heads=num_heads,
            init_values=init_values,
            heads_ranges=heads_ranges,
            mlp_ratios=mlp_ratios,
            decomposed=decomposed,
            layerscales=layerscales,
        )
        info = [
            {"num_chs": dim, "reduction": 4 * 2**i, "module": f"layers.{i}"}
            for i, dim in enumerate(embed_dims)
        ]
        super().__init__(num_classes, global_pool, info)
        self.in_chans = in_chans
        self.token_label = token_label
        self.head_hidden_size = projection

        self.patch_embed = Stem(in_chans, embed_dims[0])
        rates = rising(drop_path_rate, sum(depths))
        self.layers = nn.ModuleList()
        for i, dim in enumerate(embed_dims):
            hidden = int(dim * mlp_ratios[i])
            scale = layer_init_values if layerscales[i] else None
            drops = [rates.pop(0) for _ in range(depths[i])]
            stage = Stage(
                RelPos(dim, num_heads[i], init_values[i], heads_ranges[i]),
                [RetBlock(dim, num_heads[i], hidden, drop, scale) for drop in drops],
                "decomposed" if decomposed[i] else "full",
            )
            if i + 1 < count:
                stage.downsample = Downsample(dim, embed_dims[i + 1])
            self.layers.append(stage)
        self.proj: nn.Module = nn.Linear(self.num_features, projection)
        self.norm: nn.Module = nn.BatchNorm2d(projection)
        self.swish: nn.Module = nn.SiLU()
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)
        self.apply(narrow)

    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay beside those of one dimension."""
        return {n for n, _ in self.named_parameters() if n.endswith(("gamma_1", "gamma_2"))}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem, blocks and head."""
        fine = [
            (r"^layers\.(\d+)\.blocks\.(\d+)", None),
            (r"^layers\.(\d+)\.downsample", (99,)),
            (r"^proj|^norm", (99999,)),
        ]
        return {"stem": r"^patch_embed", "blocks": r"^layers\.(\d+)" if coarse else fine}

    def heads(self) -> dict[str, nn.Module | None]:
        aux = classifier(self.num_features, self.num_classes) if self.token_label else None
        return {**super().heads(), "aux_head": aux}

    def trunk(
        self, x: Tensor, count: int, take: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        return self._stages(self.patch_embed(x), count, take)

    def _stages(
        self, x: Tensor, count: int, take: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        found = []
        for i, stage in enumerate(self.layers[:count]):
            tables = stage.Relpos(x.shape[1], x.shape[2], stage.form)
            for block in stage.blocks:
                x = self.run(block, x, tables)
            if i in take:
                found.append(x)
            if i + 1 < count:
                x = stage.downsample(x)
        return x, found

    def cut(self, count: int) -> None:
        self.layers = self.layers[:count]
        self.layers[-1].downsample = nn.Identity()

    def drop_norm(self) -> None:
        """The stages end without a norm."""

    def drop_head(self) -> None:
        """The projection belongs to the classifier and to the width of the last stage."""
        self.proj, self.norm, self.swish = nn.Identity(), nn.Identity(), nn.Identity()
        self.token_label = False
        super().drop_head()

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) of the features (B, h, w, C), or what the classifier sees of them."""
        y = self.norm(self.proj(x).permute(0, 3, 1, 2))
        y = self.swish(y)
        y = y.mean((2, 3)) if self.global_pool == "avg" else y.permute(0, 2, 3, 1)
        y = self.head_drop(y)
        if pre_logits:
            return y
        y = self.head(y)
        if self.aux_head is None or self.num_classes <= 0 or self.training:
            return y
        best = self.aux_head(x).amax((1, 2))
        return y + 0.5 * (best if self.global_pool == "avg" else best[:, None, None])

    def forward(self, x: Tensor) -> Any:
        if self.aux_head is None or self.num_classes <= 0 or not self.training:
            return self.forward_head(self.forward_features(x))
        x = self.patch_embed(x)
        box = mixing_box(x.shape[1] // _BOX_GRID, x.shape[2] // _BOX_GRID)
        x, _ = self._stages(exchanged(x, box, _BOX_GRID), len(self.layers))
        aux = exchanged(self.aux_head(x), box)
        return self.forward_head(x), aux.flatten(1, 2), box


def mixing_box(height: int, width: int) -> Box:
    """A random rectangle (top, left, bottom, right) of a grid, its area uniform in the grid's.

    The numbers are drawn from torch's own generator.
    """
    area, row, column = torch.rand(3, device="cpu").tolist()
    sides = math.sqrt(area) * height, math.sqrt(area) * width
    centre = int(row * height), int(column * width)
    (top, bottom), (left, right) = (
        (max(c - int(s) // 2, 0), min(c + int(s) // 2, end))
        for c, s, end in zip(centre, sides, (height, width), strict=True)
    )
    return top, left, bottom, right


def exchanged(x: Tensor, box: Box, grid: int = 1) -> Tensor:
    """Maps (B, h, w, C) in which the box holds that of the item at the other end of the batch.

    Doing it twice gives x back.

    Args:
        x: maps.
        box: (top, left, bottom, right) in units of `grid` positions.
        grid: positions of x along one of the box.
    """
    top, left, bottom, right = (grid * side for side in box)
    rows = torch.arange(x.shape[1], device=x.device)[:, None]
    columns = torch.arange(x.shape[2], device=x.device)
    inside = (rows >= top) & (rows < bottom) & (columns >= left) & (columns < right)
    return torch.where(inside[:, :, None], x.flip(0), x)


def _cfg(**changes: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj.0",
        "classifier": "head",
        "paper_name": "RMT: Retentive Networks Meet Vision Transformers",
        "paper_ids": "arXiv:2309.11523",
        "origin_url": "https://github.com/qhfan/RMT",
        **changes,
    }


_SIZES: dict[str, dict[str, Any]] = {
    "tiny": {},
    "small": {
        "depths": (3, 4, 18, 4),
        "mlp_ratios": (4, 4, 3, 3),
        "decomposed": (True, True, True, False),
    },
    "base": {
        "embed_dims": (80, 160, 320, 512),
        "depths": (4, 8, 25, 8),
        "num_heads": (5, 5, 10, 16),
        "heads_ranges": (5, 5, 6, 6),
        "mlp_ratios": (4, 4, 3, 3),
        "decomposed": (True, True, True, False),
        "layerscales": (False, False, True, True),
    },
    "large": {
        "embed_dims": (112, 224, 448, 640),
        "depths": (4, 8, 25, 8),
        "num_heads": (7, 7, 14, 20),
        "heads_ranges": (6, 6, 6, 6),
        "mlp_ratios": (4, 4, 3, 3),
        "decomposed": (True, True, True, False),
        "layerscales": (False, False, True, True),
    },
}
_LABELLED = ("small", "base", "large")

default_cfgs = generate_default_cfgs(
    {
        **{f"rmt_{size}": _cfg() for size in _SIZES},
        **{f"rmt_{size}_token_label": _cfg(classifier=("head", "aux_head")) for size in _LABELLED},
    }
)


def _create(size: str, pretrained: bool, settings: dict[str, Any], suffix: str = "") -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        VisRetNet,
        f"rmt_{size}{suffix}",
        pretrained,
        feature_cfg={"out_indices": (0, 1, 2, 3), "feature_cls": "getter"},
        **{**_SIZES[size], **settings},
    )
    return model


def _labelled(size: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    return _create(size, pretrained, {"token_label": True, **settings}, "_token_label")


@register_model
def rmt_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RMT-T: full attention from stage 3 on (RMT_T3 in the official code)."""
    return _create("tiny", pretrained, kwargs)


@register_model
def rmt_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RMT-S."""
    return _create("small", pretrained, kwargs)


@register_model
def rmt_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RMT-B (RMT_M2 in the official code)."""
    return _create("base", pretrained, kwargs)


@register_model
def rmt_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RMT-L (RMT_L6 in the official code)."""
    return _create("large", pretrained, kwargs)


@register_model
def rmt_small_token_label(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RMT-S*, with the classifier of single positions."""
    return _labelled("small", pretrained, kwargs)


@register_model
def rmt_base_token_label(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RMT-B*, with the classifier of single positions."""
    return _labelled("base", pretrained, kwargs)


@register_model
def rmt_large_token_label(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """RMT-L*, with the classifier of single positions."""
    return _labelled("large", pretrained, kwargs)
