"""Transformers on `nn.MultiheadAttention`: torchvision's ViT, open_clip, and towers like OpenAI's.

Found by structure: torchvision's by its convolution, class token and encoder, image towers by
`conv1`, `class_embedding`, `positional_embedding` and a `transformer` of residual blocks. Text
towers are left alone: their attention is causal. Tested with torchvision 0.29 and open_clip 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.hosts.base import (
    Change,
    Host,
    Reads,
    RestoredIntermediates,
    example_pixels,
    parts,
    put,
)
from transom.projections import Projections, affine, fused
from transom.slots import Ask, BlockView, FittedStack, Part

# What a block may hold, in the order in which a branch is made.
BLOCK = (
    *("ln_1", "attn", "self_attention", "ln_attn", "ls_1", "dropout"),
    *("ln_2", "mlp", "ls_2"),
)
# Children and parameters of open_clip's own attention.
CUSTOM = (
    *("in_proj_weight", "in_proj_bias", "ln_q", "ln_k", "attn_drop"),
    *("head_scale", "ln_inner", "out_proj", "out_drop"),
)


class MultiheadAnswer:
    """Forward of an attention with packed projections that answers an ask.

    A plain call goes to the module's own forward, so the fast path that PyTorch takes in
    evaluation stays what it was; every other call goes through the same weights and
    scaled-dot-product attention.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, x: Tensor, *args: Any, transom: Ask | None = None, **kwargs: Any) -> Any:
        m = self.module
        if transom is None or transom.plain:
            return type(m).forward(m, x, *args, **kwargs)
        packed = isinstance(m, nn.MultiheadAttention)
        first = not packed or m.batch_first
        out = self.answer(x if first else x.transpose(0, 1), transom)
        out = out if first else out.transpose(0, 1)
        return (out, None) if packed else out

    def answer(self, x: Tensor, ask: Ask) -> Tensor:
        """Attention over x (B, N, D) as asked, projection included."""
        m = self.module
        qkv = F.linear(x, m.in_proj_weight, m.in_proj_bias)
        q, k, v = qkv.unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        if isinstance(m, nn.MultiheadAttention):
            dropout = m.dropout if m.training else 0.0
            out = ask.attend(q, k, v, dropout=dropout, scale=m.head_dim**-0.5)
            return F.linear(out.transpose(1, 2).flatten(2), m.out_proj.weight, m.out_proj.bias)
        dropout = m.attn_drop.p if m.training else 0.0
        out = ask.attend(m.ln_q(q), m.ln_k(k), v, dropout=dropout, scale=m.scale)
        if m.head_scale is not None:
            out = out * m.head_scale
        return m.out_drop(m.out_proj(m.ln_inner(out.transpose(1, 2).flatten(2))))


class MultiheadBlock(BlockView):
    """View of a residual block."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        children = dict(module.named_children())
        attention = [n for n in ("attn", "self_attention") if n in children]
        missing = [n for n in ("ln_1", "ln_2", "mlp") if n not in children]
        if missing or len(attention) != 1:
            raise HostError(
                f"{name} ({type(module).__name__}) has the parts {sorted(children)}; expected "
                "ln_1, ln_2, mlp and one of attn and self_attention"
            )
        parts(module, BLOCK, name, parameters=True)
        if getattr(module, "attn_mask", None) is not None:
            raise HostError(
                f"{name} holds an attention mask of its own (a causal text tower?), which tokens "
                "that move would not fit"
            )
        self.attention = attention[0]
        self.before = tuple(n for n in ("ln_attn", "ls_1", "dropout") if n in children)
        self.after = tuple(n for n in ("ls_2",) if n in children)
        self.answer = MultiheadAnswer(children[self.attention])
        self.packed = isinstance(self.answer.module, nn.MultiheadAttention)
        _check_attention(self.answer.module, f"{name}.{self.attention}")

    def part(self, name: Part) -> nn.Module | None:
        own = {"norm1": "ln_1", "norm2": "ln_2", "ffn": "mlp", "attention": self.attention}
        return getattr(self.module, own[name])

    def projections(self) -> Projections:
        m = self.answer.module
        q, k, v = fused(m.in_proj_weight, m.in_proj_bias)
        return Projections(m.num_heads, q, k, v, affine(m.out_proj))

    def norm1(self, x: Tensor) -> Tensor:
        return self.module.ln_1(x)

    def attend(
        self,
        h: Tensor,
        ask: Ask,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        if k_x is not None or v_x is not None or not (attn_mask is None or ask.plain):
            raise TokensError(
                "this call has an attention mask or keys from elsewhere, but a fitted method "
                "reduces or reweights the tokens they were made for; call the model without "
                "them, or remove the method"
            )
        attention = getattr(self.module, self.attention)
        if not self.packed:
            return attention(h, attn_mask=attn_mask, transom=ask)
        mask = None if attn_mask is None else attn_mask.to(h.dtype)
        # one object three times: that is what PyTorch's fast path looks for
        return attention(h, h, h, need_weights=False, attn_mask=mask, transom=ask)[0]

    def residual1(self, y: Tensor) -> Tensor:
        for name in self.before:
            y = getattr(self.module, name)(y)
        return y

    def norm2(self, x: Tensor) -> Tensor:
        return self.module.ln_2(x)

    def ffn(self, h: Tensor) -> Tensor:
        return self.module.mlp(h)

    def residual2(self, y: Tensor) -> Tensor:
        for name in self.after:
            y = getattr(self.module, name)(y)
        return y


class SequenceFirstBlock(MultiheadBlock):
    """View of a residual block that takes (N, B, D)."""

    def arrive(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.transpose(0, 1)

    def depart(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x.transpose(0, 1)

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        return super().attend(h.transpose(0, 1), ask, *args, **kwargs).transpose(0, 1)


def _view(block: Any, name: str) -> MultiheadBlock:
    attention = getattr(block, "attn", getattr(block, "self_attention", None))
    if isinstance(attention, nn.MultiheadAttention) and not attention.batch_first:
        return SequenceFirstBlock(block, name)
    return MultiheadBlock(block, name)


def _check_attention(module: Any, name: str) -> None:
    cls = type(module)
    if cls is nn.MultiheadAttention:
        odd = module.bias_k is not None or module.add_zero_attn
        if odd or not module._qkv_same_embed_dim:
            raise HostError(
                f"{name} is an nn.MultiheadAttention with keys of another width or with keys of "
                "its own (bias_k, add_zero_attn), for which no token stands"
            )
        return
    if cls.__name__ != "Attention" or not cls.__module__.startswith("open_clip."):
        raise HostError(
            f"{name} is a {cls.__module__}.{cls.__name__}; expected nn.MultiheadAttention or the "
            "Attention of open_clip. A quantised or wrapped attention has to be unwrapped first"
        )
    if module.logit_scale is not None:
        raise HostError(f"{name} is scaled cosine attention, which transom does not know")
    parts(module, CUSTOM, name, parameters=True)


def find(model: nn.Module) -> Iterator[Host]:
    """Every such transformer over images in `model`.

    Args:
        model: any module.

    Yields:
        A host for each.

    Raises:
        HostError: one of them holds a part that is not known.
    """
    for name, module in model.named_modules():
        children = {child for child, _ in module.named_children()}
        own = {parameter for parameter, _ in module.named_parameters(recurse=False)}
        if {"conv_proj", "encoder"} <= children and "class_token" in own:
            yield _torchvision(module, name)
        elif {"conv1", "transformer"} <= children and {
            "class_embedding",
            "positional_embedding",
        } <= own:
            yield _clip(module, name)


def _torchvision(root: Any, name: str) -> Host:
    side = root.image_size // root.patch_size
    return _host(
        root,
        name,
        owner=root.encoder,
        stack="layers",
        family="torchvision VisionTransformer",
        architecture="vit",
        width=root.hidden_dim,
        grid=(side, side),
        reads="class token",
        size=(root.image_size, root.image_size),
        embed=root.conv_proj,
    )


def _clip(root: Any, name: str) -> Host:
    size = getattr(root, "image_size", None) or root.input_resolution
    size = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    stride = root.conv1.stride
    theirs = type(root).__module__.startswith("open_clip.")
    reads: Reads = "class token"
    pool = getattr(root, "pool_type", "tok")
    if getattr(root, "attn_pool", None) is not None or pool == "avg":
        reads = "pooled"
    if getattr(root, "attn_pool", None) is None and (
        pool == "none" or getattr(root, "output_tokens", False)
    ):
        reads = "tokens"
    return _host(
        root,
        name,
        owner=root.transformer,
        stack="resblocks",
        family="open_clip VisionTransformer" if theirs else "CLIP VisionTransformer",
        architecture="clip",
        width=root.conv1.out_channels,
        grid=(size[0] // stride[0], size[1] // stride[1]),
        reads=reads,
        size=size,
        embed=root.conv1,
    )


def _host(
    root: Any,
    name: str,
    *,
    owner: Any,
    stack: str,
    family: str,
    architecture: str,
    width: int,
    grid: tuple[int, int],
    reads: Reads,
    size: tuple[int, int],
    embed: nn.Module,
) -> Host:
    path = next(n for n, module in root.named_modules() if module is owner)
    blocks = getattr(owner, stack, None)
    if not isinstance(blocks, nn.Sequential | nn.ModuleList | FittedStack) or not len(blocks):
        raise HostError(
            f"{path} ({type(owner).__name__}) has no non-empty nn.Sequential or nn.ModuleList "
            f"{stack!r} of blocks"
        )
    views = [
        _view(block, f"{path}.{stack}.{i}")
        for i, block in enumerate(blocks._modules.values())
        if block is not None
    ]
    first = {not isinstance(view, SequenceFirstBlock) for view in views}
    if len(first) > 1 or getattr(owner, "batch_first", None) not in {None, *first}:
        raise HostError(
            f"{path}.{stack} mixes attention that takes (B, N, D) and (N, B, D); expected one form"
        )
    return Host(
        family=family,
        root=root,
        name=name,
        stack=blocks,
        stack_name=f"{path}.{stack}",
        views=list(views),
        width=width,
        prefix=1,
        class_token=True,
        grid=grid,
        reads=reads,
        architecture=architecture,
        example=partial(example_pixels, root, _channels(embed), size),
        install=partial(_install, owner, stack, views),
    )


def _channels(embed: nn.Module) -> int:
    return next(m for m in embed.modules() if isinstance(m, nn.Conv2d)).in_channels


def _install(owner: Any, stack: str, views: list[MultiheadBlock]) -> Iterator[Change]:
    for view in views:
        if "forward" in view.answer.module.__dict__:
            raise HostError(
                f"an attention ({type(view.answer.module).__name__}) has a forward of its own put "
                "over it; remove that first, transom would switch it off"
            )
        yield put(view.answer.module, "forward", view.answer)
    if hasattr(type(owner), "forward_intermediates"):
        yield put(owner, "forward_intermediates", RestoredIntermediates(owner, stack))
