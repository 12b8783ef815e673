"""Compact transformers (ViT-Lite, CVT, CCT) of the room `cct`, as hosts of other methods.

A layer norms the stream itself behind attention, x = norm1(x + attend(pre_norm(x))), and the
token step runs behind that norm; then x = x + ffn(x). Where the sequence is pooled, tokens are
restored in front of the pooling, so each original patch has its say.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import HostError
from transom.hosts.base import (
    Change,
    Host,
    Reads,
    RestoredIntermediates,
    example_pixels,
    parts,
    put,
)
from transom.hosts.timm_attention import Answer
from transom.projections import Projections, affine, fused
from transom.slots import Ask, BlockView, FittedStack, Part

NETWORK = "CompactTransformer"
STACK = "classifier.blocks"


class CompactAttention(Answer):
    """Answers for the layers' self-attention."""

    known = ("qkv", "proj", "proj_drop")

    def answer(self, x: Tensor, ask: Ask) -> Tensor:
        m = self.module
        q, k, v = m.qkv(x).unflatten(-1, (3, m.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        dropout = m.attn_drop if m.training else 0.0
        out = ask.attend(q, k, v, dropout=dropout, scale=q.shape[-1] ** -0.5)
        return m.proj_drop(m.proj(out.transpose(1, 2).flatten(2)))


class CompactBlock(BlockView):
    """View of one layer."""

    native = True
    known = ("pre_norm", "self_attn", "linear1", "norm1", "linear2", "dropout", "drop_path")

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        parts(module, self.known, name, parameters=True)
        attention: Any = self.module.self_attn
        parts(attention, CompactAttention.known, f"{name}.self_attn", parameters=True)
        self.attention = CompactAttention(attention)

    def norm1(self, x: Tensor) -> Tensor:
        return self.module.pre_norm(x)

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        return self.module.self_attn(h, *args, transom=ask, **kwargs)

    def residual1(self, y: Tensor) -> Tensor:
        return self.module.drop_path(y)

    def join1(self, x: Tensor, y: Tensor) -> Tensor:
        return self.module.norm1(x + y)

    def norm2(self, x: Tensor) -> Tensor:
        return x

    def ffn(self, h: Tensor) -> Tensor:
        m = self.module
        return m.linear2(m.dropout(F.gelu(m.linear1(h))))

    def residual2(self, y: Tensor) -> Tensor:
        return self.module.drop_path(self.module.dropout(y))

    def part(self, name: Part) -> nn.Module | None:
        # its second norm norms the stream itself, and its ffn is no module
        own = {"norm1": "pre_norm", "attention": "self_attn"}.get(name)
        return None if own is None else getattr(self.module, own)

    def projections(self) -> Projections:
        m = self.module.self_attn
        return Projections(m.heads, *fused(m.qkv.weight, m.qkv.bias), affine(m.proj))


def find(model: nn.Module) -> Iterator[Host]:
    """Every compact transformer in `model`.

    Args:
        model: any module.

    Yields:
        A host for each.

    Raises:
        HostError: one of them holds a part that is not known.
    """
    for name, module in model.named_modules():
        # the room imports the engine, so it is known by name here
        if any(
            base.__name__ == NETWORK and base.__module__.startswith("transom.")
            for base in type(module).__mro__
        ):
            yield _host(module, name)


def _host(root: Any, name: str) -> Host:
    encoder = root.classifier
    if not isinstance(encoder.blocks, nn.ModuleList | FittedStack):
        raise HostError(f"{STACK} is a {type(encoder.blocks).__name__}; expected an nn.ModuleList")
    views = [
        CompactBlock(block, f"{STACK}.{i}")
        for i, block in enumerate(encoder.blocks._modules.values())
        if block is not None
    ]
    reads: Reads = "pooled" if encoder.seq_pool else "class token"
    cfg = getattr(root, "pretrained_cfg", None) or {}
    channels = next(m for m in root.tokenizer.modules() if isinstance(m, nn.Conv2d)).in_channels
    return Host(
        family=f"transom {NETWORK}",
        root=root,
        name=name,
        stack=encoder.blocks,
        stack_name=STACK,
        views=list(views),
        width=root.embed_dim,
        prefix=encoder.prefix,
        class_token=not encoder.seq_pool,
        grid=encoder.grid,
        reads=reads if root.global_pool else "tokens",
        architecture=str(cfg.get("architecture", "") or ""),
        example=partial(example_pixels, root, channels, root.img_size),
        install=partial(_install, root, views),
    )


def _install(root: nn.Module, views: list[CompactBlock]) -> Iterator[Change]:
    for view in views:
        if "forward" in view.attention.module.__dict__:
            raise HostError(
                "a self-attention of this network has a forward of its own put over it; remove "
                "that first, transom would switch it off"
            )
        yield put(view.attention.module, "forward", view.attention)
    yield put(root, "forward_intermediates", RestoredIntermediates(root, STACK))
