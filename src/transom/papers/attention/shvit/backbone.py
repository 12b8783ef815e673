"""The network around single-head attention, registered with timm."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any, ClassVar

import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import SqueezeExcite, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import Staged, one_a_stage
from transom.ops import token_norm
from transom.papers.attention.shvit.attention import SHSA, ConvBN, affine


class Residual(nn.Module):
    """x + m(x)."""

    def __init__(self, m: nn.Module) -> None:
        super().__init__()
        self.m = m

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.m(x)
        return y

    @torch.no_grad()
    def fuse(self) -> nn.Module:
        """One convolution if m is a depthwise one with batch norm; else this."""
        if not isinstance(self.m, ConvBN) or self.m.c.groups != self.m.c.in_channels:
            return self
        fused = self.m.fuse()
        height, width = fused.kernel_size
        fused.weight[:, :, height // 2, width // 2] += 1  # the identity
        return fused


class BNLinear(nn.Module):
    """Batch norm of features (B, C), then a linear layer."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(dim)
        self.l = nn.Linear(dim, out)
        trunc_normal_(self.l.weight, std=0.02)
        nn.init.zeros_(self.l.bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.l(self.bn(x))
        return y

    @torch.no_grad()
    def fuse(self) -> nn.Linear:
        """One linear layer that does the same as this does at inference."""
        weight, bias = token_norm.into_next(self.l.weight, self.l.bias, *affine(self.bn))
        out, dim = weight.shape
        fused = nn.Linear(dim, out, device=weight.device, dtype=weight.dtype)
        fused.weight.copy_(weight)
        fused.bias.copy_(bias)
        return fused.train(self.training)


class FFN(nn.Module):
    """Two 1x1 convolutions with batch norm and ReLU in between."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.pw1 = ConvBN(dim, hidden)
        self.act = nn.ReLU()
        self.pw2 = ConvBN(hidden, dim, scale=0.0)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.pw2(self.act(self.pw1(x)))
        return y


class BasicBlock(nn.Module):
    """Depthwise convolution, single-head attention in blocks of type "s", FFN; all residual."""

    def __init__(self, dim: int, qk_dim: int, partial_dim: int, type: str) -> None:
        super().__init__()
        if type not in ("i", "s"):
            raise SettingsError(
                f"the type of a block is {type!r}; expected 's' (with attention) or 'i' (without)"
            )
        self.conv = Residual(ConvBN(dim, dim, 3, groups=dim, scale=0.0))
        self.mixer = Residual(SHSA(dim, qk_dim, partial_dim)) if type == "s" else nn.Identity()
        self.ffn = Residual(FFN(dim, 2 * dim))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, h, w)."""
        y: Tensor = self.ffn(self.mixer(self.conv(x)))
        return y


class PatchMerging(nn.Module):
    """Half the map: inverted bottleneck with stride 2 and squeeze-and-excitation."""

    def __init__(self, dim: int, out_dim: int, se_ratio: float = 0.25) -> None:
        super().__init__()
        hidden = 4 * dim
        self.conv1 = ConvBN(dim, hidden)
        self.act = nn.ReLU()
        self.conv2 = ConvBN(hidden, hidden, 3, 2, groups=hidden)
        self.se = SqueezeExcite(hidden, se_ratio)
        self.conv3 = ConvBN(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, out, ceil(h / 2), ceil(w / 2))."""
        y: Tensor = self.conv3(self.se(self.act(self.conv2(self.act(self.conv1(x))))))
        return y


def _around(dim: int) -> nn.Sequential:
    """What stands before and behind a merging."""
    return nn.Sequential(Residual(ConvBN(dim, dim, 3, groups=dim)), Residual(FFN(dim, 2 * dim)))


class SHViT(Staged):
    """SHViT.

    Args:
        in_chans, num_classes, global_pool, drop_rate: as everywhere in timm.
        embed_dim, partial_dim, qk_dim, depth: one a stage.
        types: "s" for stages with attention, "i" for stages without.
        distillation: adds a second classifier. In training mode a call then returns the logits of
            both, (B, K) each; in evaluation their mean.

    Raises:
        SettingsError: the settings of the stages do not fit each other.
    """

    formats: ClassVar[tuple[str, ...]] = ("NCHW",)

    head_dist: nn.Module | None

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        embed_dim: Sequence[int] = (128, 224, 320),
        partial_dim: Sequence[int] = (32, 48, 68),
        qk_dim: Sequence[int] = (16, 16, 16),
        depth: Sequence[int] = (2, 4, 5),
        types: Sequence[str] = ("i", "s", "s"),
        distillation: bool = False,
        drop_rate: float = 0.0,
    ) -> None:
        one_a_stage(
            3, embed_dim=embed_dim, partial_dim=partial_dim, qk_dim=qk_dim, depth=depth, types=types
        )
        info = [
            {"num_chs": dim, "reduction": 16 * 2**i, "module": f"blocks{i + 1}"}
            for i, dim in enumerate(embed_dim)
        ]
        super().__init__(num_classes, global_pool, info)
        self.in_chans = in_chans
        self.distillation = distillation

        stem = embed_dim[0]
        widths = (in_chans, stem // 8, stem // 4, stem // 2, stem)
        layers: list[nn.Module] = []
        for i in range(4):
            layers += [ConvBN(widths[i], widths[i + 1], 3, 2), nn.ReLU()]
        self.patch_embed = nn.Sequential(*layers[:-1])
        stages: list[nn.Sequential] = []
        for i, dim in enumerate(embed_dim):
            parts: list[nn.Module] = []
            if i:
                before = embed_dim[i - 1]
                parts = [_around(before), PatchMerging(before, dim), _around(dim)]
            parts += [BasicBlock(dim, qk_dim[i], partial_dim[i], types[i]) for _ in range(depth[i])]
            stages.append(nn.Sequential(*parts))
        self.blocks1, self.blocks2, self.blocks3 = stages
        self.head_drop = nn.Dropout(drop_rate)
        self.reset_classifier(num_classes)

    def check_pool(self, name: str, num_classes: int) -> None:
        super().check_pool(name, num_classes)
        if not name and num_classes > 0:
            raise SettingsError(
                f"global_pool is '' with {num_classes} classes; the classifier sees pooled "
                "features only, so expected 'avg', or 0 classes"
            )

    def heads(self) -> dict[str, nn.Module | None]:
        def head() -> nn.Module:
            if self.num_classes <= 0:
                return nn.Identity()
            return BNLinear(self.head_hidden_size, self.num_classes)

        return {"head": head(), "head_dist": head() if self.distillation else None}

    def trunk(
        self, x: Tensor, count: int, take: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        x = self.patch_embed(x)
        found = []
        own: Any = self
        for i, info in enumerate(self.feature_info[:count]):
            for block in getattr(own, info["module"]):
                x = self.run(block, x)
            if i in take:
                found.append(x)
        return x, found

    def cut(self, count: int) -> None:
        for info in self.feature_info[count:]:
            delattr(self, info["module"])

    def drop_head(self) -> None:
        """Without the head there is nothing to distil into either."""
        self.distillation = False
        super().drop_head()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stem, blocks and head."""
        blocks = r"^blocks(\d+)" if coarse else [(r"^blocks(\d+)\.(\d+)", None)]
        return {"stem": r"^patch_embed", "blocks": blocks}

    def get_classifier(self) -> Any:
        """The last linear layer, or both of them with distillation."""
        if self.head_dist is None:
            return getattr(self.head, "l", self.head)
        return getattr(self.head, "l", self.head), getattr(self.head_dist, "l", self.head_dist)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Logits (B, K) of the features (B, C, h, w), or what the classifier sees of them."""
        if self.global_pool == "avg":
            x = x.mean((2, 3))
        x = self.head_drop(x)
        if pre_logits or self.head_dist is None:
            return x if pre_logits else self.head(x)
        one, two = self.head(x), self.head_dist(x)
        return (one, two) if self.training else (one + two) / 2

    @torch.no_grad()
    def fuse(self) -> SHViT:
        """Fold every batch norm and every residual depthwise convolution, in place.

        What is computed at inference stays the same; the model can no longer be trained as
        published, and its parameters have other names.

        Returns:
            The same model.
        """
        _fuse(self)
        return self


def _fuse(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, ConvBN | Residual | BNLinear):
            child = child.fuse()
            setattr(module, name, child)
        _fuse(child)


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names of timm's own SHViT to the official ones, which are also ours.

    Args:
        state: with either names.

    Returns:
        With official names.
    """
    return {_official(name): value for name, value in state.items()}


def _official(name: str) -> str:
    found = re.match(r"stages\.(\d+)\.(blocks|downsample)\.(\d+)\.(.*)", name)
    if found is None:
        return name
    stage, place = int(found[1]), int(found[3])
    if found[2] == "blocks":
        where = str(place + 3 if stage else place)
    else:
        where = ("0.0", "0.1", "1", "2.0", "2.1")[place]
    return f"blocks{stage + 1}.{where}.{found[4]}"


def _cfg(size: int = 224, **changes: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, size, size),
        "pool_size": (4, 4),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.0.c",
        "classifier": "head.l",
        "license": "mit",
        "paper_name": "SHViT: Single-Head Vision Transformer with Memory Efficient Macro Design",
        "paper_ids": "arXiv:2401.16456",
        "origin_url": "https://github.com/ysj9909/SHViT",
        **changes,
    }


default_cfgs = generate_default_cfgs(
    {
        "shvit_s1_official.in1k": _cfg(hf_hub_id="timm/shvit_s1.in1k"),
        "shvit_s2_official.in1k": _cfg(hf_hub_id="timm/shvit_s2.in1k"),
        "shvit_s3_official.in1k": _cfg(hf_hub_id="timm/shvit_s3.in1k"),
        "shvit_s4_official.in1k": _cfg(256, hf_hub_id="timm/shvit_s4.in1k"),
    }
)


def _create(variant: str, pretrained: bool, **settings: Any) -> nn.Module:
    model: nn.Module = build_model_with_cfg(
        SHViT,
        variant,
        pretrained,
        pretrained_filter_fn=_published,
        feature_cfg={"out_indices": (0, 1, 2), "feature_cls": "getter"},
        **settings,
    )
    return model


def _published(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    return convert(state)


@register_model
def shvit_s1_official(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S1."""
    return _create("shvit_s1_official", pretrained, **kwargs)


@register_model
def shvit_s2_official(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S2."""
    settings = {"embed_dim": (128, 308, 448), "partial_dim": (32, 66, 96)}
    return _create("shvit_s2_official", pretrained, **{**settings, **kwargs})


@register_model
def shvit_s3_official(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S3."""
    settings = {
        "embed_dim": (192, 352, 448),
        "partial_dim": (48, 75, 96),
        "depth": (3, 5, 5),
    }
    return _create("shvit_s3_official", pretrained, **{**settings, **kwargs})


@register_model
def shvit_s4_official(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """SHViT-S4, for images of 256 pixels."""
    settings = {
        "embed_dim": (224, 336, 448),
        "partial_dim": (48, 72, 96),
        "depth": (4, 7, 6),
    }
    return _create("shvit_s4_official", pretrained, **{**settings, **kwargs})
