"""The embeddings of timm's and of transformers' ViTs, with slots for tokenizer and position.

Only embeddings that cut an image into patches side by side and add one table of positions are
taken; everything else (rotary positions, hybrid stems, overlapping patches) is refused by name.
Tested with timm 1.0.31 and transformers 5.23.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import FitError, TokensError
from transom.front import FrontView
from transom.hosts.base import Change, Host, put
from transom.hosts.hf_common import arguments
from transom.hosts.hf_vision import PATCHES, PREFIX

# Parts that an embedding of transformers may have: what is not here could do something unseen.
KNOWN = (*PATCHES, "position_embedding", "position_embeddings", "dropout")


def front_of(host: Host) -> FrontView:
    """The view of what stands in front of a host's blocks.

    Raises:
        FitError: it cannot be replaced there.
    """
    if host.family.startswith("timm "):
        return TimmFront(host)
    if host.modality == "image" and hasattr(host.root, "embeddings"):
        return HfFront(host)
    raise _refused(host, "it has no embedding of images that transom knows")


def _refused(host: Host, reason: str) -> FitError:
    return FitError(
        f"the slots 'tokenizer' and 'position' are not there in this {host.family} "
        f"({type(host.root).__name__}): {reason}"
    )


def _patch(conv: Any, host: Host) -> tuple[int, int]:
    """Size of the patches that a convolution cuts out."""
    plain = isinstance(conv, nn.Conv2d) and conv.kernel_size == conv.stride
    if not plain or conv.padding not in ((0, 0), "valid") or conv.dilation != (1, 1):
        raise _refused(host, "its patches overlap, or are no plain convolution")
    return int(conv.kernel_size[0]), int(conv.kernel_size[1])


class Tokenize:
    """Forward of the module that embeds patches."""

    def __init__(self, module: nn.Module, view: FrontView, patch: tuple[int, int]) -> None:
        self.module: Any = module
        self.view = view
        self.patch = patch

    def __call__(self, pixels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        tokenizer = self.view.fill.tokenizer
        if tokenizer is None:
            return type(self.module).forward(self.module, pixels, *args, **kwargs)
        if not isinstance(self.module, nn.Conv2d):
            out = tokenizer(pixels, lambda x: self._embed(x, *args, **kwargs), self.patch)
            sequence = getattr(self.module, "flatten", True)
            return out.flatten(1, 2) if out.dim() == 4 and sequence else out
        out = tokenizer(pixels, lambda x: self._embed(x).movedim(1, -1), self.patch)
        return out.movedim(-1, 1)

    def _embed(self, pixels: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return type(self.module).forward(self.module, pixels, *args, **kwargs)


def _placed(view: FrontView, x: Tensor, grid: tuple[int, int]) -> Tensor:
    position = view.fill.position
    assert position is not None
    if grid[0] * grid[1] != x.shape[1]:
        raise TokensError(
            f"the embedding made {x.shape[1]} patches where {grid[0]} x {grid[1]} were expected; "
            "call the model with images whose sides its patches divide"
        )
    return position(x, grid)


class TimmFront(FrontView):
    """VisionTransformer, plain or distilled, with timm's PatchEmbed."""

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        self.root: Any = host.root

    def install(self) -> Iterator[Change]:
        from timm.layers import PatchEmbed

        embed = getattr(self.root, "patch_embed", None)
        own = getattr(type(self.root), "_pos_embed", None)
        known = [
            getattr(importlib.import_module(f"timm.models.{module}"), name)._pos_embed
            for module, name in (
                ("vision_transformer", "VisionTransformer"),
                ("deit", "VisionTransformerDistilled"),
            )
        ]
        if own not in known or type(embed) is not PatchEmbed:
            raise _refused(
                self.host,
                f"it embeds with {type(embed).__name__} and adds positions in its own way; "
                "expected timm's PatchEmbed and VisionTransformer",
            )
        patch = _patch(embed.proj, self.host)
        yield put(embed, "forward", Tokenize(embed, self, patch))
        yield put(self.root, "_pos_embed", self)

    def __call__(self, x: Tensor) -> Tensor:
        """Stands for `_pos_embed`: patches (B, N, D) or (B, h, w, D) -> tokens."""
        root = self.root
        if self.fill.position is None:
            return type(root)._pos_embed(root, x)
        grid = root.patch_embed.grid_size
        if x.dim() == 4:
            grid, x = (x.shape[1], x.shape[2]), x.flatten(1, 2)
        x = _placed(self, x, grid)
        names = ("cls_token", "dist_token", "reg_token")
        front = [t for n in names if (t := getattr(root, n, None)) is not None]
        if front:
            prefix = torch.cat(front, 1)
            if root.pos_embed is not None and not root.no_embed_class:
                prefix = prefix + root.pos_embed[:, : prefix.shape[1]]
            x = torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)
        return root.pos_drop(x)


class HfFront(FrontView):
    """Embeddings of transformers, put together anew from their own parts.

    Whether that gives what the embeddings give is tried on an example before anything changes.
    """

    def __init__(self, host: Host) -> None:
        super().__init__()
        self.host = host
        root: Any = host.root
        self.module: Any = root.embeddings
        self.names = ("pixel_values", *arguments(self.module)[0])

    def install(self) -> Iterator[Change]:
        module = self.module
        strange = sorted({n for n, _ in module.named_children()} - set(KNOWN))
        if strange or self.host.grid is None:
            raise _refused(self.host, f"its embeddings have {strange or 'no known grid'}")
        (name,) = (n for n in PATCHES if hasattr(module, n))
        self.patches_name = name
        patches = getattr(module, name)
        self.patch = _patch(getattr(patches, "projection", patches), self.host)
        if not any(p.is_meta for p in module.parameters()):
            self._try()
        yield put(patches, "forward", Tokenize(patches, self, self.patch))
        yield put(module, "forward", self)

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        """Stands for the forward of the embeddings."""
        if self.fill.position is None:
            return type(self.module).forward(self.module, *args, **kwargs)
        given = {**dict(zip(self.names, args, strict=False)), **kwargs}
        if given.get("bool_masked_pos") is not None:
            raise TokensError(
                "masked patches have no positions while a method fills the slot 'position'; call "
                "the model without bool_masked_pos, or remove the method"
            )
        x = self._tokens(given["pixel_values"], lambda x, grid: _placed(self, x, grid))
        dropout = getattr(self.module, "dropout", None)
        return x if dropout is None else dropout(x)

    def _tokens(self, pixels: Tensor, place: Callable[[Tensor, tuple[int, int]], Tensor]) -> Tensor:
        """Prefix and patches with positions; dropout is left out."""
        module = self.module
        patches = getattr(module, self.patches_name)
        conv = getattr(patches, "projection", patches)
        x = patches(pixels.to(conv.weight.dtype))
        x = x.flatten(2).mT if x.dim() == 4 else x
        grid = (pixels.shape[-2] // self.patch[0], pixels.shape[-1] // self.patch[1])
        x = place(x, grid)
        front = [getattr(module, n) for n in PREFIX if hasattr(module, n)]
        if not front:
            return x
        prefix = torch.cat([t.reshape(1, -1, t.shape[-1]) for t in front], 1)
        table = self._table()
        count = 0 if table is None else table.shape[1] - self._patches()
        if table is not None and count:
            seen = prefix[:, :count] + table[:, :count]
            prefix = torch.cat([seen, prefix[:, count:]], 1)
        return torch.cat([prefix.expand(x.shape[0], -1, -1), x], 1)

    def _table(self) -> Tensor | None:
        """(1, T, D): positions of the first prefix tokens and of the patches."""
        own = getattr(self.module, "position_embeddings", None)
        if own is None:
            own = getattr(self.module, "position_embedding", None)
        weight = own.weight if isinstance(own, nn.Embedding) else own
        return None if weight is None else weight.reshape(1, -1, weight.shape[-1])

    def _patches(self) -> int:
        assert self.host.grid is not None
        return self.host.grid[0] * self.host.grid[1]

    def _try(self) -> None:
        """Hold the parts against the embeddings' own forward on an example.

        Raises:
            FitError: they differ.
        """
        example = self.host.example()
        if not isinstance(example, Tensor):
            raise _refused(self.host, "it takes more than an image")
        modes = {m: m.training for m in self.module.modules()}
        self.module.eval()
        try:
            with torch.no_grad():
                expected = type(self.module).forward(self.module, example)
                table = self._table()
                own = 0 if table is None else table[:, -self._patches() :]
                got = self._tokens(example, lambda x, grid: x + own)
        finally:
            for module, mode in modes.items():
                module.training = mode
        limit = 32 * torch.finfo(expected.dtype).eps
        if got.shape != expected.shape or not torch.allclose(got, expected, limit, limit):
            raise _refused(self.host, "its embeddings do more than their parts tell")
