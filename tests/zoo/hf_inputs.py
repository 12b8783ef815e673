"""Arguments for small transformers models, from a batch size and a seed."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.zoo.hf_builders import IMAGE_TOKEN, PATCH, SIZE, WIDTH


def _noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def images(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": _noise(seed, count, 3, SIZE, SIZE)}


def masked_images(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {**images(count, seed), "noise": _noise(seed + 1, count, 16).sigmoid()}


def video(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {"pixel_values": _noise(seed, count, 4, 3, SIZE, SIZE)}


def sound(count: int, seed: int = 0) -> dict[str, Tensor]:
    return {"input_values": _noise(seed, count, 48, 32)}


def patches(count: int, seed: int = 0) -> dict[str, Tensor]:
    """SigLIP2: rows of patches, images of different size padded."""
    shapes = torch.tensor([[4, 4], [3, 4], [2, 5]])[torch.arange(count) % 3]
    mask = (torch.arange(16) < shapes.prod(-1)[:, None]).long()
    values = _noise(seed, count, 16, 3 * PATCH**2)
    return {"pixel_values": values, "pixel_attention_mask": mask, "spatial_shapes": shapes}


def text(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Sentences of different length, padded on the right."""
    generator = torch.Generator().manual_seed(seed)
    length = torch.tensor([14, 9, 12, 5])[torch.arange(count) % 4]
    words = torch.randint(3, 59, (count, 14), generator=generator)
    mask = (torch.arange(14) < length[:, None]).long()
    words[:, 0] = 0
    return {"input_ids": words.masked_fill(mask == 0, 1), "attention_mask": mask}


def pairs(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Images and words."""
    words = {k: v for k, v in text(count, seed).items() if k == "input_ids"}
    return {**images(count, seed), **words}


def prompt(image_tokens: int, count: int, seed: int = 0) -> dict[str, Tensor]:
    """A prompt with one image for a vision-language model."""
    words = torch.full((count, image_tokens + 4), IMAGE_TOKEN)
    words[:, :2], words[:, -2:] = 5, 7
    return {**images(count, seed), "input_ids": words}


def several(image_tokens: int, count: int, seed: int = 0) -> dict[str, Tensor]:
    """The same for models that take (B, images, 3, h, w)."""
    found = prompt(image_tokens, count, seed)
    return {**found, "pixel_values": found["pixel_values"][:, None]}


def questions(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Images, each with a text, some of them padded."""
    return {**images(count, seed), **text(count, seed)}


def told_images(count: int, seed: int = 0) -> dict[str, Tensor]:
    """Texts with the tokens of an image to look at."""
    return {**text(count, seed), "encoder_hidden_states": _noise(seed, count, 7, WIDTH)}
