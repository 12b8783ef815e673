"""The plain ViT that several official code bases build on."""

from __future__ import annotations

from functools import partial
from typing import Any

from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from transom.watching import Trace


def build(config: dict[str, Any], **changes: Any) -> VisionTransformer:
    """timm's VisionTransformer from the configuration of a golden case."""
    names = (
        *("img_size", "patch_size", "in_chans", "num_classes", "class_token", "global_pool"),
        *("embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias"),
    )
    settings = {name: config[name] for name in names if name in config}
    norm = partial(nn.LayerNorm, eps=config.get("norm_eps", 1e-6))
    return VisionTransformer(**{**settings, "norm_layer": norm, **changes}).eval()


def sizes_and_sources(trace: Trace) -> dict[str, Tensor]:
    """Sizes and membership of the tokens behind the last block."""
    record = trace.tokens[-1]
    source = record.sources(trace.lengths[-1])
    return {
        "size": source.sum(-1, keepdim=True) if record.size is None else record.size,
        "source": source,
    }
