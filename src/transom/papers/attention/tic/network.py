"""A network of MSA-Conv blocks: a reconstruction, as the paper's own is not released."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, Literal

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, trunc_normal_
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.papers.attention.tic.operator import MSAConv2d


class Block(nn.Module):
    """x + msa_conv(norm(x)), then half of it and half of its 3 x 3 means."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        kernel_size: int,
        *,
        shift: bool,
        inter_pool: bool,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm2d(dim)
        self.msa_conv = MSAConv2d(
            dim,
            dim,
            kernel_size,
            padding=kernel_size // 2,
            dropout=0.0,
            num_heads=num_heads,
            shift=shift,
        )
        self.drop_path = DropPath(drop_path)
        self.inter_pool = inter_pool

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.msa_conv(self.norm(x)))
        if not self.inter_pool:
            return x
        return (x + F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)) / 2


class Stage(nn.Module):
    """Half of height and width but in the first stage, then blocks."""

    def __init__(self, dim: int, out: int, blocks: list[Block]) -> None:
        super().__init__()
        halves = nn.Sequential(LayerNorm2d(dim), nn.Conv2d(dim, out, 3, 2, 1))
        self.downsample = nn.Identity() if dim == out else halves
        self.blocks = nn.Sequential(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.downsample(x)
        for block in self.blocks:
            run: Callable[..., Tensor] = block
            x = checkpoint(block, x) if self.grad_checkpointing else run(x)
        return x


class TiCNet(nn.Module):
    """Stem of stride 4, four stages, norm, mean, head; images of any size.

    Attributes:
        num_features: channels of the last stage.
        feature_info: of every stage, for `features_only`.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: Literal["avg", ""] = "avg",
        embed_dims: tuple[int, ...] = (40, 80, 160, 320),
        depths: tuple[int, ...] = (2, 2, 4, 2),
        num_heads: tuple[int, ...] = (5, 5, 10, 10),
        kernel_size: int = 3,
        shift: bool = True,
        inter_pool: bool = True,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        """Build the model with random weights.

        Args:
            in_chans: channels of an image.
            num_classes: outputs; 0 gives the pooled features.
            global_pool: "avg" or "" for the map.
            embed_dims: channels of each stage, growing.
            depths: blocks of each stage.
            num_heads: of each stage.
            kernel_size: odd side of the windows.
            shift: multi-directional cyclic shift.
            inter_pool: averaging between the blocks of a stage.
            drop_rate: dropout before the head.
            drop_path_rate: of the last block; grows linearly from 0.

        Raises:
            SettingsError: sequences differ in length, or widths do not grow.
        """
        super().__init__()
        if not len(embed_dims) == len(depths) == len(num_heads):
            raise SettingsError(
                f"embed_dims, depths and num_heads have {len(embed_dims)}, {len(depths)} and "
                f"{len(num_heads)} numbers; expected one for each stage"
            )
        if any(b <= a for a, b in pairwise(embed_dims)):
            raise SettingsError(f"embed_dims is {embed_dims!r}; expected numbers that grow")
        self.num_classes = num_classes
        self.global_pool = global_pool
        self.num_features = self.head_hidden_size = embed_dims[-1]
        stem = embed_dims[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem // 2, 3, 2, 1),
            LayerNorm2d(stem // 2),
            nn.ReLU(),
            nn.Conv2d(stem // 2, stem, 3, 2, 1),
        )
        total = sum(depths)
        rates = iter([drop_path_rate * i / max(total - 1, 1) for i in range(total)])
        stages = []
        for k, (dim, depth, heads) in enumerate(zip(embed_dims, depths, num_heads, strict=True)):
            blocks = [
                Block(
                    dim,
                    heads,
                    kernel_size,
                    shift=shift,
                    inter_pool=inter_pool and i < depth - 1,
                    drop_path=next(rates),
                )
                for i in range(depth)
            ]
            stages.append(Stage(embed_dims[max(k - 1, 0)], dim, blocks))
        self.stages = nn.Sequential(*stages)
        self.norm: nn.Module = LayerNorm2d(self.num_features)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = _classifier(self.num_features, num_classes)
        self.feature_info = [
            {"num_chs": dim, "reduction": 4 * 2**k, "module": f"stages.{k}"}
            for k, dim in enumerate(embed_dims)
        ]
        self.apply(_init_weights)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stages (coarse) or blocks."""
        norm = (r"^norm", (99999,))
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), norm]}
        halves = (r"^stages\.(\d+)\.downsample", (-1,))
        each = (r"^stages\.(\d+)\.blocks\.(\d+)", None)
        return {"stem": r"^stem", "blocks": [halves, each, norm]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory in training."""
        for stage in self.stages.children():
            assert isinstance(stage, Stage)
            stage.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module:
        """The head."""
        return self.head

    def reset_classifier(
        self, num_classes: int, global_pool: Literal["avg", ""] | None = None
    ) -> None:
        """Give the model a new head."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        like = next(self.parameters())
        self.head = _classifier(self.num_features, num_classes).to(like)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW"] = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Maps behind chosen stages.

        Args:
            x: (B, 3, H, W) images.
            indices: the last so many stages, or which; None for all.
            norm: put the final norm over the map of the last stage.
            stop_early: do not run the stages behind the last chosen one.
            output_fmt: maps (B, D, h, w); there is no other.
            intermediates_only: leave the final features away.

        Returns:
            The final features, or the map where it stopped, and the list; or the list.

        Raises:
            SettingsError: another output format is asked for.
        """
        if output_fmt != "NCHW":
            raise SettingsError(f"output_fmt is {output_fmt!r}; this model has maps, 'NCHW'")
        chosen, last = feature_take_indices(len(self.stages), indices)
        final = len(self.feature_info) - 1
        found, x = [], self.stem(x)
        for k, stage in enumerate(self.stages):
            if stop_early and k > last:
                break
            x = stage(x)
            y = self.norm(x) if k == final else x
            if k in chosen:
                found.append(y if norm else x)
        return found if intermediates_only else (y, found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove what maps behind chosen stages do not need; returns their indices."""
        chosen, last = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: last + 1]
        if prune_norm or last + 1 < len(self.feature_info):
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return chosen

    def forward_features(self, x: Tensor) -> Tensor:
        """The map (B, D, h, w) behind the final norm."""
        return self.norm(self.stages(self.stem(x)))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, K) from the map, or pooled features (B, D)."""
        if self.global_pool == "":
            return x
        x = self.head_drop(x.mean((2, 3)))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K) of images (B, 3, H, W)."""
        return self.forward_head(self.forward_features(x))


def _classifier(width: int, classes: int) -> nn.Module:
    return nn.Linear(width, classes) if classes else nn.Identity()


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        fan_out = module.weight.shape[0] * module.weight[0, 0].numel()
        nn.init.normal_(module.weight, std=math.sqrt(2 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
