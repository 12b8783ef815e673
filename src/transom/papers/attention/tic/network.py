"""A network of MSA-Conv blocks: a reconstruction, as the paper's own is not released."""

from __future__ import annotations

from collections.abc import Collection
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import Staged, fan_out, narrow, one_a_stage, rising
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
    """Half of height and width but in the first stage, then blocks; the network runs both."""

    def __init__(self, dim: int, out: int, blocks: list[Block]) -> None:
        super().__init__()
        halves = nn.Sequential(LayerNorm2d(dim), nn.Conv2d(dim, out, 3, 2, 1))
        self.downsample = nn.Identity() if dim == out else halves
        self.blocks = nn.Sequential(*blocks)


class TiCNet(Staged):
    """Stem of stride 4, four stages, norm, mean, head; images of any size.

    Attributes:
        num_features: channels of the last stage.
        feature_info: of every stage, for `features_only`.
    """

    formats: ClassVar[tuple[str, ...]] = ("NCHW",)

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
        one_a_stage(len(embed_dims), depths=depths, num_heads=num_heads)
        if any(b <= a for a, b in pairwise(embed_dims)):
            raise SettingsError(f"embed_dims is {embed_dims!r}; expected numbers that grow")
        info = [
            {"num_chs": dim, "reduction": 4 * 2**k, "module": f"stages.{k}"}
            for k, dim in enumerate(embed_dims)
        ]
        super().__init__(num_classes, global_pool, info)
        stem = embed_dims[0]
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, stem // 2, 3, 2, 1),
            LayerNorm2d(stem // 2),
            nn.ReLU(),
            nn.Conv2d(stem // 2, stem, 3, 2, 1),
        )
        rates = iter(rising(drop_path_rate, sum(depths)))
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
        self.reset_classifier(num_classes)
        self.apply(narrow)
        self.apply(fan_out)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into stages (coarse) or blocks."""
        norm = (r"^norm", (99999,))
        if coarse:
            return {"stem": r"^stem", "blocks": [(r"^stages\.(\d+)", None), norm]}
        halves = (r"^stages\.(\d+)\.downsample", (-1,))
        each = (r"^stages\.(\d+)\.blocks\.(\d+)", None)
        return {"stem": r"^stem", "blocks": [halves, each, norm]}

    def trunk(
        self, x: Tensor, count: int, take: Collection[int] = ()
    ) -> tuple[Tensor, list[Tensor]]:
        x = self.stem(x)
        found = []
        for k, stage in enumerate(self.stages.children()):
            if k == count:
                break
            assert isinstance(stage, Stage)
            x = stage.downsample(x)
            for block in stage.blocks:
                x = self.run(block, x)
            if k in take:
                found.append(x)
        return x, found

    def final(self, x: Any) -> Any:
        """The norm."""
        return self.norm(x)

    def cut(self, count: int) -> None:
        self.stages = self.stages[:count]
