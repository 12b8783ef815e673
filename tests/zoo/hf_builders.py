"""How small transformers models with random weights are built.

Width 32, 3 blocks, images of 32 x 32 pixels in patches of 8. Every parameter is drawn anew, so
that a part which a fitted block leaves out (a bias, a layer scale, a norm) shows in the output.
Dropout is on in training mode wherever a family has it.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import transformers
from torch import nn

from tests.common.hosts import randomised

WIDTH, DEPTH, HEADS, SIZE, PATCH = 32, 3, 4, 32, 8
IMAGE_TOKEN, QUERIES = 60, 5

SETTINGS: dict[str, Any] = {
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 64,
    "mlp_ratio": 2,
    "image_size": SIZE,
    "patch_size": PATCH,
    "num_labels": 10,
    "projection_dim": 16,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "attention_dropout": 0.1,
    "drop_path_rate": 0.2,
}
WORDS: dict[str, Any] = {
    "vocab_size": 64,
    "max_position_embeddings": 48,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
}
LANGUAGE: dict[str, Any] = {**WORDS, "num_key_value_heads": HEADS, "head_dim": 8}
CLIP = "CLIPTextConfig", WORDS
BLIP_WORDS = {**WORDS, "sep_token_id": 2, "encoder_hidden_size": WIDTH}
BLIP_TEXT = "BlipTextConfig", BLIP_WORDS
LLAMA = "LlamaConfig", LANGUAGE


def configured(config: str, **changes: Any) -> Any:
    """A configuration of transformers with those of SETTINGS that it knows.

    A change to None leaves a setting as transformers has it.
    """
    known = getattr(transformers, config)
    names = {*inspect.signature(known).parameters, "num_labels"}
    chosen = {name: value for name, value in SETTINGS.items() if name in names}
    chosen.update(changes)
    return known(**{name: value for name, value in chosen.items() if value is not None})


def one(model: str, config: str, **changes: Any) -> nn.Module:
    """A model by the names of its classes."""
    return randomised(getattr(transformers, model)(configured(config, **changes)))


def joint(model: str, config: str, parts: Mapping[str, Any], **changes: Any) -> nn.Module:
    """A model of several towers, each given as the name of its configuration or as (name, {})."""
    towers = {}
    for part, given in parts.items():
        name, settings = (given, {}) if isinstance(given, str) else given
        towers[part] = configured(name, **settings)
    own = getattr(transformers, config)(**towers, **changes)
    return randomised(getattr(transformers, model)(own))


def blip_2() -> nn.Module:
    """Vision tower, Q-Former and a decoder."""
    settings: dict[str, Any] = {
        "vision_config": configured("Blip2VisionConfig").to_dict(),
        "qformer_config": configured(
            "Blip2QFormerConfig",
            vocab_size=64,
            max_position_embeddings=48,
            pad_token_id=1,
            encoder_hidden_size=WIDTH,
            cross_attention_frequency=2,
        ).to_dict(),
        "text_config": configured(
            "OPTConfig", **WORDS, ffn_dim=64, word_embed_proj_dim=WIDTH, dropout=0.1
        ).to_dict(),
        "num_query_tokens": QUERIES,
        "image_token_index": IMAGE_TOKEN,
    }
    config = transformers.Blip2Config(**settings)
    return randomised(transformers.Blip2ForConditionalGeneration(config))
