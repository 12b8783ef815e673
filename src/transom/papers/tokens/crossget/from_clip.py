"""Ordinary CLIP checkpoints as CLIP with cross tokens."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import HostError
from transom.papers.tokens.crossget.towers import CrossCLIP, CrossVision, QuickGELU

_TOWERS = {
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.": "visual.ln_pre.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
    "vision_model.post_layernorm.": "visual.ln_post.",
    "text_model.embeddings.token_embedding.": "token_embedding.",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers.": "transformer.resblocks.",
    "text_model.final_layer_norm.": "ln_final.",
}
_LAYER = {
    "self_attn.out_proj.": "attn.out_proj.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of CLIP (OpenAI's or transformers' names, or CrossGET's release) as ours.

    Cross tokens that are missing start at zero, as in the paper.

    Args:
        state: of both towers.

    Returns:
        For :class:`CrossCLIP`.

    Raises:
        HostError: the image tower is no vision transformer.
    """
    theirs = any(name.startswith("vision_model.") for name in state)
    state = _renamed(state) if theirs else dict(state)
    for name in ("input_resolution", "context_length", "vocab_size"):
        state.pop(name, None)  # numbers that OpenAI's files carry
    if "visual.class_embedding" not in state:
        raise HostError(
            "the state dict has no visual.class_embedding; expected both towers of a CLIP with a "
            "vision transformer, not a ResNet or a single tower"
        )
    for front, cross in (("visual.", "cross_image"), ("", "cross_text")):
        blocks = f"{front}transformer.resblocks."
        depth = 1 + max(
            int(n.removeprefix(blocks).split(".")[0]) for n in state if n.startswith(blocks)
        )
        like = state[f"{blocks}0.ln_1.weight"]
        name = f"{front}transformer.{cross}"
        state.setdefault(name, torch.zeros(1, depth, len(like), dtype=like.dtype))
    return state


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("position_ids"):
            continue
        if name in ("visual_projection.weight", "text_projection.weight"):
            new = "visual.proj" if name.startswith("visual") else "text_projection"
            out[new] = value.mT
            continue
        new = name
        for old, ours in (*_TOWERS.items(), *_LAYER.items()):
            new = new.replace(old, ours)
        if match := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", new):
            parts = [name.replace("q_proj", f"{part}_proj") for part in "qkv"]
            out[f"{match[1]}attn.in_proj_{match[2]}"] = torch.cat([state[p] for p in parts])
        elif "self_attn." not in new:
            out[new] = value
    return out


def from_transformers(
    model: nn.Module, r_image: int = 16, r_text: int = 0, *, stable: bool = True
) -> CrossCLIP:
    """CrossGET's CLIP with the weights of a transformers CLIPModel; cross tokens start at zero.

    Args:
        model: a CLIPModel. Texts have to be padded to its longest length with ids below the end
            of the text, whose id is the largest.
        r_image, r_text: tokens to remove in each layer of a tower.
        stable: ties of the matching by position.

    Returns:
        A new model, in the mode, on the device and in the dtype of `model`.

    Raises:
        HostError: it is no CLIPModel, or its activation is not one of CLIP's.
    """
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "clip":
        raise HostError(
            f"got {type(model).__name__}; expected transformers' CLIPModel with both towers"
        )
    vision, text = config.vision_config, config.text_config
    for tower, its in (("image", vision), ("text", text)):
        if 4 * its.hidden_size != its.intermediate_size:
            raise HostError(
                f"the ffn of the {tower} tower is {its.intermediate_size} wide; CrossGET's towers "
                f"have CLIP's factor of four, here {4 * its.hidden_size}"
            )
    visual = CrossVision(
        vision.image_size,
        vision.patch_size,
        vision.hidden_size,
        vision.num_hidden_layers,
        vision.num_attention_heads,
        config.projection_dim,
        r_image,
        vision.layer_norm_eps,
        stable=stable,
        act=_activation(vision.hidden_act),
    )
    made = CrossCLIP(
        visual,
        context_length=text.max_position_embeddings,
        vocab=text.vocab_size,
        width=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        embed_dim=config.projection_dim,
        r=r_text,
        norm_eps=text.layer_norm_eps,
        stable=stable,
        act=_activation(text.hidden_act),
    )
    parameter = next(model.parameters())
    made.load_state_dict(convert(model.state_dict()))
    return made.to(device=parameter.device, dtype=parameter.dtype).train(model.training)


def _activation(name: str) -> type[nn.Module]:
    known: dict[str, type[nn.Module]] = {"quick_gelu": QuickGELU, "gelu": nn.GELU}
    if name not in known:
        raise HostError(f"the activation is {name!r}; CrossGET's towers know {sorted(known)}")
    return known[name]
