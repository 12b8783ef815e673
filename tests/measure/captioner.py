"""A small captioner that learns its language too well: objects that keep company in training.

Scenes are 3 x 3 cells of noise, in some of which lies the pattern of an object. Four pairs of
objects go together in training and not in the test, so that a model under noise names the partner
of what it sees. Shaped as a LLaVA: a CLIP encoder, a projector, a Llama decoder.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from transom.measure.captions import Prompt
from transom.measure.mentions import Truth, Vocabulary

OBJECTS = ["dog", "leash", "table", "fork", "boat", "oar", "bed", "pillow"]
BOS, PAD, EOS, AND, ASK, IMAGE = range(6)
FIRST = 6
PROMPT = [BOS] + [IMAGE] * 9 + [ASK]
PATTERNS = torch.randn(len(OBJECTS), 3, 4, 4, generator=torch.Generator().manual_seed(99))


class Scenes(NamedTuple):
    """there: (n, 8) bool; pixels: (n, 3, 12, 12)."""

    there: Tensor
    pixels: Tensor


def scenes(count: int, company: float, generator: torch.Generator, noise: float = 2.5) -> Scenes:
    """Scenes; `company` is how often the partner of an object is there if and only if it is."""
    half = (count, len(OBJECTS) // 2)

    def coin(p: float) -> Tensor:
        return torch.rand(half, generator=generator) < p

    first = coin(0.5)
    second = torch.where(coin(company), first, coin(0.5))
    there = torch.stack([first, second], 2).flatten(1)
    there[:, 0] |= ~there.any(1)
    cells = torch.rand(count, 9, generator=generator).argsort(1)[:, : len(OBJECTS)]
    grid = noise * torch.randn(count, 9, 3, 4, 4, generator=generator)
    index = cells[:, :, None, None, None].expand(-1, -1, 3, 4, 4)
    grid = grid.scatter_add(1, index, there[:, :, None, None, None] * PATTERNS)
    rows = grid.unflatten(1, (3, 3)).permute(0, 3, 1, 4, 2, 5)
    return Scenes(there, rows.reshape(count, 3, 12, 12))


def build() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            image_size=12, patch_size=4,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=FIRST + len(OBJECTS), hidden_size=64, intermediate_size=128,
            num_hidden_layers=3, num_attention_heads=8, num_key_value_heads=8,
            max_position_embeddings=64, bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS,
        ),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config)


def texts(there: Tensor) -> Tensor:
    """Token ids of prompts with their captions: "dog and leash", padded on the right."""
    ids = torch.full((len(there), len(PROMPT) + 2 * len(OBJECTS)), PAD)
    ids[:, : len(PROMPT)] = torch.tensor(PROMPT)
    for row, objects in zip(ids, there.tolist(), strict=True):
        said = [word for i, is_there in enumerate(objects) if is_there for word in (FIRST + i, AND)]
        row[len(PROMPT) : len(PROMPT) + len(said)] = torch.tensor([*said[:-1], EOS])
    return ids


def train(model: nn.Module, steps: int, company: float, seed: int, lr: float = 3e-3) -> nn.Module:
    """So many steps on fresh scenes."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    model.train()
    for _ in range(steps):
        made = scenes(64, company, generator)
        ids = texts(made.there)
        labels = ids.masked_fill(ids == PAD, -100)
        labels[:, : len(PROMPT)] = -100
        mask = (ids != PAD).long()
        loss = model(
            input_ids=ids, attention_mask=mask, pixel_values=made.pixels, labels=labels
        ).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def questions(made: Scenes) -> tuple[list[Prompt], Truth]:
    """One prompt a scene, and what is there."""
    ids = torch.tensor([PROMPT])
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    prompts = [Prompt(i, {**given, "pixel_values": p[None]}) for i, p in enumerate(made.pixels)]
    objects = {
        i: frozenset(name for name, is_there in zip(OBJECTS, row, strict=True) if is_there)
        for i, row in enumerate(made.there.tolist())
    }
    return prompts, Truth(objects, Vocabulary(OBJECTS), "the scenes")


def decode(ids: Tensor) -> str:
    words = {AND: "and", **{FIRST + i: name for i, name in enumerate(OBJECTS)}}
    return " ".join(words[i] for i in ids.tolist() if i in words)
