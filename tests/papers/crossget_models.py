"""Small models for the tests of CrossGET, texts for them, and cross tokens as if trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.zoo.hf_zoo import FAMILIES


def clip(image_size: int = 32, patch_size: int = 8) -> Any:
    """transformers' CLIP with the ffn that CrossGET's own towers have."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 19}
    text = {**tower, **ids, "vocab_size": 20, "max_position_embeddings": 8}
    vision = {**tower, "image_size": image_size, "patch_size": patch_size}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # words that differ more than at initialisation
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def blip() -> Any:
    """BLIP with both its towers, as it matches images with texts."""
    return FAMILIES["BLIP matching"].build()


def words(count: int, length: int = 8, vocab: int = 20, end: int = 19) -> Tensor:
    """Texts that end with their last token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab - 1, (count, length), generator=generator)
    ids[:, 0], ids[:, -1] = 0, end
    return ids


def learn(model: nn.Module, scale: float = 0.5) -> None:
    """Cross tokens as if they had been trained."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".transom." in f".{name}":
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = scale * noise
