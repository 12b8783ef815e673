"""Sparsifiner as a whole classifier, with the parameter names of the official one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.papers.attention.sparsifiner.predictor import (
    Budget,
    MaskPredictor,
    Path,
    Prediction,
    attend,
    maps,
)
from transom.registry import Backbone


class Attended(NamedTuple):
    """What an attention with predicted connectivity computes.

    Attributes:
        x: (B, N, D).
        found: the prediction.
        class_row: (B, N) attention of token 0, averaged over heads; None unless asked for.
        maps: attention matrices (B, H, N, N) over the chosen keys and over all; None likewise.
    """

    x: Tensor
    found: Prediction
    class_row: Tensor | None = None
    maps: tuple[Tensor, Tensor] | None = None


class SparseAttention(nn.Module):
    """Multi-head attention over predicted connections; token 0 sees everything.

    Args:
        dim: D.
        num_heads: H.
        predictor: with the number of tokens in it.
        qkv_bias: whether queries, keys and values have a bias.
        path: see :func:`transom.papers.attention.sparsifiner.predictor.attend`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        predictor: MaskPredictor,
        qkv_bias: bool = True,
        path: Path = "auto",
    ) -> None:
        super().__init__()
        self.num_heads, self.path = num_heads, path
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.mask_predictor = predictor

    def forward(self, x: Tensor) -> Tensor:
        """Mixed tokens (B, N, D) from x (B, N, D)."""
        return self.attended(x).x

    def attended(
        self,
        x: Tensor,
        live: Tensor | None = None,
        *,
        class_row: bool = False,
        with_maps: bool = False,
    ) -> Attended:
        """The same with what is behind it.

        Args:
            x: (B, N, D).
            live: (B, N) bool, False for tokens that are gone: their q, k and v are 0.
            class_row: whether the attention of token 0 is wanted.
            with_maps: whether the attention matrices are wanted.
        """
        qkv = self.qkv(x)
        if live is not None:
            qkv = qkv.masked_fill(~live[..., None], 0)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        scale = q.shape[-1] ** -0.5
        predictor = self.mask_predictor
        found = predictor(q, k, live)
        if predictor.phase1:
            y = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale)
        else:
            y = attend(q, k, v, found, scale=scale, path=self.path)
        row = None
        if class_row:
            row = ((q[:, :, :1] @ k.mT) * scale).softmax(-1)[:, :, 0].mean(1)
        both = maps(q, k, found, scale, 1, predictor.phase1) if with_maps else None
        y = self.proj(y.transpose(1, 2).flatten(2))
        if self.training and not predictor.phase1:
            # the choice has no gradient: only further losses train the predictor, yet it has to
            # take part in every backward pass, or training on several processes would wait for it
            y = y + 0 * found.approx.sum()
        return Attended(y, found, row, both)


class SparseBlock(Block):
    """Pre-norm block in which patches may go: what is gone is 0 from there on.

    Attributes:
        keeps: patches that stay behind this block; None leaves all that are there.
        narrowed: whether patches may be gone already.
    """

    attn: Any
    keeps: int | None = None
    narrowed: bool = False

    def forward(
        self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Tokens (B, N, D) that leave the block."""
        if attn_mask is not None or is_causal:
            raise SettingsError("Sparsifiner predicts its masks itself; it takes no other mask")
        # a token that is gone is 0 in all channels, and no other one ever is
        live = x.ne(0).any(-1) if self.narrowed else None
        done = self.attn.attended(self.norm1(x), live, class_row=self.keeps is not None)
        x = x + self.drop_path1(self.ls1(done.x))
        x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        if self.keeps is not None:
            live = stays(done.class_row, live, self.keeps)
        return x if live is None else x.masked_fill(~live[..., None], 0)


def stays(row: Tensor, live: Tensor | None, keep: int) -> Tensor:
    """(B, N) bool: token 0 and the `keep` patches it attends to most, of those still there.

    Args:
        row: (B, N) attention of token 0.
        live: (B, N) bool; None when all are there.
        keep: patches that stay.
    """
    score = row[:, 1:].detach()
    if live is not None:
        score = score.masked_fill(~live[:, 1:], -torch.inf)
    best = score.topk(min(keep, score.shape[1]), -1).indices
    kept = torch.zeros_like(score, dtype=torch.bool).scatter(-1, best, True)
    if live is not None:
        kept = kept & live[:, 1:]
    return torch.cat([torch.ones_like(kept[:, :1]), kept], 1)


class Sparsifiner(VisionTransformer):
    """Plain ViT whose attention is sparse as predicted, with or without token pruning.

    Args:
        keep_rate, coef_topk, coef_threshold, basis_threshold, score, score_threshold, prune_rows:
            see :class:`~transom.papers.attention.sparsifiner.predictor.Budget`.
        reduce_n, reduce_c, tied: of the predictor.
        token_keep_rates: part of all patches that is there behind each pruning layer, by layer or
            by pruning layer.
        pruning_layers: counted from 0.
        path: of the attention.
        **settings: of timm's VisionTransformer.
    """

    def __init__(
        self,
        keep_rate: float = 0.25,
        reduce_n: int = 6,
        reduce_c: int = 2,
        tied: bool = False,
        token_keep_rates: Sequence[float] = (),
        pruning_layers: Sequence[int] = (),
        path: Path = "auto",
        budget: Budget | None = None,
        **settings: Any,
    ) -> None:
        super().__init__(block_fn=SparseBlock, **settings)
        tokens, width = self.patch_embed.num_patches + self.num_prefix_tokens, self.embed_dim
        depth = len(self.blocks)
        rates = _rates(token_keep_rates, pruning_layers, depth)
        budget = Budget(keep_rate) if budget is None else budget
        block: Any
        for i, block in enumerate(self.blocks):
            own = block.attn
            heads = own.num_heads
            predictor = MaskPredictor(width // heads, tokens, reduce_n, reduce_c, tied, budget)
            new = SparseAttention(width, heads, predictor, own.qkv.bias is not None, path)
            new.qkv.load_state_dict(own.qkv.state_dict())
            new.proj.load_state_dict(own.proj.state_dict())
            block.attn = new
            if i in rates:
                block.keeps = math.ceil(rates[i] * self.patch_embed.num_patches)
            block.narrowed = any(layer < i for layer in rates)


def _rates(rates: Sequence[float], layers: Sequence[int], depth: int) -> dict[int, float]:
    """Part of the patches behind each pruning layer."""
    if list(layers) != sorted(set(layers)) or any(not 0 <= i < depth for i in layers):
        raise SettingsError(
            f"pruning_layers is {list(layers)}; expected rising layers from 0 to {depth - 1}"
        )
    if len(rates) == depth:
        found = {i: rates[i] for i in layers}
    elif len(rates) == len(layers):
        found = dict(zip(layers, rates, strict=True))
    else:
        raise SettingsError(
            f"token_keep_rates has {len(rates)} entries; expected one for each of {len(layers)} "
            f"pruning layers, or for each of {depth} layers"
        )
    if any(not 0 < rate <= 1 for rate in found.values()):
        raise SettingsError(f"token_keep_rates is {list(rates)}; expected parts above 0, at most 1")
    return found


WIDTHS: dict[str, dict[str, int]] = {
    "sparsifiner_deit_tiny": {"embed_dim": 192, "num_heads": 3},
    "sparsifiner_deit_small": {"embed_dim": 384, "num_heads": 6},
    "sparsifiner_deit_base": {"embed_dim": 768, "num_heads": 12},
}
BACKBONES = tuple(Backbone(name) for name in WIDTHS)

default_cfgs = generate_default_cfgs(
    {
        f"{name}.untrained": {
            "url": "",
            "num_classes": 1000,
            "input_size": (3, 224, 224),
            "pool_size": None,
            "crop_pct": 0.9,
            "interpolation": "bicubic",
            "fixed_input_size": True,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name in WIDTHS
    }
)


def _create(name: str, pretrained: bool, **settings: Any) -> Sparsifiner:
    model: Sparsifiner = build_model_with_cfg(
        Sparsifiner,
        name,
        pretrained,
        feature_cfg={"out_indices": settings.pop("out_indices", 3), "feature_cls": "getter"},
        norm_layer=settings.pop("norm_layer", partial(nn.LayerNorm, eps=1e-6)),
        **{"patch_size": 16, "depth": 12, **WIDTHS[name], **settings},
    )
    return model


@register_model
def sparsifiner_deit_tiny(pretrained: bool = False, **settings: Any) -> Sparsifiner:
    """DeiT-T/16 with predicted connections."""
    return _create("sparsifiner_deit_tiny", pretrained, **settings)


@register_model
def sparsifiner_deit_small(pretrained: bool = False, **settings: Any) -> Sparsifiner:
    """DeiT-S/16 with predicted connections."""
    return _create("sparsifiner_deit_small", pretrained, **settings)


@register_model
def sparsifiner_deit_base(pretrained: bool = False, **settings: Any) -> Sparsifiner:
    """DeiT-B/16 with predicted connections."""
    return _create("sparsifiner_deit_base", pretrained, **settings)
