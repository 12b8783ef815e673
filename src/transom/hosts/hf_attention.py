"""How the attention of Hugging Face transformers is reached.

It is reached through the library's attention interface: each fitted attention module gets its own
copy of the configuration that names transom's function, so the model's configuration and every
other layer stay as they are. What is asked of one call travels in the place of the mask.
Attention modules that do not dispatch, or hand nothing on, get a forward of ours if they hold
nothing but the three projections. Tested with transformers 5.0 and 5.23.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.hosts.base import Change, parts, put
from transom.hosts.hf_common import ATTENTION, arguments, first, role
from transom.projections import Affine, affine, fused
from transom.slots import Ask

PROJECTIONS = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q_lin", "k_lin", "v_lin"),
    ("q", "k", "v"),
)
# One projection to q, k and v side by side, each with its heads side by side (BLIP, BLIP-2).
PACKED = ("qkv",)
# Other parts that an attention may hold: they act on q and k before, or on the output after.
BESIDE = ("q_norm", "k_norm", "dropout", "projection_dropout")
OUTPUTS = ("o_proj", "out_proj", "projection_layer", "out_lin", "o", "projection")
# Names under which an attention keeps the one inside.
INNER = ("self", "attention", "attn")
# Arguments of an attention that makes its relative positions itself (BEiT, transformers 5.0).
RELATIVE = ("relative_position_bias", "interpolate_pos_encoding", "resolution")
# Arguments with which an attention would look at something else than its own tokens.
OTHERS = {
    "encoder_hidden_states": "another sequence to look at",
    "encoder_attention_mask": "the mask of another sequence",
    "past_key_values": "a cache",
}
# Arguments of the attention interface that change its mathematics in ways we do not follow.
UNKNOWN = ("softcap", "sliding_window", "s_aux", "position_bias")


@dataclass
class Carried:
    """What travels to the attention function in one call.

    Attributes:
        ask: what the flow asks.
        bias: (B or 1, H, N, N) that the host adds to the logits of the current tokens.
        rotary: cosines and sines (B or 1, 1, N, d) of the current tokens, and the host's function
            that turns half of the channels, when the host itself rotates by nothing.
    """

    ask: Ask
    bias: Tensor | None = None
    rotary: tuple[Tensor, Tensor, Callable[[Tensor], Tensor]] | None = None

    def attend(self, q: Tensor, k: Tensor, v: Tensor, *, dropout: float, scale: float) -> Tensor:
        """Attention over q (B, H, N, d) and k, v (B, H or fewer, N, d)."""
        if k.shape[1] != q.shape[1]:  # grouped queries
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        if self.rotary is not None:
            cos, sin, half = self.rotary
            q, k = ((x * cos + half(x) * sin).to(x.dtype) for x in (q, k))
        return self.ask.attend(q, k, v, dropout=dropout, scale=scale, bias=self.bias)


def follow(bias: Tensor, home: Tensor | None) -> Tensor:
    """A bias between places, for tokens that moved.

    Args:
        bias: (B or 1, H, N0, N0) between original places.
        home: (B, N) original places of the current tokens; None when nothing moved.

    Returns:
        (B or 1, H, N, N).
    """
    if home is None:
        return bias
    item = torch.arange(home.shape[0], device=home.device)[:, None, None]
    chosen = bias.expand(home.shape[0], -1, -1, -1)[item, :, home[:, :, None], home[:, None]]
    return chosen.permute(0, 3, 1, 2)  # (B, N, N, H) -> (B, H, N, N)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Carried | None,
    *,
    base: Callable[..., Any],
    dropout: float = 0.0,
    scaling: float | None = None,
    transom: Carried | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the attention interface calls for a fitted layer."""
    carried = attention_mask if isinstance(attention_mask, Carried) else transom
    if carried is None:
        return base(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    asked = [name for name in UNKNOWN if kwargs.get(name) is not None]
    if asked or kwargs.get("is_causal"):
        raise HostError(
            f"{type(module).__name__} attends with {(asked or ['is_causal'])[0]!r}, which a fitted "
            "method does not follow"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = carried.attend(query, key, value, dropout=dropout, scale=scale)
    return out.transpose(1, 2).contiguous(), None


def sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Registered with the attention interface for hosts that run SDPA."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return _attention(module, *args, base=ALL_ATTENTION_FUNCTIONS["sdpa"], **kwargs)


def eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Registered with the attention interface for hosts that run their eager attention."""
    base = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    return _attention(module, *args, base=base, **kwargs)


FUNCTIONS = {"sdpa": sdpa, "eager": eager}


def register() -> None:
    """Make transom's functions known to the attention interface, again if they were removed."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, function in FUNCTIONS.items():
        ALL_ATTENTION_FUNCTIONS.register(f"transom_{name}", function)


class OwnAttention:
    """Forward of plain attention for modules that would not hand on what is asked."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self, hidden_states: Tensor, *args: Any, transom: Carried | None = None, **kwargs: Any
    ) -> Any:
        m: Any = self.module
        carried = transom
        for value in (*args, *kwargs.values()):
            carried = value if isinstance(value, Carried) else carried
        if carried is None:
            return type(m).forward(m, hidden_states, *args, **kwargs)
        batch, count, _ = hidden_states.shape
        followed = {"causal_attention_mask": "a causal mask", **OTHERS}
        strange = [what for name, what in followed.items() if kwargs.get(name) is not None]
        if strange:
            raise TokensError(
                f"{type(m).__name__} got {strange[0]}, which a fitted method does not follow"
            )
        heads = m.num_heads if hasattr(m, "num_heads") else m.num_attention_heads
        q, k, v = (
            x.view(batch, count, heads, -1).transpose(1, 2) for x in _projected(m, hidden_states)
        )
        p: Any = m.dropout if hasattr(m, "dropout") else m.dropout_prob
        p = p.p if isinstance(p, nn.Dropout) else p
        out = carried.attend(q, k, v, dropout=p if m.training else 0.0, scale=q.shape[-1] ** -0.5)
        out = out.transpose(1, 2).reshape(batch, count, -1)
        for name in OUTPUTS:
            out = getattr(m, name)(out) if hasattr(m, name) else out
        return out, None


class OwnWrapper:
    """Forward of what wraps an attention, for modules that would hand nothing through."""

    def __init__(self, module: nn.Module, inner: str) -> None:
        self.module = module
        self.inner = inner

    def __call__(
        self, hidden_states: Tensor, *args: Any, transom: Carried | None = None, **kwargs: Any
    ) -> Any:
        m: Any = self.module
        if transom is None:
            return type(m).forward(m, hidden_states, *args, **kwargs)
        context = first(getattr(m, self.inner)(hidden_states, transom=transom))
        return m.output(context, hidden_states)


def _projected(attention: Any, h: Tensor) -> Sequence[Tensor]:
    """q, k and v (B, N, D) of h, with a bias where one stands beside (VideoMAE, 5.0)."""
    names = projections(attention)
    if names == PACKED:
        return getattr(attention, names[0])(h).chunk(3, -1)
    found = []
    for name in names:
        out: Tensor = getattr(attention, name)(h)
        bias = getattr(attention, f"{name[0]}_bias", None)
        found.append(out if bias is None else out + bias)
    return found


def affines(attention: nn.Module) -> list[Affine]:
    """Weights and biases of the projections to q, k and v."""
    names = projections(attention)
    if names == PACKED:
        packed = getattr(attention, names[0])
        return list(fused(packed.weight, packed.bias))
    found = []
    for name in names:
        weight, bias = affine(getattr(attention, name))
        beside = getattr(attention, f"{name[0]}_bias", None)
        found.append((weight, bias if beside is None else beside.detach()))
    return found


def projections(attention: nn.Module) -> tuple[str, ...]:
    """Names of the projections to q, k and v, or of the one to all of them; empty without any."""
    children = dict(attention.named_children())
    for names in PROJECTIONS:
        if all(name in children for name in names):
            return names
    packed = children.get(PACKED[0])
    plain = isinstance(packed, nn.Linear) and packed.out_features == 3 * packed.in_features
    return PACKED if plain and "projection" in children else ()


class Reach:
    """Where the attention of one block is, and how what is asked gets there.

    Attributes:
        outer: name of the block's attention.
        inner: name of the attention inside that one; "" when it is the same.
        carrier: argument of the outer attention that is handed through to the inner one.
        takes: names of the outer attention's arguments.
        masks: whether it takes a mask.
        causal: whether its tokens see only those before them.
        replaced: whether the inner one gets a forward of ours.
        wrapped: whether the outer one does, because it would hand nothing through.
    """

    def __init__(self, block: nn.Module, name: str, causal: bool = False) -> None:
        children = dict(block.named_children())
        self.causal = causal
        self.outer = role(children, ATTENTION, "attention", name, block)
        outer = children[self.outer]
        name = f"{name}.{self.outer}"
        nested = [child for child in INNER if child in dict(outer.named_children())]
        self.inner = nested[0] if nested and not projections(outer) else ""
        inner = getattr(outer, self.inner) if self.inner else outer
        if self.inner:
            # what wraps the inner attention is run as it is
            parts(outer, (self.inner, "output", "dropout", "LayerNorm"), name)
            name = f"{name}.{self.inner}"
        self.takes, open_ = arguments(outer)
        self.masks = "attention_mask" in self.takes
        if self.inner and open_:
            self.masks |= "attention_mask" in arguments(inner)[0]
        _check(inner, name, causal)
        carriers = _carriers(outer)
        closed = set(self.takes) <= {"output_attentions", *RELATIVE} and hasattr(outer, "output")
        self.wrapped = bool(self.inner) and not carriers and closed
        if self.wrapped:
            carriers = ["transom"]
        if self.inner:
            carriers = [carrier for carrier in carriers if carrier in _carriers(inner)]
        self.replaced = not _dispatches(inner) or not carriers
        if self.replaced:
            _check_replaceable(inner, name)
            carriers = ["transom"] if self.wrapped else _carriers(outer)
        if not carriers:
            raise HostError(
                f"{name} ({type(inner).__name__}) takes neither a mask nor further arguments, so "
                "nothing can be asked of its attention"
            )
        self.carrier = carriers[0]

    def modules(self, block: nn.Module) -> tuple[nn.Module, nn.Module]:
        """The outer and the inner attention of the block."""
        outer = getattr(block, self.outer)
        return outer, getattr(outer, self.inner) if self.inner else outer

    def install(self, block: nn.Module) -> Iterator[Change]:
        """Put transom between the block and its attention function."""
        outer, inner = self.modules(block)
        if self.wrapped:
            yield put(outer, "forward", OwnWrapper(outer, self.inner))
        if self.replaced:
            yield put(inner, "forward", OwnAttention(inner))
            return
        own: Any = copy.copy(inner.config)
        own._attn_implementation_internal = f"transom_{_implementation(inner)}"
        yield put(inner, "config", own)


def _carriers(module: nn.Module) -> list[str]:
    names, open_ = arguments(module)
    return ["attention_mask"] * ("attention_mask" in names) + ["transom"] * open_


def _dispatches(attention: nn.Module) -> bool:
    forward = inspect.unwrap(type(attention).forward)
    return "ALL_ATTENTION_FUNCTIONS" in forward.__code__.co_names


def _check(attention: Any, name: str, causal: bool) -> None:
    kind = type(attention).__name__
    names = projections(attention)
    if not names:
        raise HostError(
            f"{name} is a {kind} with the parts {sorted(dict(attention.named_children()))}; "
            "expected an attention of transformers 5 with separate projections to q, k and v, or "
            "with one to all three and an output `projection`"
        )
    relative = RELATIVE[:1] if set(RELATIVE) <= set(arguments(attention)[0]) else ()
    parts(attention, (*names, *OUTPUTS, *BESIDE, *relative), name)
    own = [n for n, _ in attention.named_parameters(recurse=False) if not _beside(attention, n)]
    if own:
        raise HostError(f"{name} ({kind}) has a parameter {own[0]!r} that transom does not know")
    decodes = getattr(attention, "is_causal", False) or getattr(attention, "is_decoder", False)
    if decodes and not causal:
        raise HostError(
            f"{name} ({kind}) is causal: a token sees only those before it, and a merged token has "
            "no one place to stand. Methods for decoders fit it, others do not"
        )
    if not _dispatches(attention):
        return
    implementation = _implementation(attention)
    if implementation not in FUNCTIONS:
        raise HostError(
            f"{name} runs the attention implementation {implementation!r}; transom fits "
            f"{sorted(FUNCTIONS)}. Call model.set_attn_implementation('sdpa') first"
        )


def _beside(attention: nn.Module, parameter: str) -> bool:
    """Whether a parameter is the bias of a projection that has none of its own."""
    owner = {f"{name[0]}_bias": name for name in projections(attention)}.get(parameter)
    return owner is not None and getattr(attention, owner).bias is None


def _check_replaceable(attention: Any, name: str) -> None:
    known = (*projections(attention), *OUTPUTS, "dropout", RELATIVE[0])
    unknown = set(dict(attention.named_children())) - set(known)
    handed = {"attention_mask", "causal_attention_mask", "position_bias", "output_attentions"}
    handed |= set(OTHERS)
    unknown |= set(arguments(attention)[0]) - {*handed, *RELATIVE}
    if unknown or not any(hasattr(attention, n) for n in ("num_heads", "num_attention_heads")):
        raise HostError(
            f"{name} ({type(attention).__name__}) does not go through the attention interface of "
            "transformers, or hands nothing on to it"
            + (f", and it has {sorted(unknown)[0]!r} beside plain attention" if unknown else "")
        )


def _implementation(attention: Any) -> str:
    return (attention.config._attn_implementation or "eager").removeprefix("transom_")
