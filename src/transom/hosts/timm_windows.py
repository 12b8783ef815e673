"""timm's transformers whose attention stays inside windows of the grid: Swin, Swin V2 and SAM.

Tokens travel as maps (B, H, W, C), and the windows of one block are cut across those of the next,
so every token is needed in its place and the slot `tokens` is closed. Attention, norm and ffn can
be replaced; an attention operator sees one window at a time. Tested with timm 1.0.31.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import HostError
from transom.hosts.base import Host, example_pixels, parts
from transom.hosts.timm_families import members
from transom.projections import Projections, affine, fused
from transom.slots import Ask, BlockView, FittedStack, Part
from transom.tokens import Layout, Record

FAMILIES = (
    ("swin_transformer", "SwinTransformer"),
    ("swin_transformer_v2", "SwinTransformerV2"),
    ("vision_transformer_sam", "VisionTransformerSAM"),
)
CLOSED = {
    "tokens": "its attention runs inside windows of a fixed grid, so there is no place where "
    "tokens could be merged or dropped without tearing windows apart"
}

Size = tuple[int, int]


def windows(x: Tensor, size: Size) -> Tensor:
    """Cut maps (B, H, W, C) into windows (B * windows, h * w, C); H and W are multiples."""
    batch, height, width, channels = x.shape
    x = x.view(batch, height // size[0], size[0], width // size[1], size[1], channels)
    return x.transpose(2, 3).reshape(-1, size[0] * size[1], channels)


def whole(x: Tensor, size: Size, height: int, width: int) -> Tensor:
    """Put windows (B * windows, h * w, C) together to maps (B, height, width, C)."""
    rows, columns = height // size[0], width // size[1]
    x = x.view(-1, rows, columns, size[0], size[1], x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


def padded(x: Tensor, size: Size) -> Tensor:
    """Maps (B, H, W, C) with zeros behind, so that windows cover them."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -width % size[1], 0, -height % size[0]))


def seeing(ask: Ask, size: Size) -> Ask:
    """The ask of a block, told that the tokens it meets are those of a window."""
    ask.record = Record(Layout(0, size, size[0] * size[1]))
    return ask


class WindowBlock(BlockView):
    """View of a block over maps.

    Attributes:
        module: the block.
    """

    known: ClassVar[tuple[str, ...]] = ("norm1", "attn", "drop_path1", "norm2", "mlp", "drop_path2")
    attention: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        attention: Any = self.module.attn
        parts(module, self.known, name, parameters=True)
        parts(attention, self.attention, f"{name}.attn", parameters=True)

    def part(self, name: Part) -> nn.Module | None:
        places = {"norm1": "norm1", "norm2": "norm2", "ffn": "mlp"}
        # another attention would have to know about windows
        return getattr(self.module, places[name]) if name in places else None

    def projections(self) -> Projections | None:
        m = self.module.attn
        bias = m.qkv.bias
        if getattr(m, "q_bias", None) is not None:
            bias = torch.cat((m.q_bias, m.k_bias, m.v_bias))
        return Projections(m.num_heads, *fused(m.qkv.weight, bias), affine(m.proj))

    def norm1(self, x: Tensor) -> Tensor:
        return self.module.norm1(x)

    def residual1(self, y: Tensor) -> Tensor:
        return self.module.drop_path1(y)

    def norm2(self, x: Tensor) -> Tensor:
        return self.module.norm2(x)

    def ffn(self, h: Tensor) -> Tensor:
        return self.module.mlp(h)

    def residual2(self, y: Tensor) -> Tensor:
        return self.module.drop_path2(y)

    def project(self, out: Tensor) -> Tensor:
        """Heads (B, H, N, d) to features (B, N, D)."""
        m = self.module.attn
        return m.proj_drop(m.proj(out.transpose(1, 2).flatten(2)))

    @property
    def dropout(self) -> float:
        """Probability of dropout on the attention weights now."""
        m = self.module.attn
        return m.attn_drop.p if m.training else 0.0


class SwinBlock(WindowBlock):
    """View of a block of Swin: windows, in every second block shifted by half a window."""

    attention: ClassVar[tuple[str, ...]] = (
        "qkv",
        "attn_drop",
        "proj",
        "proj_drop",
        "softmax",
        "relative_position_bias_table",
    )

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        m = self.module
        if ask.plain:
            return m._attn(h)
        height, width = h.shape[1:3]
        shift, size = m.shift_size, m.window_size
        h = padded(torch.roll(h, (-shift[0], -shift[1]), (1, 2)) if any(shift) else h, size)
        mask = m.get_attn_mask(h) if getattr(m, "dynamic_mask", False) else m.attn_mask
        full = h.shape[1:3]
        out = self.project(self.heads(windows(h, size), mask, seeing(ask, size)))
        out = whole(out, size, *full)[:, :height, :width]
        return torch.roll(out, tuple(shift), (1, 2)) if any(shift) else out

    def heads(self, x: Tensor, mask: Tensor | None, ask: Ask) -> Tensor:
        """Attention inside windows x (B * windows, N, C), as (B * windows, H, N, d)."""
        m = self.module.attn
        q, k, v = m.qkv(x).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = masked(m._get_rel_pos_bias(), mask, len(x))
        return ask.attend(q, k, v, dropout=self.dropout, scale=m.scale, bias=bias)


class SwinV2Block(SwinBlock):
    """View of a block of Swin V2: cosine attention, norms behind the branches."""

    attention = (
        *("qkv", "q_bias", "v_bias", "attn_drop", "proj", "proj_drop", "softmax"),
        *("logit_scale", "cpb_mlp"),
    )

    def part(self, name: Part) -> nn.Module | None:
        return None if name.startswith("norm") else super().part(name)

    def norm1(self, x: Tensor) -> Tensor:
        return x

    def residual1(self, y: Tensor) -> Tensor:
        return self.module.drop_path1(self.module.norm1(y))

    def norm2(self, x: Tensor) -> Tensor:
        return x

    def residual2(self, y: Tensor) -> Tensor:
        return self.module.drop_path2(self.module.norm2(y))

    def heads(self, x: Tensor, mask: Tensor | None, ask: Ask) -> Tensor:
        m = self.module.attn
        bias = None if m.q_bias is None else torch.cat((m.q_bias, m.k_bias, m.v_bias))
        qkv = F.linear(x, m.qkv.weight, bias)
        q, k, v = qkv.unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        # the scale of each head goes into its queries: the logits are the same
        q = F.normalize(q, dim=-1) * m.logit_scale.clamp(max=math.log(100.0)).exp()
        table = m.cpb_mlp(m.relative_coords_table).view(-1, m.num_heads)
        relative = table[m.relative_position_index.flatten()]
        relative = (
            16 * relative.view(*m.relative_position_index.shape, -1).permute(2, 0, 1).sigmoid()
        )
        own = masked(relative[None], mask, len(x))
        return ask.attend(q, F.normalize(k, dim=-1), v, dropout=self.dropout, scale=1.0, bias=own)


def masked(relative: Tensor, mask: Tensor | None, count: int) -> Tensor:
    """Relative biases (1, H, N, N), with the mask (windows, N, N) of shifted windows if any.

    Returns:
        (1, H, N, N), or (count, H, N, N) for `count` windows of several images.
    """
    if mask is None:
        return relative
    both = relative + mask[:, None]
    return both.repeat(count // len(mask), 1, 1, 1)


class SamBlock(WindowBlock):
    """View of a block of SAM: windows in most blocks, the whole map in some."""

    known = (*WindowBlock.known, "ls1", "ls2")
    attention = (
        *("qkv", "q_norm", "k_norm", "attn_drop", "proj", "proj_drop"),
        *("rel_pos_h", "rel_pos_w", "rope"),
    )

    def residual1(self, y: Tensor) -> Tensor:
        return self.module.drop_path1(self.module.ls1(y))

    def residual2(self, y: Tensor) -> Tensor:
        return self.module.drop_path2(self.module.ls2(y))

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        m = self.module
        height, width = h.shape[1:3]
        size = (m.window_size, m.window_size) if m.window_size else (height, width)
        h = padded(h, size)
        full = h.shape[1:3]
        cut = windows(h, size)
        if ask.plain:
            out = m.attn(cut.unflatten(1, size)).flatten(1, 2)
        else:
            out = self.project(self.heads(cut, size, seeing(ask, size)))
        return whole(out, size, *full)[:, :height, :width]

    def heads(self, x: Tensor, size: Size, ask: Ask) -> Tensor:
        """Attention inside windows x (B * windows, N, C), as (B * windows, H, N, d)."""
        from timm.models.vision_transformer_sam import get_decomposed_rel_pos_bias

        m = self.module.attn
        q, k, v = m.qkv(x).unflatten(-1, (3, m.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = m.q_norm(q), m.k_norm(k)
        bias = None
        if m.use_rel_pos:
            flat = q.reshape(-1, *q.shape[2:])
            bias = get_decomposed_rel_pos_bias(flat, m.rel_pos_h, m.rel_pos_w, size, size)
            bias = bias.view(len(x), m.num_heads, *bias.shape[1:])
        elif m.rope is not None:
            from timm.layers import apply_rot_embed_cat

            rope = m.rope.get_embed()
            q, k = (apply_rot_embed_cat(t, rope).type_as(v) for t in (q, k))
        return ask.attend(q, k, v, dropout=self.dropout, scale=m.scale, bias=bias)


VIEWS: dict[str, tuple[str, type[WindowBlock]]] = {
    "SwinTransformer": ("SwinTransformerBlock", SwinBlock),
    "SwinTransformerV2": ("SwinTransformerV2Block", SwinV2Block),
    "VisionTransformerSAM": ("Block", SamBlock),
}


def find(model: nn.Module) -> Iterator[Host]:
    """Every such transformer of timm in `model`.

    Args:
        model: any module.

    Yields:
        A host for each.

    Raises:
        HostError: one of them holds a part that is not known.
    """
    for name, module, family in members(model, FAMILIES):
        yield _host(module, name, family)


def _host(root: Any, name: str, family: str) -> Host:
    if family == "VisionTransformerSAM":
        stacks = {"blocks": root.blocks}
    else:
        stacks = {f"layers.{i}.blocks": stage.blocks for i, stage in enumerate(root.layers)}
    wanted, view = VIEWS[family]
    views: list[BlockView] = []
    for place, blocks in stacks.items():
        if not isinstance(blocks, nn.Sequential | nn.ModuleList | FittedStack):
            raise HostError(f"{place} is a {type(blocks).__name__}; expected an nn.Sequential")
        for i, block in enumerate(blocks._modules.values()):
            if type(block).__name__ != wanted:
                raise HostError(
                    f"{place}.{i} is a {type(block).__name__}; expected timm's {wanted}"
                )
            assert block is not None
            views.append(view(block, f"{place}.{i}"))
    (first, stack), *more = stacks.items()
    size = tuple(getattr(root.patch_embed, "img_size", None) or (224, 224))
    cfg = getattr(root, "pretrained_cfg", None) or {}
    channels = next(m for m in root.patch_embed.modules() if isinstance(m, nn.Conv2d)).in_channels
    return Host(
        family=f"timm {family}",
        root=root,
        name=name,
        stack=stack,
        stack_name=first,
        more_stacks=tuple(more),
        views=views,
        width=root.embed_dim if isinstance(root.embed_dim, int) else root.embed_dim[0],
        prefix=0,
        class_token=False,
        grid=None,
        reads="maps",
        architecture=str(cfg.get("architecture", "") or ""),
        example=partial(example_pixels, root, channels, size),
        closed=CLOSED,
    )
