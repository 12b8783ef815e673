"""The travelling record through chains of merges and drops, and the way back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.strategies import DataObject
from torch import Tensor

from tests.ops.strategies import generator, matchings, sequences
from transom.ops import rows
from transom.tokens import Layout, Record, Tokens, representatives, restore

STEPS = st.integers(1, 5)


def merged(data: DataObject, tokens: Tokens, weighted: bool = True) -> Tokens:
    """`tokens` after any matching that leaves the prefix alone."""
    matching = data.draw(matchings(len(tokens.x), tokens.count, tokens.prefix))
    return tokens.merge(matching, weighted=weighted)


def reduced(data: DataObject, tokens: Tokens) -> Tokens:
    """`tokens` after one step of any kind."""
    loose = tokens.count - tokens.prefix
    kind = data.draw(st.sampled_from(["merge", "keep", "fuse"]))
    if kind == "merge" or loose < 2:
        return merged(data, tokens)
    rng = generator(data.draw)
    batch, front = len(tokens.x), torch.arange(tokens.prefix)
    stays = data.draw(st.integers(1, loose - 1))
    order = torch.stack([torch.randperm(loose, generator=rng) for _ in range(batch)])
    order = order + tokens.prefix
    index = torch.cat([front.expand(batch, -1), order[:, :stays]], 1)
    if kind == "keep":
        return tokens.keep(index)
    rest = order[:, stays:]
    return tokens.fuse(index, rest, rows.take(tokens.x, rest).mean(1, keepdim=True), rest[:, :1])


@given(st.data(), sequences(torch.float64), STEPS)
def test_sizes_sum_to_the_original_count(data: DataObject, tokens: Tokens, steps: int) -> None:
    """Through any chain of merges, and the weighted mean of all tokens stays where it was."""
    mean = tokens.x.mean(1)
    for _ in range(steps):
        tokens = merged(data, tokens)
        assert tokens.size is not None
        assert tokens.size.dtype == torch.float32
        assert tokens.size.shape == (*tokens.x.shape[:2], 1)
        assert (tokens.size.sum(1) == tokens.record.layout.count).all()
        assert (tokens.size[:, : tokens.prefix] == 1).all()
    total = (tokens.x * tokens.size).sum(1) / tokens.record.layout.count
    torch.testing.assert_close(total, mean, atol=1e-6, rtol=1e-6)


@given(st.data(), sequences(torch.float64), STEPS)
def test_a_token_is_the_mean_of_its_origins(data: DataObject, tokens: Tokens, steps: int) -> None:
    original = tokens.x
    for _ in range(steps):
        tokens = merged(data, tokens)
    member = tokens.record.sources(tokens.count).double()
    assert torch.equal(member.sum(-1, keepdim=True).float(), tokens.size)
    assert torch.equal(member.sum(1), torch.ones_like(member[:, 0]))
    expected = member @ original / member.sum(-1, keepdim=True)
    torch.testing.assert_close(tokens.x, expected, atol=1e-6, rtol=1e-6)


@given(st.data(), sequences(), STEPS)
def test_restored_tokens_have_the_features_of_their_group(
    data: DataObject, tokens: Tokens, steps: int
) -> None:
    for _ in range(steps):
        tokens = merged(data, tokens)
    full, index = restore(tokens.x, tokens.record), tokens.record.index
    assert index is not None
    assert full.shape[1] == tokens.record.layout.count
    for item in range(len(full)):
        for old, new in enumerate(index[item].tolist()):
            assert torch.equal(full[item, old], tokens.x[item, new])


@given(st.data(), sequences(), STEPS)
def test_representatives_undo_a_restoration(data: DataObject, tokens: Tokens, steps: int) -> None:
    """Merged, dropped or fused: reducing the restored sequence again gives the tokens."""
    original = tokens.x
    for _ in range(steps):
        tokens = reduced(data, tokens)
    index = tokens.record.index
    assert index is not None
    full = restore(tokens.x, tokens.record, original)
    gone = index < 0
    assert torch.equal(full[gone], original[gone])
    picked = representatives(index, tokens.count)
    assert torch.equal(rows.take(full, picked), tokens.x)
    assert torch.equal(index.gather(1, picked), torch.arange(tokens.count).expand(len(index), -1))


@given(st.data(), sequences(), STEPS)
def test_the_prefix_stays_in_front(data: DataObject, tokens: Tokens, steps: int) -> None:
    prefix, original = tokens.prefix, tokens.x
    for _ in range(steps):
        tokens = reduced(data, tokens)
    index = tokens.record.index
    assert index is not None
    assert torch.equal(tokens.x[:, :prefix], original[:, :prefix])
    assert (index[:, :prefix] == torch.arange(prefix)).all()


@given(st.data(), sequences(), STEPS)
def test_origins_cost_nothing_when_nobody_asks(
    data: DataObject, tokens: Tokens, steps: int
) -> None:
    """Without an index map the features and sizes are the same, and nothing is recorded."""
    blind = Tokens(tokens.x, replace(tokens.record, index=None))
    for _ in range(steps):
        matching = data.draw(matchings(len(tokens.x), tokens.count, tokens.prefix))
        tokens, blind = tokens.merge(matching), blind.merge(matching)
    assert blind.record.index is None
    assert torch.equal(blind.x, tokens.x)
    assert torch.equal(blind.size, tokens.size)
    with pytest.raises(ValueError, match=r"not recorded.*transom\.trace"):
        restore(blind.x, blind.record)
    with pytest.raises(ValueError, match=r"not recorded.*transom\.trace"):
        blind.record.sources(3)


@given(st.data(), sequences(torch.float64))
def test_unweighted_merges_count_sizes_too(data: DataObject, tokens: Tokens) -> None:
    for _ in range(2):
        tokens = merged(data, tokens, weighted=False)
    assert tokens.size is not None
    assert (tokens.size.sum(1) == tokens.record.layout.count).all()


@given(st.data(), sequences())
def test_every_step_returns_a_new_object(data: DataObject, tokens: Tokens) -> None:
    def copies() -> list[Tensor | None]:
        parts = (tokens.x, tokens.record.size, tokens.record.index)
        return [None if t is None else t.clone() for t in parts]

    tokens = merged(data, tokens)
    before = copies()
    for _ in range(3):
        reduced(data, tokens)
    for a, b in zip(before, copies(), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_dropped_tokens_are_zero_without_a_substitute() -> None:
    tokens = start(torch.randn(1, 5, 2)).keep(torch.tensor([[0, 3]]))
    full = restore(tokens.x, tokens.record)
    assert (full[:, [1, 2, 4]] == 0).all()
    assert torch.equal(full[:, [0, 3]], tokens.x)


def test_sizes_of_a_chain_by_hand() -> None:
    from transom.ops.matching import Matching

    tokens = start(torch.tensor([[[0.0], [2.0], [4.0], [6.0], [8.0]]]))
    one = tokens.merge(Matching(*(torch.tensor([[*i]]) for i in ((0, 1, 3, 4), (2,), (1,)))))
    assert one.x.flatten().tolist() == [0, 3, 6, 8]
    two = one.merge(Matching(*(torch.tensor([[*i]]) for i in ((0, 3), (2, 1), (1, 1)))))
    assert two.x.flatten().tolist() == [0, 5]
    assert two.size is not None
    assert two.size.flatten().tolist() == [1, 4]
    assert two.record.index is not None
    assert two.record.index.tolist() == [[0, 1, 1, 1, 1]]
    kept = two.keep(torch.tensor([[0]]))
    assert kept.record.index is not None
    assert kept.record.index.tolist() == [[0, -1, -1, -1, -1]]


def start(x: Tensor, **changes: Any) -> Tokens:
    """Tokens with one prefix token and provenance."""
    index = torch.arange(x.shape[1]).expand(len(x), -1)
    return Tokens(x, Record(Layout(1, None, x.shape[1]), index=index, **changes))
