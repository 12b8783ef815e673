"""Decoders of Hugging Face transformers (Llama, Qwen2, Qwen3 …), alone or in a model that sees.

A decoder is a module with token embeddings, rotary positions and one stack of pre-norm layers
whose attention is causal. Tokens may leave between its layers while a prompt is read. The layers
behind then hold fewer keys in the cache; positions and masks are gathered to match, and what the
cache does not know (which positions are left in which layer) is kept on the cache object itself,
so that it lives exactly as long as one generation. Which positions are pieces of images is told
by the model around the decoder. Tested with transformers 5.23.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.hosts.base import Change, Host, parts, put
from transom.hosts.hf_attention import Carried, register
from transom.hosts.hf_block import HfBlock
from transom.hosts.hf_common import encoders, first, stack
from transom.slots import Ask, FittedStack, Part
from transom.tokens import Record

PARTS = ("self_attn", "mlp", "input_layernorm", "post_attention_layernorm")
PLACES: dict[Part, str] = {
    "norm1": "input_layernorm",
    "attention": "self_attn",
    "norm2": "post_attention_layernorm",
    "ffn": "mlp",
}
# What a decoder itself may hold beside its layers.
ROOT = ("embed_tokens", "layers", "norm", "rotary_emb")
# Settings that name the tokens in whose place images and videos are put.
PICTURES = ("image_token_id", "image_token_index", "video_token_id", "video_token_index")

# Arguments by which a caller, or the model around the decoder, tells about the prompt: (B, N) bool
# and (B, N) int64, see :class:`transom.tokens.Record`.
_VISUAL, _WORDS = "transom_visual", "transom_words"
_KEY = "_transom"
_SHARED = -1  # beside the layers' own notes on the cache: what layers share while a step lasts


class DecoderBlock(HfBlock):
    """View of a pre-norm layer with causal attention.

    Attributes:
        place: number of the layer in the cache.
        rotary: the decoder's module that makes tables for positions.
    """

    causal = True

    def __init__(self, module: nn.Module, name: str, place: int, rotary: nn.Module) -> None:
        missing = sorted(set(PARTS) - set(dict(module.named_children())))
        if missing:
            raise HostError(
                f"{name} ({type(module).__name__}) has no {missing[0]!r}; of decoders transom fits "
                f"layers with the parts {list(PARTS)}"
            )
        parts(module, PARTS, name, parameters=True)
        super().__init__(module, name)
        self.place = place
        self.rotary = rotary
        if self.reach.replaced or self.reach.carrier != "attention_mask":
            raise HostError(
                f"{name} does not go through the attention interface of transformers, so nothing "
                "can be asked of its attention"
            )

    def part(self, name: Part) -> nn.Module | None:
        # whatever replaces the attention would have to keep the cache
        return None if name == "attention" else getattr(self.module, PLACES[name])

    def norm1(self, x: Tensor) -> Tensor:
        return getattr(self.module, PLACES["norm1"])(x)

    def residual1(self, y: Tensor) -> Tensor:
        return y

    def norm2(self, x: Tensor) -> Tensor:
        return getattr(self.module, PLACES["norm2"])(x)

    def ffn(self, h: Tensor) -> Tensor:
        return first(getattr(self.module, PLACES["ffn"])(h))

    def residual2(self, y: Tensor) -> Tensor:
        return y

    def valid(self, *args: Any, **kwargs: Any) -> Tensor | None:
        return None  # padding is in the causal mask, which follows the tokens

    def prepare(self, ask: Ask, record: Record, *args: Any, **kwargs: Any) -> Record:
        given = self.given(args, kwargs)
        cache = given.get("past_key_values")
        visual = given.get(_VISUAL)
        ask.cache, ask.place = cache, self.place
        if ask.operator is not None:
            ask.operator = partial(ask.operator, ask=ask)
        if cache is None:
            ask.memory = {}
        else:
            kept: dict[int, dict[str, Any]] = cache.__dict__.setdefault(_KEY, {_SHARED: {}})
            ask.decoding = cache.get_seq_length(self.place) > 0
            if not ask.decoding:
                kept[self.place] = {}
            ask.memory = kept.setdefault(self.place, {})
        if ask.decoding:
            ask.keep = False
            kept[_SHARED].pop("mask", None)
            if ask.operator is not None:
                ask.visual = self._continued(ask, given)
            return record
        words = given.get(_WORDS)
        # another number of them would mean a piece of a longer prompt
        if record.visual is None and visual is not None and visual.shape[1] == record.layout.count:
            record = replace(record, visual=visual, words=words)
        ask.visual = record.visual
        assert ask.memory is not None
        ask.memory["visual"] = record.visual
        ask.memory["valid"] = record.valid
        if ask.moved:
            ask.memory["home"], ask.memory["count"] = record.home, record.layout.count
        return record

    def _continued(self, ask: Ask, given: Mapping[str, Any]) -> Tensor | None:
        """(B, keys) which keys are visual, once new tokens follow those of the prompt."""
        assert ask.memory is not None
        visual = ask.memory.get("visual")
        if visual is None:
            return None
        cache = given["past_key_values"]
        keys = cache.get_seq_length(self.place) + given["position_embeddings"][0].shape[-2]
        return torch.cat([visual, visual.new_zeros(len(visual), keys - visual.shape[1])], 1)

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        given = self.given(args, kwargs)
        for told in (_VISUAL, _WORDS):
            given.pop(told, None)
        if given.get("output_attentions") and ask.operator is not None:
            raise TokensError(
                "a fitted operator replaces the attention, so output_attentions=True cannot be "
                "answered; remove the method first"
            )
        mask = given.pop("attention_mask", None)
        if isinstance(mask, Mapping):
            raise HostError("this decoder hands several masks to a layer, which is not supported")
        cache, memory = given.get("past_key_values"), ask.memory or {}
        fixed = cache is not None and cache.is_compileable
        if fixed and not (ask.plain and memory.get("home") is None):
            raise TokensError(
                f"a {type(cache).__name__} has the same room in every layer, filled or not, which "
                "a fitted method cannot follow; use the default cache"
            )
        if ask.moved:
            home = ask.home
            assert home is not None
            mask = None if mask is None else self._moved(mask, home, cache)
            self._replace(given, h, home, 0, ask)
        elif memory.get("home") is not None:
            home = memory["home"]
            if mask is not None:
                last = torch.arange(memory["count"], mask.shape[-1], device=h.device)
                mask = _columns(mask, torch.cat([home, last.expand(len(home), -1)], 1))
            assert cache is not None
            self._replace(given, h, None, cache.get_seq_length(self.place), ask)
        hidden = memory.get("valid")
        taken = set(self.reach.takes)
        passed = {k: v for k, v in given.items() if k in taken or k not in self.own}
        attention = getattr(self.module, self.reach.outer)
        watched = ask.watch is not None
        if not (watched or ask.operator or ask.keep) and ask.bias is None and hidden is None:
            ask.answered = True
            return first(attention(h, attention_mask=mask, **passed))
        past = 0 if cache is None else cache.get_seq_length(self.place)
        bias = _additive(mask, h, past)
        if hidden is not None:
            new = bias.shape[-1] - hidden.shape[1]
            hidden = torch.cat([hidden, hidden.new_ones(len(hidden), new)], 1)
            bias = bias.masked_fill(~hidden[:, None, None], torch.finfo(bias.dtype).min)
        ask.bias = None  # padding stands in the causal bias already
        return first(attention(h, attention_mask=Carried(ask, bias), **passed))

    def _moved(self, mask: Tensor, home: Tensor, cache: Any) -> Tensor:
        """The host's mask for tokens at home (B, N), made once for layers that share it."""
        shared = {} if cache is None else cache.__dict__[_KEY][_SHARED]
        if "mask" in shared:
            before, stood, gathered = shared["mask"]
            if before is mask and stood is home:
                return gathered
        gathered = _rows(_columns(mask, home), home)
        shared["mask"] = (mask, home, gathered)
        return gathered

    def _tables(self, h: Tensor, start: int, ids: Tensor, cache: Any) -> tuple[Tensor, ...]:
        """Rotary tables of ids, which count from `start`, made once for layers that share them."""
        shared = {} if cache is None else cache.__dict__[_KEY][_SHARED]
        key = (start, *ids.shape)
        if shared.get("places") != key:
            shared["places"], shared["tables"] = key, self.rotary(h, position_ids=ids)
        return shared["tables"]

    def _replace(
        self, given: dict[str, Any], h: Tensor, home: Tensor | None, start: int, ask: Ask
    ) -> None:
        """Positions of the tokens as they are now, in the place of those the host handed in."""
        if ask.renumbers:
            places = torch.arange(start, start + h.shape[1], device=h.device).expand(len(h), -1)
            axes = given["position_embeddings"][0].shape[:-3]
            told = places.expand(*axes, -1, -1)
            tables = self._tables(h, start, told, given.get("past_key_values"))
            given["position_embeddings"] = tables
            given["position_ids"] = places
        elif home is not None:
            tables = given["position_embeddings"]
            given["position_embeddings"] = tuple(_standing(x, home) for x in tables)
            ids = given.get("position_ids")
            if ids is not None:
                given["position_ids"] = ids.expand(*ids.shape[:-2], len(h), -1).gather(
                    -1, home.expand(*ids.shape[:-2], -1, -1)
                )


def _standing(table: Tensor, home: Tensor) -> Tensor:
    """Rows home (B, N) of a table (B or 1, N0, d), or of one table an axis in front of that."""
    lead, width = table.shape[:-3], table.shape[-1]
    index = home[..., None].expand(*lead, -1, -1, width)
    return table.expand(*lead, len(home), -1, -1).gather(-2, index)


def _columns(mask: Tensor, home: Tensor) -> Tensor:
    index = home[:, None, None].expand(-1, *mask.shape[1:3], -1)
    return mask.expand(len(home), -1, -1, -1).gather(-1, index)


def _rows(mask: Tensor, home: Tensor) -> Tensor:
    return mask.gather(-2, home[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[-1]))


def _additive(mask: Tensor | None, h: Tensor, past: int) -> Tensor:
    """(B or 1, 1, N, keys) to add to the logits: the host's mask, or a causal one."""
    count = h.shape[1]
    if mask is None:
        mask = h.new_ones(count, past + count, dtype=torch.bool).tril(past)[None, None]
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=h.dtype).masked_fill(~mask, torch.finfo(h.dtype).min)


class SeeingForward:
    """Forward of a model around a decoder: tells which positions stand for pieces of images."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        config: Any = module.config
        ids = {getattr(config, name, None) for name in PICTURES}
        self.pictures = sorted(i for i in ids if isinstance(i, int))

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(partial(type(self.module).forward, self.module))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        words = args[0] if args else kwargs.get("input_ids")
        if words is not None and words.shape[1] > 1:
            visual = torch.isin(words, words.new_tensor(self.pictures))
            kwargs = {**kwargs, _VISUAL: visual, _WORDS: words}
        return type(self.module).forward(self.module, *args, **kwargs)


def without_pictures(model: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
    """A prompt with its pictures deleted, for what a model would say without them.

    Args:
        model: that sees; its configuration names the tokens in whose place pictures are put.
        given: its arguments, `input_ids` (B, N) among them, with as many picture tokens in every
            text.

    Returns:
        `input_ids` and whatever else has their shape, without those tokens.

    Raises:
        TokensError: the configuration names no such tokens, there are none in the prompt, or the
            texts have different numbers of them.
    """
    config: Any = model.config
    ids = given["input_ids"]
    named = {getattr(config, name, None) for name in PICTURES}
    pictures = sorted(i for i in named if isinstance(i, int))
    seen = torch.isin(ids, ids.new_tensor(pictures))
    counts = seen.sum(1)
    if not counts.any() or (counts != counts[0]).any():
        raise TokensError(
            f"the prompts have {counts.tolist()} picture tokens (ids {pictures}); expected the "
            "same number in each, and at least one"
        )
    return {
        name: value[~seen].unflatten(0, (len(ids), -1))
        for name, value in given.items()
        if isinstance(value, Tensor) and value.shape == ids.shape
    }


def find(model: nn.Module) -> Iterator[Host]:
    """Every decoder of transformers in `model`.

    Args:
        model: any module.

    Yields:
        A host for each.

    Raises:
        HostError: one of them holds a part that is not known.
    """
    for name, module in encoders(model):
        if _decodes(module):
            yield _host(module, name, model)


def _decodes(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return {"embed_tokens", "layers", "rotary_emb"} <= set(children) and isinstance(
        children["layers"], nn.ModuleList | FittedStack
    )


def _host(root: Any, name: str, model: nn.Module) -> Host:
    config = root.config
    parts(root, ROOT, name or type(root).__name__)
    stack_name, layers = stack(root)
    views = [
        DecoderBlock(layer, f"{stack_name}.{i}", i, root.rotary_emb)
        for i, layer in enumerate(layers._modules.values())
        if layer is not None
    ]
    around = _around(model, root)
    return Host(
        family=f"transformers {config.model_type}",
        root=root,
        name=name,
        stack=layers,
        stack_name=stack_name,
        views=list(views),
        width=config.hidden_size,
        prefix=0,
        class_token=False,
        grid=None,
        reads="class token",  # generation reads the last token alone
        architecture=config.model_type,
        example=partial(_text, root),
        install=partial(_install, views, around),
        follows=True,
        modality="text",
        decodes=True,
    )


def _around(model: nn.Module, root: nn.Module) -> nn.Module | None:
    """The module that puts image features among the words for this decoder, if there is one."""
    for module in model.modules():
        sees = hasattr(module, "get_placeholder_mask") and "config" in module.__dict__
        if sees and any(child is root for _, child in module.named_children()):
            return module
    return None


def _install(views: list[DecoderBlock], around: nn.Module | None) -> Iterator[Change]:
    register()
    for view in views:
        yield from view.reach.install(view.module)
    if around is not None:
        if "forward" in around.__dict__:
            raise HostError(
                f"{type(around).__name__} has a forward of its own put over it; remove that first"
            )
        yield put(around, "forward", SeeingForward(around))


def _text(root: Any) -> Mapping[str, Any]:
    """Two texts, the shorter one padded on the right, where every query still sees a word."""
    config = root.config
    length = min(12, config.max_position_embeddings - 1)
    words = torch.arange(2 * length).reshape(2, length) % config.vocab_size
    mask = torch.ones_like(words)
    mask[1, length - 3 :] = 0
    device = next(root.parameters()).device
    return {
        "input_ids": words.to(device),
        "attention_mask": mask.to(device),
        "use_cache": False,
    }
