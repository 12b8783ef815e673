"""Which blocks, which settings, and several methods side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import transom
from tests.common.cases import DROPS, MERGES, METHODS, anatomy, fitted, same, strongest
from tests.common.hosts import DEPTH, HOSTS, WIDTH, call, images
from tests.common.probes import Listen, Rebuild, Scale, WriteOut
from transom import registry
from transom.errors import CheckpointError, FitError, SettingsError

X = images("timm-class")


def lengths(model: Any) -> list[int]:
    """Tokens after each block."""
    with torch.no_grad(), transom.trace(model) as trace:
        call(model, X)
    return trace.lengths


@pytest.mark.parametrize(
    ("where", "blocks"),
    [
        (1, [1]),
        (-1, [2]),
        ([0, 2], [0, 2]),
        ((2, 0, 0), [0, 2]),
        (slice(1, None), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (None, [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
def test_where(where: Any, blocks: list[int], host: str) -> None:
    model = transom.apply(HOSTS[host](), MERGES, where=where, r=2)
    counts = [17, *lengths(model)]
    assert [i for i in range(DEPTH) if counts[i + 1] < counts[i]] == blocks


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_where_names_the_only_blocks_that_change(method: str) -> None:
    model: Any = HOSTS["timm-class"]()
    seen: list[torch.Tensor] = []
    handle = model.blocks[1].register_forward_hook(lambda m, args, out: seen.append(out))
    plain = call(model, X)
    fitted(model, method, where=2)
    call(model, X)
    assert torch.equal(seen[0], seen[-1]), "a block in front of the chosen one changed"
    handle.remove()
    everywhere = fitted(HOSTS["timm-class"](), method)
    listed = fitted(HOSTS["timm-class"](), method, where=[0, 1, 2])
    assert same(call(everywhere, X), call(listed, X))
    transom.remove(model)
    assert same(call(model, X), plain)


def test_an_instance_and_a_slug_are_the_same() -> None:
    from transom.papers.tokens.tome import ToMe

    models = [
        transom.apply(HOSTS["timm-class"](), ToMe(r=3)),
        transom.apply(HOSTS["timm-class"](), "tome", r=3),
        transom.apply(HOSTS["timm-class"](), ToMe(r=1), r=3),
    ]
    assert {transom.fittings(m)[0].method for m in models} == {ToMe(r=3)}
    with torch.no_grad():
        outs = [call(m, X) for m in models]
    assert same(outs[0], outs[1])
    assert same(outs[0], outs[2])


@pytest.mark.parametrize("method", METHODS)
def test_settings_rebuild_a_method(method: str) -> None:
    for settings in registry.methods()[method].grid(12, 196):
        built = registry.build(method, settings)
        assert registry.build(method, built.settings()) == built
        assert built == registry.build(built, {})
        hash(built)


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_a_grid_goes_from_mild_to_strong(method: str) -> None:
    left = [
        sum(lengths(transom.apply(HOSTS["timm-class"](), method, **settings)))
        for settings in registry.methods()[method].grid(DEPTH, 16)
    ]
    assert left == sorted(left, reverse=True)


@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@torch.no_grad()
def test_adjust(host: str) -> None:
    model = transom.apply(HOSTS[host](), MERGES, r=1, where=slice(0, 2), restore="never")
    first, counts = call(model, X), lengths(model)
    with transom.adjust(model, r=4) as adjustment:
        assert adjustment is not None
        assert lengths(model) == [13, 9, 9]
        with transom.adjust(model, MERGES, r=2):
            assert lengths(model) == [15, 13, 13]
        assert lengths(model) == [13, 9, 9]
        assert transom.fittings(model)[0].method.settings()["r"] == 4
    assert lengths(model) == counts == [16, 15, 15]
    assert same(call(model, X), first)

    transom.adjust(model, r=4)
    assert lengths(model) == [13, 9, 9]
    (fitting,) = transom.fittings(model)
    assert (fitting.where, fitting.restore) == ([0, 1], "never")


def test_adjust_is_undone_by_an_error_inside() -> None:
    model = transom.apply(HOSTS["timm-class"](), MERGES, r=1)
    with pytest.raises(ZeroDivisionError), transom.adjust(model, r=4):
        raise ZeroDivisionError
    assert lengths(model) == [16, 15, 14]


def test_a_method_may_go_while_it_is_adjusted() -> None:
    model = transom.apply(HOSTS["timm-class"](), MERGES, r=4, where=0)
    transom.apply(model, DROPS, keep_rate=0.5, layers=(1,))
    with transom.adjust(model, DROPS, keep_rate=0.25):
        assert lengths(model) == [13, 4, 4]
        transom.remove(model, MERGES)
        assert lengths(model) == [17, 5, 5]
    assert [f.slug for f in transom.fittings(model)] == [DROPS]
    assert lengths(model) == [17, 9, 9]
    with transom.adjust(model, keep_rate=0.25):
        transom.remove(model)
    assert not transom.fittings(model)


@torch.no_grad()
def test_two_methods_on_different_slots() -> None:
    model = HOSTS["timm-class"]()
    before, plain = anatomy(model), call(model, X)
    transom.apply(model, MERGES, r=4)
    merged = call(model, X)
    transom.apply(model, WriteOut())
    torch.testing.assert_close(call(model, X), merged, atol=1e-5, rtol=1e-5)
    transom.adjust(model, "write-out", sharpness=3.0)
    both = call(model, X)
    assert not same(both, merged)
    assert lengths(model) == [13, 9, 5]
    assert [f.slug for f in transom.fittings(model)] == [MERGES, "write-out"]

    other = transom.apply(HOSTS["timm-class"](), WriteOut(3.0))
    transom.apply(other, MERGES, r=4)
    assert same(call(other, X), both), "the order of two methods on different slots matters"

    transom.remove(model, MERGES)
    assert [f.slug for f in transom.fittings(model)] == ["write-out"]
    assert lengths(model) == [17, 17, 17]
    transom.remove(other, "write-out")
    assert same(call(other, X), merged)
    transom.remove(model)
    assert same(call(model, X), plain)
    assert anatomy(model) == before


@torch.no_grad()
def test_two_methods_share_a_slot_in_different_blocks() -> None:
    model = transom.apply(HOSTS["timm-class"](), MERGES, r=4, where=0)
    transom.apply(model, DROPS, keep_rate=0.5, layers=(1,))
    assert lengths(model) == [13, 7, 7]
    out = call(model, X)
    transom.remove(model, DROPS)
    assert lengths(model) == [13, 13, 13]
    assert not same(call(model, X), out)


@pytest.mark.parametrize("second", METHODS)
def test_a_taken_slot_is_refused(second: str) -> None:
    alone = fitted(HOSTS["timm-class"](), second)
    taken = [fill for f in transom.fittings(alone) for fill in (*f.fills, f.front)]
    slots = {slot for fill in taken for slot in fill.slots()}
    if not slots:
        pytest.skip(f"{second} fills no slot")
    model = HOSTS["timm-class"]()
    # the tokens are taken by a method that merges, any other slot by one that rebuilds the block
    if "tokens" in slots:
        fitted(model, MERGES)
    elif slots <= {"tokenizer", "position"}:
        fitted(model, second)
    else:
        transom.apply(model, Rebuild())
    (first,) = (f.slug for f in transom.fittings(model))
    before = anatomy(model)
    with torch.no_grad():
        out = call(model, X)
    with pytest.raises(FitError, match=rf"taken by {first}.*transom\.remove"):
        transom.apply(model, second, **strongest(second))
    assert [f.slug for f in transom.fittings(model)] == [first]
    assert anatomy(model) == before
    with torch.no_grad():
        assert same(call(model, X), out)


@torch.no_grad()
def test_parameters_of_a_method(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They live under one prefix, train, are saved and loaded, and go with the method."""
    known = {**registry.methods(), "scale": Scale}
    monkeypatch.setattr(registry, "methods", lambda: known)
    model = HOSTS["timm-class"]()
    before, keys, plain = anatomy(model), set(model.state_dict()), call(model, X)
    transom.apply(model, "scale")
    new = set(model.state_dict()) - keys
    assert len(new) == DEPTH
    assert all(key.startswith("transom.scale.") for key in new)
    parameter = dict(model.named_parameters())[sorted(new)[0]]
    assert parameter.shape == (WIDTH,)
    parameter.fill_(0.25)
    expected = call(model, X)
    assert not same(expected, plain)
    with pytest.raises(FitError, match="parameters of its own"):
        transom.adjust(model, "scale")

    transom.save(model, tmp_path / "scale.safetensors")
    transom.remove(model)
    assert anatomy(model) == before
    assert same(call(model, X), plain)
    transom.load(model, tmp_path / "scale.safetensors")
    assert same(call(model, X), expected)
    transom.remove(model, "scale")
    assert anatomy(model) == before


@torch.no_grad()
def test_several_methods_are_saved_together(tmp_path: Path) -> None:
    path = tmp_path / "both.safetensors"
    model = transom.apply(HOSTS["timm-class"](), MERGES, r=4, where=0)
    transom.apply(model, DROPS, keep_rate=0.5, layers=(1,))
    transom.save(model, path)
    fresh = transom.load(HOSTS["timm-class"](), path)
    assert [f.slug for f in transom.fittings(fresh)] == [MERGES, DROPS]
    assert same(call(fresh, X), call(model, X))


@torch.no_grad()
def test_a_file_that_fits_in_part_leaves_nothing_behind(tmp_path: Path) -> None:
    """The second method of the file asks for a block the host has, with a setting it has not."""
    path = tmp_path / "both.safetensors"
    model = transom.apply(HOSTS["timm-class"](), MERGES, r=4, where=0)
    transom.apply(model, Listen(), where=1)
    transom.save(model, path)
    fresh = HOSTS["timm-class"]()
    before = anatomy(fresh)
    with pytest.raises((CheckpointError, SettingsError), match="listen"):
        transom.load(fresh, path)
    assert anatomy(fresh) == before
    assert not transom.fittings(fresh)
