"""What a method puts into one block, and what its parts may ask of the attention there.

The flow that runs them is in :mod:`transom.slots`, which hands these names on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from transom.errors import TokensError
from transom.instrumented import Instrumented
from transom.ops import attention
from transom.tokens import Record, Tokens
from transom.watching import BlockWatch


@dataclass
class Ask:
    """What the flow asks of one attention call, and what it gets back.

    Attributes:
        bias: (B, 1, 1, N) added to the logits of each key, and what the host adds itself; None
            for none.
        keep: whether q and k are wanted afterwards.
        operator: replaces the fused attention: (q, k, v, bias, scale, record) -> (B, H, N, d).
        record: of the tokens that enter the block; None outside a fitted stack.
        moved: whether these are no longer the tokens that the host's own mask was made for.
        home: (B, N) original positions of the tokens when they moved and the host's positions
            (rotary, relative) have to follow them; else None.
        answered: whether the attention took notice.
        q, k: (B, H, N, d) as they entered the attention, if wanted.
        scale: of the logits.
        share: (H,) part of each head in what leaves the attention, for hosts that subtract heads
            from each other; None for the same part.
        decoding: whether the queries continue a sequence whose keys are in a cache. Token steps
            do not run then.
        memory: what the block keeps from the prompt for the rest of a generation; None where
            nothing goes on after the call.
        cache: the host's cache of all its layers, where a method may put a layer of its own; None
            where nothing goes on after the call.
        place: number of this block in it.
        visual: (B, keys) bool, which keys stand for pieces of images; None when unknown.
        renumbers: whether moved tokens get the positions they now have instead of their old ones.
        watch: who wants to see, or to change, what is inside this attention.
        stream: (B, N, D) tokens as they enter the block, before its first norm.
        guests: number of tokens behind those of the host.
    """

    bias: Tensor | None = None
    keep: bool = False
    operator: Callable[..., Tensor] | None = None
    record: Record | None = None
    moved: bool = False
    home: Tensor | None = None
    answered: bool = False
    q: Tensor | None = None
    k: Tensor | None = None
    scale: float = 1.0
    share: Tensor | None = None
    decoding: bool = False
    memory: dict[str, Any] | None = None
    cache: Any = None
    place: int = 0
    visual: Tensor | None = None
    renumbers: bool = False
    watch: BlockWatch | None = None
    stream: Tensor | None = None
    guests: int = 0

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        dropout: float,
        scale: float,
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attention as asked; remembers q and k if they are wanted.

        Args:
            q, k, v: (B, H, N, d).
            dropout: probability on the attention weights.
            scale: of the logits.
            bias: (B or 1, H, N, N) that the host itself adds to the logits, such as relative
                positions, for the current tokens.

        Returns:
            (B, H, N, d).
        """
        self.answered = True
        if bias is not None:
            self.bias = bias if self.bias is None else bias + self.bias
        if self.watch is not None:
            return self._watched(self.watch, q, k, v, dropout, scale)
        if self.keep:
            self.q, self.k, self.scale = q, k, scale
        return self._attended(q, k, v, dropout, scale)

    def _attended(self, q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float) -> Tensor:
        if self.operator is not None:
            return self.operator(q, k, v, bias=self.bias, scale=scale, record=self.record)
        return attention.attend(q, k, v, self.bias, dropout=dropout, scale=scale)

    def _watched(
        self, watch: BlockWatch, q: Tensor, k: Tensor, v: Tensor, dropout: float, scale: float
    ) -> Tensor:
        """The same in front of a watch; only an edit of the probabilities leaves the fused path."""
        q = watch.at("attention.query", q)
        k = watch.at("attention.key", k)
        v = watch.at("attention.value", v)
        if self.keep:
            self.q, self.k, self.scale = q, k, scale
        out = None
        if watch.names("attention.probabilities"):
            if self.operator is not None:
                raise TokensError(
                    "a fitted method replaces the attention, so its probabilities cannot be "
                    "watched; remove the method, or watch another name"
                )
            probabilities = attention.probabilities(q, k, self.bias, scale)
            edits = watch.edits("attention.probabilities")
            probabilities = watch.at("attention.probabilities", probabilities)
            if edits:
                out = torch.dropout(probabilities, dropout, dropout > 0) @ v
        if out is None:
            out = self._attended(q, k, v, dropout, scale)
        return watch.at("attention.head_output", out)

    @property
    def plain(self) -> bool:
        """Whether the host's own attention does all that is asked."""
        untouched = not self.moved and self.bias is None and self.watch is None
        return untouched and not self.keep and not self.guests and self.operator is None

    @property
    def key(self) -> Tensor:
        """(B, N, d): keys averaged over heads, without gradient."""
        assert self.k is not None
        return self.k.detach().mean(1)

    def class_row(self) -> Tensor:
        """(B, N): attention of token 0 to every token, averaged over heads."""
        assert self.q is not None and self.k is not None
        return attention.row(self.q, self.k, self.bias, self.scale, share=self.share)


class TokenStep(Protocol):
    """Fills the slot `tokens`: runs between attention and ffn."""

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        """The tokens that go on."""


class Entrance(Protocol):
    """Fills the slot `tokens` too: what happens to the tokens at the door of a block.

    It may bring guests: tokens beside those of the host, which run through this block behind all
    others. The host's loop never sees them, and no output holds them.
    """

    def __call__(
        self, x: Tensor, guests: Tensor | None, record: Record
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens (B, N, D), changed or not, and the guests (B, G, D) of this block.

        Args:
            x: that arrive, without guests.
            guests: as they left the block before that had some; None in front of the first.
            record: of x.
        """


class Mixer(Protocol):
    """Fills the slot `attention` with another module: projections and all."""

    def __call__(self, h: Tensor, ask: Ask) -> Tensor:
        """Mixed tokens (B, N, D) from normed ones.

        `ask.record` tells their layout, and what the mixer changes there beside the features
        travels on with the tokens; `ask.bias` (B, 1, 1, N) or None has to be added to the
        logits of each key, if the mixer has logits.
        """


class Ffn(Protocol):
    """Fills the slot `ffn`."""

    def __call__(self, h: Tensor, record: Record) -> Tensor:
        """Features (B, N, D) from normed ones."""


Norm = Callable[[Tensor], Tensor]
Part = Literal["norm1", "attention", "norm2", "ffn"]


@dataclass(frozen=True)
class Fill:
    """What one method puts into one block.

    Attributes:
        tokens: the token step between attention and ffn; None leaves the slot empty.
        after: a token step behind the ffn; takes the same slot.
        enter: what happens to the tokens at the door; takes the same slot. Where it brings
            guests, the token step finds them last, and has to leave them there.
        attention: an attention operator (q, k, v, bias, scale, record) -> (B, H, N, d) between
            the host's own projections; None likewise. In decoders it gets the `ask` as well, and
            corrections of different stages (:class:`transom.instrumented.Instrumented`) share
            the slot.
        mixer: replaces the host's attention with its projections; takes the same slot.
        norms: replace the norms before attention and before the ffn; None keeps the host's.
        ffn: replaces the ffn.
        size_bias: whether log(size) is added to the logits of each key once sizes exist.
        asks: whether the token step looks at q and k.
        drops: whether the token step drops tokens instead of merging them.
        renumbers: whether tokens that are left are counted anew where positions enter the
            attention (decoders only).
    """

    tokens: TokenStep | None = None
    after: TokenStep | None = None
    enter: Entrance | None = None
    attention: Callable[..., Tensor] | None = None
    mixer: Mixer | None = None
    norms: tuple[Norm | None, Norm | None] = (None, None)
    ffn: Ffn | None = None
    size_bias: bool = False
    asks: bool = True
    drops: bool = False
    renumbers: bool = False

    def slots(self) -> set[str]:
        """Names of the slots this fill takes."""
        steps = (self.tokens, self.after, self.enter)
        taken = {
            "tokens": any(step is not None for step in steps),
            "attention": self.attention is not None or self.mixer is not None,
            "norm": self.norms != (None, None),
            "ffn": self.ffn is not None,
        }
        return {name for name, is_taken in taken.items() if is_taken}

    def parts(self) -> tuple[object, ...]:
        """Everything that fills a slot, in a fixed order; None where nothing does."""
        between = (self.attention, self.mixer, *self.norms, self.ffn)
        return (self.tokens, self.after, *between, self.enter)

    def clashes(self, other: Fill) -> set[str]:
        """Names of the slots that both take and cannot share."""
        both = self.slots() & other.slots()
        mine, theirs = self.attention, other.attention
        if isinstance(mine, Instrumented) and isinstance(theirs, Instrumented):
            both -= set() if mine.stages() & theirs.stages() else {"attention"}
        return both

    def joined(self, other: Fill) -> Fill:
        """Both fills in one block; they do not clash."""
        taken = self.slots()
        operator = self.attention if "attention" in taken else other.attention
        if isinstance(self.attention, Instrumented) and isinstance(other.attention, Instrumented):
            operator = self.attention.joined(other.attention)
        return Fill(
            tokens=self.tokens if "tokens" in taken else other.tokens,
            after=self.after if "tokens" in taken else other.after,
            enter=self.enter if "tokens" in taken else other.enter,
            attention=operator,
            mixer=self.mixer if "attention" in taken else other.mixer,
            norms=self.norms if "norm" in taken else other.norms,
            ffn=self.ffn if "ffn" in taken else other.ffn,
            size_bias=self.size_bias or other.size_bias,
            asks=self.asks if "tokens" in taken else other.asks,
            drops=self.drops or other.drops,
            renumbers=self.renumbers or other.renumbers,
        )
