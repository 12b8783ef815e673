"""Looking into calls of a fitted host: where its tokens go, and what its blocks hold on the way.

What looks belongs to a context (`with`), not to the model: other threads do not see it, and calls
outside pay nothing for it.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transom.errors import TokensError

if TYPE_CHECKING:
    from transom.slots import FittedStack, StackState
    from transom.tokens import Record, Tokens

Edit = Callable[[Tensor], Tensor]

# Names of what a block holds, in the order in which it comes to be.
INSIDE = (
    "attention.query",
    "attention.key",
    "attention.value",
    "attention.probabilities",
    "attention.head_output",
)
NAMES = (
    "residual.pre",
    *INSIDE,
    "attention.output",
    "residual.mid",
    "ffn.input",
    "ffn.output",
    "residual.post",
)

# Tokens beside those of the host, in blocks where a method brings some.
GUESTS = "guests"


class Trace:
    """What the latest call inside :func:`transom.trace` did.

    Attributes:
        tokens: the record after each block, provenance included.
        lengths: number of tokens after each block, prefix included.
    """

    def __init__(self, stack: FittedStack) -> None:
        self.stack = stack
        self._seen: dict[int, tuple[Record, int]] = {}

    def note(self, i: int, tokens: Tokens) -> None:
        """Called by block i when it is done."""
        self._seen[i] = (tokens.record, tokens.count)

    @property
    def tokens(self) -> list[Record]:
        return [self._seen[i][0] for i in sorted(self._seen)]

    @property
    def lengths(self) -> list[int]:
        return [self._seen[i][1] for i in sorted(self._seen)]


class Watch:
    """Activations to keep, and edits of some, in calls of one host.

    Attributes:
        state: of the stacks that are watched.
        seen: what the latest call held, by full name such as "blocks.3.residual.mid".
        blocks: numbers of the blocks in which anything is to be done.
    """

    def __init__(
        self, state: StackState, wanted: frozenset[str], edits: Mapping[str, Edit], detach: bool
    ) -> None:
        self.state = state
        self.wanted = wanted
        self.edits = dict(edits)
        self.detach = detach
        self.seen: dict[str, Tensor] = {}
        self.blocks = frozenset(int(name.split(".")[1]) for name in (*wanted, *edits))

    def names(self, name: str) -> bool:
        """Whether something is to be done at this full name."""
        return name in self.wanted or name in self.edits

    def at(self, name: str, x: Tensor) -> Tensor:
        """What goes on in the place of x."""
        if name in self.edits:
            edited = self.edits[name](x)
            if not isinstance(edited, Tensor) or edited.shape != x.shape:
                got = tuple(edited.shape) if isinstance(edited, Tensor) else type(edited).__name__
                raise TokensError(
                    f"the edit at {name} returned {got}; expected a tensor of the shape "
                    f"{tuple(x.shape)} it was given"
                )
            x = edited
        if name in self.wanted:
            self.seen[name] = x.detach() if self.detach else x
        return x


class BlockWatch:
    """The watches of a context as one block sees them."""

    def __init__(self, watches: tuple[Watch, ...], number: int) -> None:
        self.watches = watches
        self.prefix = f"blocks.{number}."

    def names(self, name: str) -> bool:
        """Whether anyone is interested in this activation of the block."""
        return any(watch.names(self.prefix + name) for watch in self.watches)

    def edits(self, name: str) -> bool:
        """Whether anyone changes this activation of the block."""
        return any(self.prefix + name in watch.edits for watch in self.watches)

    @property
    def inside(self) -> bool:
        """Whether anyone is interested in what is inside the attention."""
        return any(self.names(name) for name in INSIDE)

    def at(self, name: str, x: Tensor) -> Tensor:
        """What goes on in the place of x, which the block holds under this name."""
        for watch in self.watches:
            if watch.names(self.prefix + name):
                x = watch.at(self.prefix + name, x)
        return x


_trace: contextvars.ContextVar[Trace | None] = contextvars.ContextVar("trace", default=None)
_watches: contextvars.ContextVar[tuple[Watch, ...]] = contextvars.ContextVar("watches", default=())


@contextlib.contextmanager
def tracing(stack: FittedStack) -> Iterator[Trace]:
    """Record where the tokens of calls in this context go."""
    trace = Trace(stack)
    token = _trace.set(trace)
    try:
        yield trace
    finally:
        _trace.reset(token)


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[Watch]:
    """Keep and edit activations of calls in this context; contexts inside come later."""
    token = _watches.set((*_watches.get(), watch))
    try:
        yield watch
    finally:
        _watches.reset(token)


def trace_of(stack: FittedStack) -> Trace | None:
    """The trace that calls of a stack have to fill now; compiled calls are never traced."""
    if torch.compiler.is_compiling():
        return None
    trace = _trace.get()
    return trace if trace is not None and trace.stack is stack else None


def watches_of(state: StackState) -> tuple[Watch, ...]:
    """The watches over the stacks of a state now; compiled calls are not watched."""
    if torch.compiler.is_compiling():
        return ()
    return tuple(watch for watch in _watches.get() if watch.state is state)
