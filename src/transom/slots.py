"""The pre-norm block flow and its slots, written once for every host.

A host's stack of blocks keeps its parameters and its place; three things are put over it while
something is fitted. The stack hands every loop over it fresh :class:`Bound` blocks that share one
:class:`Call`; a bound block passes that call on to its block; the block's forward is a
:class:`BlockFlow`, which runs the flow below with the host's own parts. What travels between
blocks therefore belongs to one call: threads, checkpointing, compilation and export see plain
function arguments and no shared state.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.instrumented import Instrumented
from transom.ops import attention, rows
from transom.projections import Projections
from transom.tokens import (
    Layout,
    Record,
    Tokens,
    representatives,
    restore,
    with_guests,
    without_guests,
)
from transom.watching import GUESTS, BlockWatch, trace_of, watches_of

Restore = Literal["never", "end", "every"]


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


class BlockView(ABC):
    """One block of a host as its adapter sees it. The defaults are those of a pre-norm block.

    Attributes:
        module: the block.
        native: whether the block's own forward still works while the host is fitted. It then runs
            where nothing is to be done.
    """

    module: Any
    native: ClassVar[bool] = False

    @abstractmethod
    def norm1(self, x: Tensor) -> Tensor:
        """Norm before attention."""

    @abstractmethod
    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        """Attention of the host, projection included, with what is asked."""

    @abstractmethod
    def residual1(self, y: Tensor) -> Tensor:
        """What the host does to the attention branch before it is added."""

    @abstractmethod
    def norm2(self, x: Tensor) -> Tensor:
        """Norm before the ffn."""

    @abstractmethod
    def ffn(self, h: Tensor) -> Tensor:
        """Feed-forward network."""

    @abstractmethod
    def residual2(self, y: Tensor) -> Tensor:
        """What the host does to the ffn branch before it is added."""

    def join1(self, x: Tensor, y: Tensor) -> Tensor:
        """How the attention branch y meets the stream x, both (B, N, D); post-norm happens here."""
        return x + y

    def join2(self, x: Tensor, y: Tensor) -> Tensor:
        """How the ffn branch y meets the stream x, both (B, N, D)."""
        return x + y

    def arrive(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the host's loop hands to the block, as tokens (B, N, D) with the prefix in front."""
        return x

    def depart(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Tokens (B, N, D) as the host's loop expects them back: another order, a tuple."""
        return x

    def part(self, name: Part) -> nn.Module | None:
        """The host's own module in this place, to initialise another one from.

        None if the block is not made so that it could be replaced there.
        """
        return None

    def projections(self) -> Projections | None:
        """What the host's attention projects with; None if that is not three plain linear maps."""
        return None

    def refuse(self, *args: Any, **kwargs: Any) -> None:
        """Raise if the arguments hold something for the attention that a mixer would ignore."""
        return

    def prepare(self, ask: Ask, record: Record, *args: Any, **kwargs: Any) -> Record:
        """Tell the ask, and the record of the tokens that enter, what the arguments say."""
        return record

    def valid(self, *args: Any, **kwargs: Any) -> Tensor | None:
        """(B, N) bool, False for padding, from the arguments of the block; None without any."""
        return None

    def checkpoint(self) -> Callable[..., Any] | None:
        """The host's own gradient checkpointing of this block, when it is switched on."""
        return None


class Call:
    """One pass over the stack.

    Attributes:
        records: `records[i]` is what enters block i.
        counts: tokens that enter block i; None while the sequence is the original one.
        guests: tokens beside the host's that left the block before i; None without any.
    """

    def __init__(self, stack: FittedStack, restore: Restore) -> None:
        self.stack = stack
        self.restore = restore
        self.records: list[Record | None] = [None] * (len(stack) + 1)
        self.counts: list[int | None] = [None] * (len(stack) + 1)
        self.guests: list[Tensor | None] = [None] * (len(stack) + 1)
        self.trace = trace_of(stack)
        self.watches = watches_of(stack.fitted)
        self.tracks = self.restore != "never" or self.trace is not None

    def enter(self, i: int, x: Tensor, valid: Callable[[], Tensor | None]) -> Record:
        """The record that belongs to x (B, N, D) at the door of block i.

        Args:
            i: the block; a loop may begin anywhere.
            x: features that arrive there.
            valid: tells which tokens of an original sequence are no padding.

        Raises:
            TokensError: the tokens are not those that left the block before, or too few.
        """
        record = self.records[i] if i else None
        if record is None:
            if x.dim() == 4:  # a map, whose tokens stay where they are
                return Record(Layout(0, (x.shape[1], x.shape[2]), x.shape[1] * x.shape[2]))
            record = self.records[i] = self._original(x, valid())
        expected = self.counts[i]
        if expected is None or self.restore == "every":
            expected = record.layout.count
        if x.shape[1] != expected:
            raise TokensError(
                f"block {i} got {x.shape[1]} tokens, but {expected} left the block before; "
                "something between the blocks of this host changes the sequence, which a fitted "
                "method cannot follow"
            )
        return record

    def _original(self, x: Tensor, valid: Tensor | None) -> Record:
        state = self.stack.fitted
        layout = state.layout(x.shape[1])
        patches = layout.count - layout.prefix
        if state.reduces and patches < 2:
            raise TokensError(
                f"the input gives {patches} token(s) behind the prefix, but a fitted method needs "
                "at least 2 to reduce; use a larger image or a smaller patch"
            )
        places = torch.arange(layout.count, device=x.device).expand(x.shape[0], -1)
        return Record(
            layout,
            index=places if self.tracks else None,
            valid=valid,
            home=places if state.follows else None,
        )

    def leave(self, i: int, entered: Record, tokens: Tokens) -> None:
        """Remember what leaves block i."""
        if tokens.x.dim() == 4:
            return
        self.records[i + 1] = tokens.record
        moved = tokens.record is not entered or self.counts[i] is not None
        self.counts[i + 1] = tokens.count if moved else None
        if self.trace is not None:
            self.trace.note(i, tokens)


class Bound:
    """A block of a fitted stack for one call; everything but the call is the block's own."""

    def __init__(self, block: nn.Module, call: Call, place: int) -> None:
        self.__dict__["_block"] = block
        self.__dict__["_call"] = call
        self.__dict__["_place"] = place

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self._block(x, *args, transom=(self._call, self._place), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._block, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._block, name, value)


@dataclass
class StackState:
    """What a fitted stack carries beside its blocks.

    Attributes:
        prefix: leading tokens of the host that are no patches.
        grid: (h, w) of the patches at the host's own image size.
        restore: when tokens are restored to the full sequence.
        checked: whether every block looks for values that are not finite.
        reduces: whether any block holds a token step.
        follows: whether the host's positions (rotary, relative) have to follow their tokens.
        parallel: whether attention and ffn of the host run side by side.
        settled: whether blocks without anything to do may run the host's own forward; not while
            the flow is held against it.
    """

    prefix: int
    grid: tuple[int, int] | None
    restore: Restore = "never"
    checked: bool = False
    reduces: bool = False
    follows: bool = False
    parallel: bool = False
    settled: bool = False

    def layout(self, count: int) -> Layout:
        """Layout of an original sequence of `count` tokens."""
        grid = self.grid
        if grid is not None and grid[0] * grid[1] != count - self.prefix:
            grid = None
        return Layout(self.prefix, grid, count)


class FittedStack(nn.Module):
    """The class a host's container of blocks has while something is fitted.

    Every iteration over it is one call, whoever runs the loop.
    """

    fitted: StackState

    def __len__(self) -> int:
        return len(self._modules)

    def _bound(self, restore: Restore | None = None) -> list[Bound]:
        call = Call(self, self.fitted.restore if restore is None else restore)
        return [Bound(b, call, i) for i, b in enumerate(self._modules.values()) if b is not None]

    def __iter__(self) -> Iterator[Bound]:
        return iter(self._bound())

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return self._bound()[place]
        return list(self._modules.values())[place]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        for block in self:
            x = block(x, *args, **kwargs)
        return x


class RestoringStack:
    """A fitted stack seen by a caller that needs the full sequence after every block."""

    def __init__(self, stack: FittedStack) -> None:
        self.stack = stack

    def __len__(self) -> int:
        return len(self.stack)

    def __iter__(self) -> Iterator[Bound]:
        return iter(self.stack._bound("every"))

    def __getitem__(self, place: slice) -> list[Bound]:
        return self.stack._bound("every")[place]


class BlockFlow:
    """Forward of a fitted block: the host's parts in the order below, with the slots filled."""

    def __init__(
        self, view: BlockView, state: StackState, place: int, name: str, number: int | None = None
    ) -> None:
        self.view = view
        self.state = state
        self.place = place
        self.number = place if number is None else number  # counted over all stacks of the host
        self.name = name
        self.fill = Fill()

    @property
    def fill(self) -> Fill:
        """What fills the slots of this block."""
        return self._fill

    @fill.setter
    def fill(self, fill: Fill) -> None:
        self._fill = fill
        self._empty = not fill.slots()

    def _idle(self, call: Call) -> bool:
        """Whether the host's own forward does all there is to do in this block."""
        if not (self._empty and self.view.native and self.state.settled):
            return False
        if call.counts[self.place] is not None or call.trace is not None:
            return False
        return not any(self.number in watch.blocks for watch in call.watches)

    def __call__(
        self, x: Tensor, *args: Any, transom: tuple[Call, int] | None = None, **kwargs: Any
    ) -> Tensor:
        if transom is None:
            raise TokensError(
                f"{self.name} was called alone while a method is fitted, so the record of its "
                "tokens is not known; loop over the stack of blocks itself, or call the model"
            )
        call, i = transom[0], self.place
        if self._idle(call):
            call.records[i + 1], call.guests[i + 1] = call.records[i], call.guests[i]
            module = self.view.module
            run: Callable[..., Tensor] = partial(type(module).forward, module, **kwargs)
        else:
            run = partial(self._run, call, **kwargs)
        checkpoint = self.view.checkpoint()
        return run(x, *args) if checkpoint is None else checkpoint(run, x, *args)

    def _run(self, call: Call, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        view, fill, i = self.view, self.fill, self.place
        x = view.arrive(x, *args, **kwargs)
        record = call.enter(i, x, lambda: view.valid(*args, **kwargs))
        full = x  # what the host's loop carries, when that is the full sequence
        count = call.counts[i]
        if call.restore == "every" and count is not None:
            assert record.index is not None
            x = rows.take(full, representatives(record.index, count))

        watch = BlockWatch(call.watches, self.number) if call.watches else None
        ask = Ask(
            keep=fill.tokens is not None and fill.asks,
            operator=fill.attention,
            record=record,
            moved=count is not None,
            home=record.home if count is not None else None,
            renumbers=fill.renumbers,
            watch=watch if watch is not None and watch.inside else None,
        )
        record = ask.record = view.prepare(ask, record, *args, **kwargs)
        step, after = (None, None) if ask.decoding else (fill.tokens, fill.after)
        host, guests = record, call.guests[i] if i else None
        if fill.enter is not None and not ask.decoding:
            x, guests = fill.enter(x, guests, record)
        if watch is not None:
            x = watch.at("residual.pre", x)
        if fill.enter is not None and guests is not None and not ask.decoding:
            x, record = self._welcome(x, guests, record, ask, watch)
        ask.stream = x if fill.attention is not None else None
        visitors, together = ask.guests, record
        size = record.size if fill.size_bias else None
        mixes = fill.mixer is not None
        if size is not None or mixes or not ask.plain:
            ask.bias = attention.key_bias(size, record.valid, x.dtype)
        norm1, norm2 = fill.norms[0] or view.norm1, fill.norms[1] or view.norm2
        if fill.mixer is not None:
            view.refuse(*args, **kwargs)
            y = fill.mixer(norm1(x), ask)
            assert ask.record is not None
            record = ask.record  # a mixer may tell the blocks behind it something
        else:
            y = view.attend(norm1(x), ask, *args, **kwargs)
        y = view.residual1(y)
        if watch is not None:
            y = watch.at("attention.output", y)
        x = view.join1(x, y)
        if watch is not None:
            x = watch.at("residual.mid", x)
        if not (mixes or ask.plain or ask.answered):
            raise HostError(
                f"the attention of {self.name} did not take notice of what is fitted; its class "
                "does not reach the attention function transom registered"
            )
        tokens = Tokens(x, record)
        if step is not None:
            tokens, full = self._step(step, tokens, ask, full, call)
        x, left = tokens.x, tokens.record
        if after is None:
            del ask  # q, k and the longer sequence need not live through the ffn
        del tokens, y
        if not self.state.parallel:
            h = norm2(x)
            if watch is not None:
                h = watch.at("ffn.input", h)
            y = view.ffn(h) if fill.ffn is None else fill.ffn(h.flatten(1, -2), left).view_as(h)
            y = view.residual2(y)
            if watch is not None:
                y = watch.at("ffn.output", y)
            x = view.join2(x, y)
        if after is not None:
            tokens, full = self._step(after, Tokens(x, left), ask, full, call)
            x, left = tokens.x, tokens.record
        if visitors:
            x, guests = x.tensor_split((x.shape[1] - visitors,), 1)
            stayed, noted = left is record, record is not together
            record = without_guests(record, visitors) if noted else host
            left = record if stayed else without_guests(left, visitors)
        call.guests[i + 1] = guests
        if watch is not None:
            x = watch.at("residual.post", x)
        call.leave(i, record, Tokens(x, left))
        return view.depart(self._shown(call, x, left, full), *args, **kwargs)

    def _welcome(
        self, x: Tensor, guests: Tensor, record: Record, ask: Ask, watch: BlockWatch | None
    ) -> tuple[Tensor, Record]:
        """The tokens with guests behind them, and their record, of which the ask is told."""
        if watch is not None:
            guests = watch.at(GUESTS, guests)
        ask.guests = guests.shape[1]
        ask.record = record = with_guests(record, ask.guests)
        ask.home = None if ask.home is None else record.home
        return torch.cat([x, guests.to(x.dtype)], 1), record

    def _step(
        self, step: TokenStep, tokens: Tokens, ask: Ask, full: Tensor, call: Call
    ) -> tuple[Tokens, Tensor]:
        """Run a token step; the second value is the full sequence where it is kept up."""
        if self.state.checked:
            self._check(tokens.x)
        done = step(tokens, ask)
        if call.restore == "every" and done.record is not tokens.record:
            full = restore(tokens.x, tokens.record, full)  # what is dropped keeps these features
        return done, full

    def _shown(self, call: Call, x: Tensor, record: Record, full: Tensor) -> Tensor:
        """What the host's loop gets to see of x."""
        if call.counts[self.place + 1] is None or call.restore == "never":
            return x
        if call.restore == "every":
            return restore(x, record, full)
        if self.place + 1 < len(call.stack):
            return x
        assert record.index is not None
        return rows.take(x, record.index)  # nothing is dropped in this mode

    def _check(self, x: Tensor) -> None:
        if not torch.isfinite(x).all():
            raise TokensError(
                f"{self.name}: the features are not finite where tokens are reduced, and merging "
                "would spread that to other tokens; look for NaN or inf in the input, the weights "
                "or a half-precision overflow"
            )
