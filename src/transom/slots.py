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
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.fills import Ask, Entrance, Ffn, Fill, Mixer, Norm, Part, TokenStep
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

__all__ = [
    "Ask",
    "BlockFlow",
    "BlockView",
    "Bound",
    "Call",
    "Entrance",
    "Ffn",
    "Fill",
    "FittedStack",
    "Mixer",
    "Norm",
    "Part",
    "Restore",
    "RestoringStack",
    "StackState",
    "TokenStep",
]

Restore = Literal["never", "end", "every"]


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
        checkpoint = self.view.checkpoint()
        if checkpoint is not None:  # a host's own forward may bring checkpoints along, so not that
            return checkpoint(partial(self._run, call, **kwargs), x, *args)
        if self._idle(call):
            call.records[i + 1], call.guests[i + 1] = call.records[i], call.guests[i]
            module = self.view.module
            return type(module).forward(module, x, *args, **kwargs)
        return self._run(call, x, *args, **kwargs)

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
