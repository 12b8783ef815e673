"""timm's transformers that carry one sequence of tokens from the first block to the last.

VisionTransformer and what is built on it, Eva, Beit, VisionTransformerRelPos, NaFlexVit, Cait and
the encoders of Qwen3 and DeepSeek. Which blocks and attentions they may hold is said in
:mod:`transom.hosts.timm_blocks` and :mod:`transom.hosts.timm_attention`. Tested with timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

from torch import nn

from transom.errors import HostError
from transom.hosts.base import Change, Host, Reads, RestoredIntermediates, example_pixels, put
from transom.hosts.timm_attention import Rotary
from transom.hosts.timm_blocks import TimmBlock, view_of
from transom.hosts.timm_families import members
from transom.slots import FittedStack

FAMILIES = (
    ("vision_transformer", "VisionTransformer"),
    ("eva", "Eva"),
    ("beit", "Beit"),
    ("vision_transformer_relpos", "VisionTransformerRelPos"),
    ("naflexvit", "NaFlexVit"),
    ("cait", "Cait"),
    ("qwen3_vit", "Qwen3VitEncoder"),
    ("deepseek_vit", "DeepseekVitEncoder"),
)
# These lay their tokens out on a grid again, whatever is made of them then.
SHOWS_TOKENS = ("NaFlexVit", "Qwen3VitEncoder", "DeepseekVitEncoder")

CLOSED = {
    "TalkingHeadAttn": {
        "attention": "its heads are mixed before and behind the softmax (talking heads), which an "
        "attention operator over q, k and v cannot do"
    },
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
    if not isinstance(root.blocks, nn.Sequential | nn.ModuleList | FittedStack) or not len(
        root.blocks
    ):
        raise HostError(
            f"{type(root).__name__}.blocks is a {type(root.blocks).__name__} of "
            f"{len(root.blocks)} blocks; expected a non-empty nn.Sequential of timm blocks"
        )
    views = [view_of(block, f"blocks.{i}") for i, block in enumerate(_blocks(root))]
    side_by_side = {view.parallel for view in views}
    if len(side_by_side) > 1:
        raise HostError(
            f"{type(root).__name__}.blocks mixes blocks with attention and ffn side by side and "
            "others; expected one kind"
        )
    # Cait's class token joins behind the blocks
    inside = family != "Cait"
    cfg = getattr(root, "pretrained_cfg", None) or {}
    size, grid = _sizes(root)
    attentions = {type(answer.module).__name__ for view in views for answer in view.answers}

    return Host(
        family=f"timm {family}",
        root=root,
        name=name,
        stack=root.blocks,
        stack_name="blocks",
        views=list(views),
        width=root.embed_dim,
        prefix=root.num_prefix_tokens if inside else 0,
        class_token=inside and _has_class_token(root),
        grid=grid,
        reads=_reads(root, family),
        architecture=str(cfg.get("architecture", "") or ""),
        example=partial(example_pixels, root, _channels(root), size),
        install=partial(_install, root, views),
        follows=_follows(root, views),
        parallel=side_by_side.pop(),
        closed={k: v for a in attentions for k, v in CLOSED.get(a, {}).items()},
    )


def _blocks(root: Any) -> Iterator[nn.Module]:
    for block in root.blocks._modules.values():
        assert block is not None
        yield block


def _has_class_token(root: Any) -> bool:
    if hasattr(root, "has_class_token"):
        return bool(root.has_class_token)
    return getattr(root, "cls_token", None) is not None


def _reads(root: Any, family: str) -> Reads:
    if family == "Cait":
        return "pooled" if root.global_pool else "tokens"  # by its class attention
    pool = getattr(root, "attn_pool", None)
    if pool is None and root.global_pool == "token":
        return "class token"
    if family in SHOWS_TOKENS or (pool is None and not root.global_pool):
        return "tokens"
    return "pooled"


def _sizes(root: Any) -> tuple[tuple[int, int], tuple[int, int] | None]:
    """Size of the images and of the grid the model was built for."""
    embed = getattr(root, "patch_embed", None)
    if embed is not None:
        size, grid = tuple(embed.img_size or (224, 224)), embed.grid_size
        return size, None if grid is None else (int(grid[0]), int(grid[1]))
    # NaFlexVit takes any size; the one of its position embeddings is as good as another
    patch, grid = root.embeds.patch_size, root.embeds.pos_embed_grid_size or (4, 4)
    return (patch[0] * grid[0], patch[1] * grid[1]), (int(grid[0]), int(grid[1]))


def _channels(root: Any) -> int:
    embed = root.patch_embed if hasattr(root, "patch_embed") else root.embeds
    for holder in (root, embed):
        if hasattr(holder, "in_chans"):
            return int(holder.in_chans)
    return next(m for m in embed.modules() if isinstance(m, nn.Conv2d)).in_channels


def _follows(root: Any, views: list[TimmBlock]) -> bool:
    if getattr(root, "rope", None) is not None:
        return True
    shared = (getattr(root, name, None) for name in ("shared_rel_pos", "rel_pos_bias"))
    own = (
        getattr(answer.module, name, None)
        for view in views
        for answer in view.answers
        if not isinstance(answer, Rotary)
        for name in ("rel_pos", "relative_position_bias_table")
    )
    return any(part is not None for part in (*shared, *own))


def _install(root: Any, views: list[TimmBlock]) -> Iterator[Change]:
    for view in views:
        for answer in view.answers:
            if "forward" in answer.module.__dict__:
                raise HostError(
                    f"an attention ({type(answer.module).__name__}) has a forward of its own put "
                    "over it; remove that first, transom would switch it off"
                )
            yield put(answer.module, "forward", answer)
    if hasattr(type(root), "forward_intermediates"):
        yield put(root, "forward_intermediates", RestoredIntermediates(root, "blocks"))
