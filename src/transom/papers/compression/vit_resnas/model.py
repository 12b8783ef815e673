"""The multi-stage network that a definition stands for, as a timm model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from timm.layers import trunc_normal_
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint
from torch import Tensor, nn

from transom.errors import SettingsError, TokensError
from transom.papers.compression.vit_resnas.definition import BlockDef, Definition, ReduceDef
from transom.papers.compression.vit_resnas.layers import (
    Absent,
    Block,
    ConvEmbed,
    Grid,
    Kept,
    PatchEmbed,
    SpatialReduction,
    as_map,
    reduced,
    resized,
)
from transom.papers.compression.vit_resnas.masks import MaskedLayerNorm, leading


class ViTResNAS(nn.Module):
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
        super().__init__()
        self.definition = given = Definition.parse(network_def)
        if patch_output and distilled:
            raise SettingsError(
                "patch_output and distilled are both set; a network has one second output"
            )
        if given.embed.mid is not None and patch_size % 2:
            raise SettingsError(
                f"patch_size is {patch_size}; the convolutional patch embedding halves it, so "
                "expected an even number (the paper's is 14)"
            )
        self.patch_size, self.in_chans, self.grid = patch_size, in_chans, (0, 0)
        self.num_classes = given.classes if num_classes is None else num_classes
        self.num_features = self.head_hidden_size = self.embed_dim = given.width
        self.num_prefix_tokens = 2 if distilled else 1
        self.grad_checkpointing = False
        self._check_pool(global_pool)
        grid = self._grid(img_size)
        self.grid = grid

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
        self.cls_head = self._head()
        self.dst_head = self._head() if distilled else None
        self.patch_head = self._head() if patch_output else None
        self.feature_info = self._stages(given)
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

    def _stages(self, given: Definition) -> list[dict[str, Any]]:
        dim, stride, stages = given.embed.dim, self.patch_size, []
        for i, layer in enumerate(given.layers):
            if isinstance(layer, ReduceDef):
                stages.append({"num_chs": dim, "reduction": stride, "module": f"blocks.{i - 1}"})
                dim, stride = layer.out, 2 * stride
        last = f"blocks.{len(given.layers) - 1}"
        return [*stages, {"num_chs": dim, "reduction": stride, "module": last}]

    def _head(self) -> nn.Module:
        if self.num_classes == 0:
            return nn.Identity()
        like = self.tokens
        return nn.Linear(self.num_features, self.num_classes, device=like.device, dtype=like.dtype)

    def _grid(self, img_size: int | Sequence[int]) -> Grid:
        h, w = (img_size, img_size) if isinstance(img_size, int) else img_size
        if h < 1 or w < 1 or h % self.patch_size or w % self.patch_size:
            raise SettingsError(
                f"img_size is {img_size}; expected multiples of the patch, {self.patch_size} pixels"
            )
        return h // self.patch_size, w // self.patch_size

    def _check_pool(self, global_pool: str) -> None:
        if global_pool not in ("", "token"):
            raise SettingsError(
                f"global_pool is {global_pool!r}; expected 'token' (the class token) or '' (all)"
            )
        self.global_pool = global_pool

    def init_weights(self) -> None:
        """Truncated normal of 0.02 for linear layers, tokens and positions; biases zero."""
        trunc_normal_(self.tokens, std=0.02)
        for name, parameter in self.named_parameters():
            if name.endswith("pos_embed"):
                trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        # official checkpoints carry the head of the training by patches
        if self.patch_head is None:
            for name in ("weight", "bias"):
                state_dict.pop(f"{prefix}patch_head.{name}", None)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that are not decayed."""
        return {"tokens", "pos_embed"} | {
            name for name, _ in self.named_parameters() if name.endswith(".pos_embed")
        }

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter groups for layer decay."""
        stem = r"^tokens|^pos_embed|^patch_embed"
        return {"stem": stem, "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers in the backward pass."""
        self.grad_checkpointing = enable

    def get_classifier(self) -> nn.Module | tuple[nn.Module, nn.Module]:
        """The head, or both heads with a distillation token."""
        return self.cls_head if self.dst_head is None else (self.cls_head, self.dst_head)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """New heads; 0 classes for none."""
        self.num_classes = num_classes
        if global_pool is not None:
            self._check_pool(global_pool)
        self.cls_head = self._head()
        self.dst_head = None if self.dst_head is None else self._head()
        self.patch_head = None if self.patch_head is None else self._head()

    def set_input_size(self, img_size: int | Grid) -> None:
        """Interpolate the position tables to another image size, for good.

        Args:
            img_size: height and width, pixels.

        Raises:
            SettingsError: it is no multiple of the patch.
        """
        grid, prefix = self._grid(img_size), self.num_prefix_tokens
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
        height, width = x.shape[-2:]
        if height % self.patch_size or width % self.patch_size:
            raise TokensError(
                f"got an image of {height} x {width} pixels; expected multiples of the patch, "
                f"{self.patch_size}: resize the image"
            )
        grid = height // self.patch_size, width // self.patch_size
        x = self.patch_embed(x).flatten(2).mT
        x = torch.cat([self.tokens.expand(x.shape[0], -1, -1), x], 1)
        x = x + resized(self.pos_embed, self.grid, grid, self.num_prefix_tokens)
        return self.pos_drop(x), grid

    def _run(
        self,
        x: Tensor,
        kept: Sequence[Kept] | None,
        stages: list[tuple[Tensor, Grid, Tensor | None]],
        upto: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Tokens behind the last layer and the mask of their channels; fills `stages`."""
        x, grid = self.embed(x)
        first = None if kept is None else kept[0].dim
        mask = None if first is None else leading(first, x.shape[-1])
        x = x if mask is None else x * mask
        for i, layer in enumerate(self.blocks):
            now = None if kept is None else kept[1 + i]
            if isinstance(layer, SpatialReduction):
                stages.append((x, grid, mask))
                if upto is not None and len(stages) > upto:
                    return x, mask
                x = self._call(layer, x, grid, mask)
                grid = reduced(grid)
                mask = None
                if now is not None and now.dim is not None:
                    mask = leading(now.dim, x.shape[-1])
                    x = x * mask
            else:
                x = self._call(layer, x, mask, now)
        stages.append((x, grid, mask))
        return x, mask

    def _call(self, layer: nn.Module, *args: Any) -> Tensor:
        if self.grad_checkpointing:
            return checkpoint(layer, *args)
        return layer(*args)

    def forward_features(self, x: Tensor, kept: Sequence[Kept] | None = None) -> Tensor:
        """Image (B, C, H, W) -> normed tokens of the last stage (B, P + n, D).

        Args:
            x: the image.
            kept: channels that stay in each layer, for a super-network; None for all.
        """
        x, mask = self._run(x, kept, [])
        return self.norm(x, mask)

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

    def forward(self, x: Tensor) -> Any:
        """Image (B, C, H, W) -> logits (B, classes)."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Features at the end of each stage.

        Args:
            x: image (B, C, H, W).
            indices: the last n stages if an integer, these if a list, all if None.
            return_prefix_tokens: pair each with its class tokens.
            norm: apply the final norm where the width is that of the last stage.
            stop_early: do not run what comes behind the last stage wanted.
            output_fmt: "NCHW" maps or "NLC" tokens.
            intermediates_only: give the list alone.

        Raises:
            SettingsError: the format is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise SettingsError(f"output_fmt is {output_fmt!r}; expected 'NCHW' or 'NLC'")
        take, last = feature_take_indices(len(self.feature_info), indices)
        stages: list[tuple[Tensor, Grid, Tensor | None]] = []
        out, mask = self._run(x, None, stages, last if stop_early else None)
        found: list[Any] = []
        for i in take:
            y, grid, _ = stages[i]
            if norm and y.shape[-1] == self.num_features:
                y = self.norm(y)
            patches = y[:, self.num_prefix_tokens :]
            if output_fmt == "NCHW":
                patches = as_map(patches, grid).contiguous()
            pair = patches, y[:, : self.num_prefix_tokens]
            found.append(pair if return_prefix_tokens else patches)
        if intermediates_only:
            return found
        complete = len(stages) == len(self.feature_info)
        return (self.norm(out, mask) if complete else out), found

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the layers behind the last stage wanted.

        Args:
            indices: as in :meth:`forward_intermediates`.
            prune_norm: replace the final norm by the identity.
            prune_head: drop the head.

        Returns:
            The stages that are taken.
        """
        take, last = feature_take_indices(len(self.feature_info), indices)
        final = last == len(self.feature_info) - 1
        self.blocks = self.blocks[: int(self.feature_info[last]["module"].split(".")[1]) + 1]
        self.feature_info = self.feature_info[: last + 1]
        if prune_norm or not final:
            self.norm = Absent()
        if prune_head or not final:
            self.num_features = self.head_hidden_size = self.feature_info[last]["num_chs"]
            self.reset_classifier(0)
        return list(take)
