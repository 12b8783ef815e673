"""CLIP's text tower in Hugging Face transformers: pre-norm blocks whose tokens look backwards.

The first token starts the text and is protected; the first end-of-text token is read. What stands
behind the end cannot reach it, so all of that is padding here, whatever the mask says, and a text
comes out the same however far it is padded. A fitted block still sees by the original places of
its tokens what is before what. A model that holds a vision encoder is taken by that one; pass the
text tower itself. Tested with transformers 5.23.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.hosts import hf_vision
from transom.hosts.base import Change, Host, parts, put
from transom.hosts.hf_attention import Carried, follow, register
from transom.hosts.hf_common import encoders, first, stack
from transom.hosts.hf_vision import PreNormBlock
from transom.slots import Ask

TYPES = ("clip_text_model",)
PARTS = ("embeddings", "encoder", "final_layer_norm")
EMBEDDINGS = ("token_embedding", "position_embedding")

# Argument by which the tower tells its blocks which tokens are not behind the end, (B, N) bool.
_REAL = "transom_real"


class BackwardBlock(PreNormBlock):
    """View of a layer whose tokens see those before them, and guests that see all."""

    native = False
    causal: ClassVar[bool] = True

    def valid(self, *args: Any, **kwargs: Any) -> Tensor | None:
        real = self.given(args, kwargs).get(_REAL)
        if real is None:
            raise TokensError(
                "a fitted method has to know where each text ends; call the text tower as a whole, "
                "with input_ids"
            )
        return real

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        given = self.given(args, kwargs)
        given.pop(_REAL, None)
        mask = given.pop("attention_mask", None)
        passed = {name: value for name, value in given.items() if name not in self.own}
        attention = getattr(self.module, self.reach.outer)
        if ask.plain:
            return first(attention(h, attention_mask=mask, **passed))
        passed.pop("is_causal", None)
        assert ask.record is not None
        bias = self._backwards(h, ask.record.layout.count, ask.guests)
        if ask.home is not None:
            bias = follow(bias, ask.home)
        return first(attention(h, attention_mask=Carried(ask, bias), **passed))

    @staticmethod
    def _backwards(h: Tensor, count: int, guests: int) -> Tensor:
        """(1, 1, N0 + G, N0 + G) to add to the logits; nobody but guests sees guests."""
        lowest = torch.finfo(h.dtype).min
        bias = h.new_full((count, count), lowest).triu(1)
        bias = F.pad(F.pad(bias, (0, guests), value=lowest), (0, 0, 0, guests))
        return bias[None, None]


class TellingForward:
    """Forward of the tower: tells its blocks where each text ends."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(partial(type(self.module).forward, self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        words = args[0] if args else kwargs.get("input_ids")
        if words is not None:
            words = words.view(-1, words.shape[-1])
            places = torch.arange(words.shape[1], device=words.device)
            kwargs = {**kwargs, _REAL: places <= self.end(words)[:, None]}
        return type(self.module).forward(self.module, *args, **kwargs)

    def end(self, words: Tensor) -> Tensor:
        """(B,) position that is read of each text (B, N); the last one where no end is found."""
        word = self.module.eos_token_id
        if word == 2:  # configurations of the first checkpoints; their end is the largest id
            return words.argmax(-1)
        ends = words == word
        return torch.where(ends.any(-1), ends.int().argmax(-1), words.shape[1] - 1)


def find(model: nn.Module) -> Iterator[Host]:
    """Every text tower of CLIP in `model`, unless it holds a vision encoder.

    Args:
        model: any module.

    Yields:
        A host for each.

    Raises:
        HostError: one of them holds a part that is not known.
    """
    found = [(name, module) for name, module in encoders(model) if _tower(module)]
    if not found or next(hf_vision.find(model), None) is not None:
        return
    for name, module in found:
        yield _host(module, name)


def _tower(module: Any) -> bool:
    children = dict(module.named_children())
    known = getattr(module.config, "model_type", "") in TYPES
    return known and set(PARTS) <= set(children) and hasattr(module, "eos_token_id")


def _host(root: Any, name: str) -> Host:
    config = root.config
    parts(root, PARTS, name or type(root).__name__, parameters=True)
    parts(root.embeddings, EMBEDDINGS, "embeddings", parameters=True)
    stack_name, layers = stack(root)
    views = [
        BackwardBlock(layer, f"{stack_name}.{i}")
        for i, layer in enumerate(layers._modules.values())
        if layer is not None
    ]
    return Host(
        family=f"transformers {config.model_type}",
        root=root,
        name=name,
        stack=layers,
        stack_name=stack_name,
        views=list(views),
        width=config.hidden_size,
        prefix=1,
        class_token=False,
        grid=None,
        reads="tokens",
        architecture=config.model_type,
        example=partial(_text, root),
        install=partial(_install, root, views),
        follows=True,
        modality="text",
        causal=True,
    )


def _install(root: nn.Module, views: list[BackwardBlock]) -> Iterator[Change]:
    register()
    for view in views:
        yield from view.reach.install(view.module)
    if "forward" in root.__dict__:
        raise HostError(
            f"{type(root).__name__} has a forward of its own put over it; remove that first"
        )
    yield put(root, "forward", TellingForward(root))


def _text(root: Any) -> Mapping[str, Tensor]:
    """Two texts that end with their last token."""
    config = root.config
    length = min(12, config.max_position_embeddings)
    end = config.vocab_size - 1 if root.eos_token_id == 2 else root.eos_token_id
    words = torch.arange(2 * length).reshape(2, length) % (config.vocab_size - 1)
    words = torch.where(words == end, config.vocab_size - 2, words)
    words[:, -1] = end
    return {"input_ids": words.to(next(root.parameters()).device)}
