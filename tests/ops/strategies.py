"""What hypothesis draws: matchings, metrics, and records of tokens."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn
from torch import Generator, Tensor, float32, randint, randn, randperm, stack
from torch import dtype as Dtype

from transom.ops.matching import Matching
from transom.tokens import Layout, Record, Tokens


def generator(draw: DrawFn) -> Generator:
    """Random numbers that hypothesis can repeat."""
    return Generator().manual_seed(draw(st.integers(0, 2**31)))


@st.composite
def matchings(draw: DrawFn, batch: int, count: int, prefix: int = 0) -> Matching:
    """Any matching of `count` tokens that leaves the first `prefix` alone.

    Several sources may flow into one token, and each batch item has its own matching.
    """
    loose = count - prefix
    r = draw(st.integers(0, max(loose - 1, 0)))
    rng = generator(draw)
    keep, source, into = [], [], []
    for _ in range(batch):
        order = randperm(loose, generator=rng) + prefix
        source.append(order[:r])
        front = Tensor(range(prefix)).long()
        keep.append(front.new_tensor([*front.tolist(), *order[r:].tolist()]))
        into.append(randint(prefix, max(count - r, prefix + 1), (r,), generator=rng))
    return Matching(stack(keep), stack(source), stack(into))


@st.composite
def features(draw: DrawFn, batch: int, count: int, dtype: Dtype = float32) -> Tensor:
    """(batch, count, width) with an odd or even width."""
    width = draw(st.integers(1, 9))
    return randn(batch, count, width, generator=generator(draw), dtype=dtype)


@st.composite
def sequences(draw: DrawFn, dtype: Dtype = float32) -> Tokens:
    """Tokens as they enter the first block, with provenance."""
    batch, prefix = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    h, w = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    count = prefix + h * w
    x = draw(features(batch, count, dtype))
    index = Tensor(range(count)).long().expand(batch, -1)
    return Tokens(x, Record(Layout(prefix, (h, w), count), index=index))
