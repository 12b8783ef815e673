"""Text encoders of Hugging Face transformers with post-norm blocks: BERT and its relatives.

A block normalises behind each branch, x = norm(x + attend(x)), x = norm(x + ffn(x)), and the
token step runs between the two. The first token (class token) is protected; the padding mask goes
with the tokens. Where only the class token is read, tokens are never restored; elsewhere (mean
pooling of sentence encoders, token classifiers) they are restored at the end. A model that holds
a vision encoder too is taken by its vision encoder; pass the text encoder itself if that is meant.

BLIP's text encoder looks at an image between attention and ffn of a layer. Which tokens there are
to look at, few or many, is up to the caller; the layer's own tokens are reduced behind that look.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.hosts import hf_vision
from transom.hosts.base import Change, Host, Reads, parts
from transom.hosts.hf_attention import register
from transom.hosts.hf_block import HfBlock
from transom.hosts.hf_common import arguments, encoders, first, stack, unpadded
from transom.slots import Ask

# Parts of a block whose attention and ffn close with a norm of their own, or beside them.
CLOSING = ("attention", "intermediate", "output")
BESIDE = ("attention", "sa_layer_norm", "ffn", "output_layer_norm")
LOOK = "crossattention"
WORDS = ("word_embeddings",)

# Models whose output is made of the first token alone.
CLASS_TOKEN_ONLY = (
    "BertForSequenceClassification",
    "BertForMultipleChoice",
    "BertForNextSentencePrediction",
    "RobertaForSequenceClassification",
    "RobertaForMultipleChoice",
    "XLMRobertaForSequenceClassification",
    "DistilBertForSequenceClassification",
    "DistilBertForMultipleChoice",
    "MPNetForSequenceClassification",
    "MPNetForMultipleChoice",
)


class PostNormBlock(HfBlock):
    """View of a post-norm layer. Norms and residuals are joins, so the branches are bare."""

    beside: ClassVar[tuple[str, ...]] = ()
    """Further parts that the view runs."""

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        children = dict(module.named_children())
        self.closing = "intermediate" in children
        known = (*CLOSING, *self.beside) if self.closing else BESIDE
        missing = sorted(set(known) - set(children))
        if missing:
            raise HostError(
                f"{name} ({type(module).__name__}) has no {missing[0]!r}; of text encoders transom "
                f"fits post-norm layers with the parts {list(CLOSING)} or {list(BESIDE)}"
            )
        parts(module, known, name)

    def norm1(self, x: Tensor) -> Tensor:
        return x

    def residual1(self, y: Tensor) -> Tensor:
        return y

    def join1(self, x: Tensor, y: Tensor) -> Tensor:
        module: Any = self.module
        return y if self.closing else module.sa_layer_norm(y + x)

    def norm2(self, x: Tensor) -> Tensor:
        return x

    def ffn(self, h: Tensor) -> Tensor:
        module: Any = self.module
        return module.intermediate(h) if self.closing else module.ffn(h)

    def residual2(self, y: Tensor) -> Tensor:
        return y

    def join2(self, x: Tensor, y: Tensor) -> Tensor:
        module: Any = self.module
        return module.output(y, x) if self.closing else module.output_layer_norm(y + x)

    def valid(self, *args: Any, **kwargs: Any) -> Tensor | None:
        valid = super().valid(*args, **kwargs)
        if valid is not None and not torch.compiler.is_compiling() and not valid[:, 0].all():
            raise TokensError(
                "a text of this batch begins with padding, but its first token is the class token "
                "that no method may touch; pad on the right (tokenizer.padding_side = 'right')"
            )
        return valid


class LookingBlock(PostNormBlock):
    """A layer that looks at an image behind its attention, unless there is none (BLIP)."""

    beside = (LOOK,)

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        given = self.given(args, kwargs)
        image = given.pop("encoder_hidden_states", None)
        mask = given.pop("encoder_attention_mask", None)
        if given.pop("past_key_values", None) is not None:
            raise TokensError(
                "this text model generates with a cache, word by word, and a fitted method reduces "
                "whole texts; fit the vision tower or the text encoder instead"
            )
        y = super().attend(h, ask, **given)
        if image is None:
            return y
        if mask is not None:  # the same for every word, however many of them are left
            mask = mask[..., :1, :]
        look: Any = getattr(self.module, LOOK)
        return first(look(y, attention_mask=mask, encoder_hidden_states=image))


def find(model: nn.Module) -> Iterator[Host]:
    """Every text encoder of transformers in `model`, unless it holds a vision encoder.

    Args:
        model: any module.

    Yields:
        A host for each module that owns word embeddings and a stack of post-norm layers.

    Raises:
        HostError: such an encoder is a decoder, or holds a part that is not known.
    """
    found = [(name, module) for name, module in encoders(model) if _words(module)]
    if not found or next(hf_vision.find(model), None) is not None:
        return
    for name, module in found:
        yield _host(module, name, model)


def _words(module: nn.Module) -> bool:
    embeddings = getattr(module, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        return False
    return any(name in dict(embeddings.named_children()) for name in WORDS)


def _host(root: Any, name: str, model: nn.Module) -> Host:
    config = root.config
    if getattr(config, "is_decoder", False) and "is_decoder" not in arguments(root)[0]:
        raise HostError(
            f"{type(root).__name__} is set up as a decoder (config.is_decoder): a token sees only "
            "those before it, and a merged token has no one place to stand. Decoders are not "
            "supported yet"
        )
    stack_name, layers = stack(root)
    views = [
        (LookingBlock if hasattr(layer, LOOK) else PostNormBlock)(layer, f"{stack_name}.{i}")
        for i, layer in enumerate(layers._modules.values())
        if layer is not None
    ]
    reads: Reads = "class token" if type(model).__name__ in CLASS_TOKEN_ONLY else "tokens"
    return Host(
        family=f"transformers {config.model_type}",
        root=root,
        name=name,
        stack=layers,
        stack_name=stack_name,
        views=list(views),
        width=config.hidden_size,
        prefix=1,
        class_token=True,
        grid=None,
        reads=reads,
        architecture=config.model_type,
        example=partial(_text, root, views[0].module),
        install=partial(_install, root, views),
        follows=any("position_bias" in view.own for view in views),
        modality="text",
    )


def _install(root: nn.Module, views: list[PostNormBlock]) -> Iterator[Change]:
    register()
    for view in views:
        yield from view.reach.install(view.module)
    yield from unpadded(root)


def _text(root: Any, layer: Any) -> Mapping[str, Tensor]:
    """Two texts of different length, the shorter one padded, with images where a layer looks."""
    config = root.config
    length = min(12, config.max_position_embeddings - 4)
    pad = getattr(config, "pad_token_id", None) or 0
    words = torch.arange(2 * length).reshape(2, length) % (config.vocab_size - pad - 1) + pad + 1
    mask = torch.ones_like(words)
    mask[1, length - 3 :] = 0
    device = next(root.parameters()).device
    words = words.masked_fill(mask == 0, pad)
    example = {"input_ids": words.to(device), "attention_mask": mask.to(device)}
    if hasattr(layer, LOOK):
        width, like = config.encoder_hidden_size, next(root.parameters())
        image = torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))
        example["encoder_hidden_states"] = image.to(device=device, dtype=like.dtype)
    return example
