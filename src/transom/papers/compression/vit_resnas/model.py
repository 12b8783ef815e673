"""The multi-stage network that a definition stands for, as a timm model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from timm.layers import trunc_normal_
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import TokenNetwork, image_grid, narrow, patch_grid
from transom.papers.compression.vit_resnas.definition import BlockDef, Definition, ReduceDef
from transom.papers.compression.vit_resnas.layers import (
    Absent,
    Block,
    ConvEmbed,
    Grid,
    Kept,
    PatchEmbed,
    SpatialReduction,
    reduced,
    resized,
)
from transom.papers.compression.vit_resnas.masks import MaskedLayerNorm, leading


class Flow(NamedTuple):
    """What travels between the layers.

    x: (B, P + h w, D) tokens.
    grid: (h, w) of the patches.
    mask: (B, 1, D) bool, channels that stay; None for all.
    """

    x: Tensor
    grid: Grid
    mask: Tensor | None


class ViTResNAS(TokenNetwork):
    """Multi-stage vision transformer made from a network definition.

    Args:
        network_def: see `definition.py`; official tuples or a Definition.
        img_size: height and width the position tables are made for, pixels.
        patch_size: pixels; even with a convolutional patch embedding.
        in_chans: channels of the image.
        num_classes: outputs; 0 for features. None takes it from the definition.
        global_pool: "token" for the class token, "" for all tokens.
        drop_rate: dropout behind the position embedding.
        drop_path_rate: of the last block; linear from 0 at the first.
        distilled: a second token with a head of its own. Training gives both logits, otherwise
            their mean is given, as in DeiT.
        patch_output: a head on the patches for token mixup. Training gives the logits of the
            class token and those of every patch (B, N, classes).

    Raises:
        SettingsError: the definition is wrong, or patch_output and distilled come together.
    """

    pools: ClassVar[tuple[str, ...]] = ("token", "")

    cls_head: nn.Module
    dst_head: nn.Module | None
    patch_head: nn.Module | None

    def __init__(
        self,
        network_def: Definition | Sequence[Any],
        img_size: int | Grid = 224,
        patch_size: int = 14,
        in_chans: int = 3,
        num_classes: int | None = None,
        global_pool: str = "token",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        distilled: bool = False,
        patch_output: bool = False,
    ) -> None:
        given = Definition.parse(network_def)
        if patch_output and distilled:
            raise SettingsError(
                "patch_output and distilled are both set; a network has one second output"
            )
        if given.embed.mid is not None and patch_size % 2:
            raise SettingsError(
                f"patch_size is {patch_size}; the convolutional patch embedding halves it, so "
                "expected an even number (the paper's is 14)"
            )
        classes = given.classes if num_classes is None else num_classes
        super().__init__(classes, global_pool, _stages(given, patch_size))
        self.definition, self.patch_size, self.in_chans = given, patch_size, in_chans
        self.num_prefix_tokens = 2 if distilled else 1
        self.patch_output = patch_output
        self.grid = grid = patch_grid(img_size, self.patch_size)

        dim, mid = given.embed
        self.patch_embed: nn.Module = (
            PatchEmbed(in_chans, dim, patch_size)
            if mid is None
            else ConvEmbed(in_chans, dim, patch_size, mid)
        )
        self.tokens = nn.Parameter(torch.zeros(1, self.num_prefix_tokens, dim))
        count = self.num_prefix_tokens + grid[0] * grid[1]
        self.pos_embed = nn.Parameter(torch.zeros(1, count, dim))
        self.pos_drop = nn.Dropout(drop_rate)
        self.blocks = nn.ModuleList(self._layers(given, grid, drop_path_rate))
        self.norm: nn.Module = MaskedLayerNorm(given.width)
        self.reset_classifier(classes)
        self.init_weights()

    def _layers(self, given: Definition, grid: Grid, rate: float) -> list[nn.Module]:
        count = sum(isinstance(layer, BlockDef) for layer in given.layers)
        rates = iter(torch.linspace(0, rate, count, device="cpu").tolist())
        made: list[nn.Module] = []
        for layer in given.layers:
            if isinstance(layer, ReduceDef):
                made.append(SpatialReduction(grid, *layer, self.num_prefix_tokens))
                grid = reduced(grid)
            else:
                drop = next(rates)
                made.append(Block(layer, drop) if layer.exists else Absent())
        return made

    def heads(self) -> dict[str, nn.Module | None]:
        width, classes = self.num_features, self.num_classes
        there = (True, self.num_prefix_tokens == 2, self.patch_output)
        return {
            name: (nn.Linear(width, classes) if classes else nn.Identity()) if wanted else None
            for name, wanted in zip(("cls_head", "dst_head", "patch_head"), there, strict=True)
        }

    def init_weights(self) -> None:
        """Truncated normal of 0.02 for linear layers, tokens and positions; biases zero."""
        trunc_normal_(self.tokens, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("pos_embed"):
                trunc_normal_(parameter, std=0.02)
        self.apply(narrow)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # official checkpoints carry the head of the training by patches
        if self.patch_head is None:
            for name in ("weight", "bias"):
                state_dict.pop(f"{prefix}patch_head.{name}", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Class tokens and positions, those of the reductions too."""
        return {"tokens"} | {n for n, _ in self.named_parameters() if n.endswith("pos_embed")}

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, or both heads with a distillation token."""
        return self.cls_head if self.dst_head is None else (self.cls_head, self.dst_head)

    def set_input_size(self, img_size: int | Grid) -> None:
        """Interpolate the position tables to another image size, for good.

        Args:
            img_size: height and width, pixels.

        Raises:
            SettingsError: it is no multiple of the patch.
        """
        grid, prefix = patch_grid(img_size, self.patch_size), self.num_prefix_tokens
        self.pos_embed = nn.Parameter(resized(self.pos_embed.data, self.grid, grid, prefix))
        self.grid = grid
        for layer in self.blocks:
            if isinstance(layer, SpatialReduction):
                grid = reduced(grid)
                layer.pos_embed = nn.Parameter(resized(layer.pos_embed.data, layer.grid, grid))
                layer.grid = grid

    def embed(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Image (B, C, H, W) -> tokens (B, P + h w, D) and the grid (h, w).

        Raises:
            TokensError: the size of the image is no multiple of the patch.
        """
        grid = image_grid(x, self.patch_size)
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1)
        x = x + resized(self.pos_embed, self.grid, grid, self.num_prefix_tokens)
        return self.pos_drop(x), grid

    def trunk(
        self,
        x: Tensor,
        count: int,
        take: Collection[int] = (),
        kept: Sequence[Kept] | None = None,
    ) -> tuple[Flow, list[Flow]]:
        """As everywhere; `kept` as in :meth:`forward_features`."""
        x, grid = self.embed(x)
        x, mask = _masked(x, None if kept is None else kept[0])
        ends = []
        for i, layer in enumerate(self.blocks):
            now = None if kept is None else kept[1 + i]
            if not isinstance(layer, SpatialReduction):
                x = self.run(layer, x, mask, now)
                continue
            ends.append(Flow(x, grid, mask))
            if len(ends) == count:
                break
            x, mask = _masked(self.run(layer, x, grid, mask), now)
            grid = reduced(grid)
        else:
            ends.append(Flow(x, grid, mask))
        return ends[-1], [end for i, end in enumerate(ends) if i in take]

    def final(self, x: Flow) -> Tensor:
        """The normed tokens."""
        y: Tensor = self.norm(x.x, x.mask)
        return y

    def cut(self, count: int) -> None:
        last = int(self.feature_info[count - 1]["module"].removeprefix("blocks."))
        self.blocks = self.blocks[: last + 1]

    def drop_norm(self) -> None:
        """Put something in the place of the norm that takes a mask too."""
        self.norm = Absent()

    def forward_features(self, x: Tensor, kept: Sequence[Kept] | None = None) -> Tensor:
        """Image (B, C, H, W) -> normed tokens of the last stage (B, P + n, D).

        Args:
            x: the image.
            kept: channels that stay in each layer, for a super-network; None for all.
        """
        return self.final(self.trunk(x, len(self.feature_info), (), kept)[0])

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Any:
        """Normed tokens -> logits; a pair while training with a second output.

        Args:
            x: (B, P + n, D).
            pre_logits: stop before the heads.
        """
        if self.global_pool == "" and pre_logits:
            return x
        if self.global_pool == "":
            return self.cls_head(x)
        prefix = self.num_prefix_tokens
        if pre_logits:
            return x[:, :prefix].mean(1)
        logits = self.cls_head(x[:, 0])
        if self.dst_head is not None:
            other = self.dst_head(x[:, 1])
            return (logits, other) if self.training else (logits + other) / 2
        if self.patch_head is not None and self.training:
            return logits, self.patch_head(x[:, prefix:])
        return logits


def _stages(given: Definition, stride: int) -> list[dict[str, Any]]:
    """What timm wants to know of each stage."""
    dim, stages = given.embed.dim, []
    for i, layer in enumerate(given.layers):
        if isinstance(layer, ReduceDef):
            stages.append({"num_chs": dim, "reduction": stride, "module": f"blocks.{i - 1}"})
            dim, stride = layer.out, 2 * stride
    last = f"blocks.{len(given.layers) - 1}"
    return [*stages, {"num_chs": dim, "reduction": stride, "module": last}]


def _masked(x: Tensor, kept: Kept | None) -> tuple[Tensor, Tensor | None]:
    """Tokens (B, N, D) without the channels that go, and the mask of those that stay."""
    if kept is None or kept.dim is None:
        return x, None
    mask = leading(kept.dim, x.shape[-1])
    return x * mask, mask
