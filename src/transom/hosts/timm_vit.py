"""timm's VisionTransformer with its standard pre-norm block.

Tested with timm 1.0.31. Everything the block and its attention may hold is listed below; a part
that is not listed is refused by name.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.hosts.base import Change, Host, Reads, example_pixels, parts, put
from transom.slots import Ask, FittedStack, RestoringStack

BLOCK = ("norm1", "attn", "ls1", "drop_path1", "norm2", "mlp", "ls2", "drop_path2")
ATTENTION = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


class TimmAttention:
    """Forward of timm's Attention that answers an :class:`~transom.slots.Ask`."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        transom: Ask | None = None,
    ) -> Tensor:
        m: Any = self.module
        if transom is None or transom.plain:
            return type(m).forward(m, x, attn_mask=attn_mask, is_causal=is_causal)
        if attn_mask is not None or is_causal:
            raise TokensError(
                "this call has an attention mask, but a fitted method reduces or reweights the "
                "tokens the mask was made for; call the model without a mask, or remove the method"
            )
        batch, count, _ = x.shape
        gate = getattr(m, "gate", None)
        opened = None if gate is None else gate(x).sigmoid()
        qkv = m.qkv(x).reshape(batch, count, 3, m.num_heads, m.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)  # (B, H, N, d)
        q, k = m.q_norm(q), m.k_norm(k)
        dropout = m.attn_drop.p if m.training else 0.0
        out = transom.attend(q, k, v, dropout=dropout, scale=m.scale)
        out = out.transpose(1, 2).reshape(batch, count, -1)
        out = m.norm(out)
        if opened is not None:
            out = out * opened
        return m.proj_drop(m.proj(out))


class TimmBlock:
    """View of timm's Block."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def norm1(self, x: Tensor) -> Tensor:
        return self.module.norm1(x)

    def attend(self, h: Tensor, ask: Ask, **kwargs: Any) -> Tensor:
        return self.module.attn(h, transom=ask, **kwargs)

    def residual1(self, y: Tensor) -> Tensor:
        return self.module.drop_path1(self.module.ls1(y))

    def norm2(self, x: Tensor) -> Tensor:
        return self.module.norm2(x)

    def ffn(self, h: Tensor) -> Tensor:
        return self.module.mlp(h)

    def residual2(self, y: Tensor) -> Tensor:
        return self.module.drop_path2(self.module.ls2(y))

    def valid(self, **kwargs: Any) -> None:
        return None  # timm's masks relate pairs of tokens; TimmAttention refuses them

    def checkpoint(self) -> Callable[..., Any] | None:
        return None  # timm checkpoints in the loop around its blocks


class RestoredIntermediates:
    """forward_intermediates over blocks whose outputs are restored to the grid."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        root: Any = self.root
        # a shallow view that exists for this call only; the model itself is not touched
        view = copy.copy(root)
        view.__dict__.pop("forward_intermediates")
        view.__dict__["_modules"] = {**root._modules, "blocks": RestoringStack(root.blocks)}
        return type(root).forward_intermediates(view, *args, **kwargs)


def find(model: nn.Module) -> Iterator[Host]:
    """Every timm VisionTransformer in `model`.

    Args:
        model: any module.

    Yields:
        A host for each.

    Raises:
        HostError: such a model holds a part that is not known.
    """
    from timm.models.vision_transformer import VisionTransformer

    for name, module in model.named_modules():
        if isinstance(module, VisionTransformer):
            yield _host(module, name)


def _host(root: Any, name: str) -> Host:
    if not isinstance(root.blocks, nn.Sequential | FittedStack) or not len(root.blocks):
        raise HostError(
            f"{type(root).__name__}.blocks is a {type(root.blocks).__name__} of "
            f"{len(root.blocks)} blocks; expected a non-empty nn.Sequential of timm blocks"
        )
    views = []
    for i, block in enumerate(root.blocks._modules.values()):
        _check_block(block, f"blocks.{i}")
        views.append(TimmBlock(block))
    reads: Reads = "pooled" if root.attn_pool is not None else "class token"
    if root.attn_pool is None and root.global_pool != "token":
        reads = "pooled" if root.global_pool else "tokens"
    cfg = getattr(root, "pretrained_cfg", None) or {}
    size = tuple(root.patch_embed.img_size or (224, 224))
    grid = root.patch_embed.grid_size

    return Host(
        family="timm VisionTransformer",
        root=root,
        name=name,
        stack=root.blocks,
        stack_name="blocks",
        views=list(views),
        width=root.embed_dim,
        prefix=root.num_prefix_tokens,
        class_token=root.cls_token is not None,
        grid=None if grid is None else (int(grid[0]), int(grid[1])),
        reads=reads,
        architecture=str(cfg.get("architecture", "") or ""),
        example=partial(example_pixels, root, root.patch_embed.proj.in_channels, size),
        install=partial(_install, root),
    )


def _install(root: Any) -> Iterator[Change]:
    for block in root.blocks._modules.values():
        yield put(block.attn, "forward", TimmAttention(block.attn))
    yield put(root, "forward_intermediates", RestoredIntermediates(root))


def _check_block(block: Any, name: str) -> None:
    if type(block).__name__ != "Block" or not all(hasattr(block, part) for part in BLOCK):
        raise HostError(
            f"{name} is a {type(block).__name__}; of timm's blocks transom fits the standard "
            f"pre-norm Block with the parts {list(BLOCK)}. res-post-norm, parallel and other "
            "blocks are not supported yet"
        )
    parts(block, BLOCK, name)
    attn = block.attn
    needed = ("qkv", "q_norm", "k_norm", "norm", "proj", "num_heads", "head_dim", "scale")
    if type(attn).__name__ != "Attention" or not all(hasattr(attn, part) for part in needed):
        raise HostError(
            f"{name}.attn is a {type(attn).__name__}; expected timm's Attention with a fused qkv "
            "projection. Rotary, relative-position and differential attention are not supported "
            "yet"
        )
    parts(attn, ATTENTION, f"{name}.attn")
