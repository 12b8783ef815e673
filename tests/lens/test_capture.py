"""Seeing and changing what blocks hold: nothing else changes, and nothing stays behind."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor

import transom
from tests.common.cases import anatomy, close, same
from tests.common.hosts import DEPTH, HOSTS, call, images
from tests.zoo.test_decoders import TEXT, llava, seeing, words
from transom import hosts
from transom.errors import HostError, SettingsError, TokensError
from transom.lens.capture import ablate
from transom.slots import BlockFlow, Restore
from transom.watching import INSIDE, NAMES

PARALLEL = "timm-parallel"
# Its own attention makes the matrix; watched, it is the fused one, which rounds in other places.
WRITTEN_OUT = "hf-blip"


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_capture_changes_nothing(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain, before = call(model, x), anatomy(model)
    with transom.capture(model, *(f"blocks.*.{name}" for name in NAMES)) as seen:
        watched = call(model, x)
    if host == WRITTEN_OUT:
        close(watched, plain, 1e-6)
    else:
        assert same(watched, plain)
    names = [n for n in NAMES if host != PARALLEL or not n.startswith("ffn")]
    depth = 1 + max(int(name.split(".")[1]) for name in seen)
    assert depth >= DEPTH
    assert list(seen) == [f"blocks.{i}.{name}" for i in range(depth) for name in names]
    assert anatomy(model) == before
    assert same(call(model, x), plain)


@pytest.mark.parametrize("host", ["timm-class", "timm-registers", "hf-vit", "hf-clip-vision"])
@torch.no_grad()
def test_what_is_seen_belongs_together(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    with transom.capture(model, *(f"blocks.1.{name}" for name in NAMES)) as seen:
        call(model, x)
    now = {name: seen[f"blocks.1.{name}"] for name in NAMES}
    weights = now["attention.probabilities"]
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    torch.testing.assert_close(weights @ now["attention.value"], now["attention.head_output"])
    for start, branch, end in (("pre", "attention", "mid"), ("mid", "ffn", "post")):
        torch.testing.assert_close(
            now[f"residual.{start}"] + now[f"{branch}.output"], now[f"residual.{end}"]
        )


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_decoders(name: str) -> None:
    model, given = TEXT[name](), words()
    plain = model(**given).logits
    names = [f"blocks.*.{n}" for n in NAMES]
    with transom.capture(model, *names) as seen:
        got = model(**given).logits
    real = given["attention_mask"].bool()  # a place of padding sees nothing and means nothing
    assert torch.equal(got[real], plain[real])
    weights = seen["blocks.2.attention.probabilities"]
    assert weights[0].triu(1).abs().max() == 0
    assert len(seen) == 4 * len(NAMES)
    with transom.intervene(model, {"blocks.*.attention.head_output": 1.0}):
        torch.testing.assert_close(model(**given).logits[real], plain[real])
    with transom.intervene(model, {"blocks.1.attention.head_output": ablate(heads=[1])}):
        assert not torch.allclose(model(**given).logits[real], plain[real])
    assert not transom.fittings(model)


@torch.no_grad()
def test_both_parts_of_a_model_that_sees() -> None:
    model, given = llava(), seeing("llava")
    name = "blocks.0.residual.pre"
    with (
        transom.capture(model, name, decoder=True) as tongue,
        transom.capture(model, name, decoder=False) as eye,
    ):
        model(**given)
    assert tongue[name].shape[1:] == (20, 32)
    assert eye[name].shape[1:] == (10, 16)
    assert not transom.fittings(model)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_interventions(name: str) -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    plain, before = call(model, x), anatomy(model)
    full = f"blocks.1.{name}"
    with transom.intervene(model, {full: 1.0}):
        torch.testing.assert_close(call(model, x), plain)
    with transom.intervene(model, {full: 0.5}):
        changed = call(model, x)
        with transom.capture(model, full) as seen:
            assert same(call(model, x), changed)
        held = seen[full]
    assert not same(changed, plain)
    with transom.intervene(model, {full: held}):
        torch.testing.assert_close(call(model, x), changed)
    assert anatomy(model) == before
    assert same(call(model, x), plain)


@torch.no_grad()
def test_interventions_compose() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    name = "blocks.0.residual.mid"
    with transom.intervene(model, {name: 3.0}):
        once = call(model, x)
    with transom.intervene(model, {name: lambda t: t + 1}), transom.intervene(model, {name: 3.0}):
        both = call(model, x)
    with transom.intervene(model, {name: lambda t: 3 * (t + 1)}):
        assert same(call(model, x), both)
    assert not same(once, both)


def test_an_exception_leaves_nothing_behind() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    before = anatomy(model)

    def fail(t: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError), transom.intervene(model, {"blocks.1.ffn.output": fail}):
        model(x)
    assert anatomy(model) == before
    shorter = transom.intervene(model, {"blocks.1.ffn.output": lambda t: t[:, 1:]})
    with pytest.raises(TokensError, match="shape"), shorter:
        model(x)
    assert anatomy(model) == before


@torch.no_grad()
def test_on_top_of_a_fitted_method() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    transom.apply(model, "tome", r=3)
    plain = call(model, x)
    with transom.capture(model, "blocks.*.residual.post", "blocks.2.attention.key") as seen:
        assert same(call(model, x), plain)
    counts = [seen[f"blocks.{i}.residual.post"].shape[1] for i in range(DEPTH)]
    assert counts == [14, 11, 8]
    assert seen["blocks.2.attention.key"].shape[2] == 11
    assert [f.slug for f in transom.fittings(model)] == ["tome"]


def test_gradients_flow_through_what_is_kept() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    with transom.capture(model, "blocks.0.attention.key", detach=False) as seen:
        out = model(x).sum()
    (grad,) = torch.autograd.grad(out, seen["blocks.0.attention.key"])
    assert grad.abs().max() > 0


@torch.no_grad()
def test_other_threads_are_not_watched() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    transom.apply(model, "none")
    plain = call(model, x)
    outs: list[list[Tensor]] = []
    with transom.intervene(model, {"blocks.0.residual.pre": 0.0}):
        thread = threading.Thread(target=lambda: outs.append(call(model, x)))
        thread.start()
        thread.join()
    assert same(outs[0], plain)


@pytest.mark.parametrize(
    ("name", "word"),
    [
        ("blocks.1.attention.keys", "did you mean 'attention.key'"),
        ("blocks.9.residual.pre", "blocks 0 to 2"),
        ("residual", "expected blocks.I."),
    ],
)
def test_bad_names(name: str, word: str) -> None:
    model = HOSTS["timm-class"]()
    before = anatomy(model)
    with pytest.raises(SettingsError, match=word), transom.capture(model, name):
        pass
    assert anatomy(model) == before


def test_bad_edits() -> None:
    model = HOSTS["timm-class"]()
    word = transom.intervene(model, {"blocks.0.residual.pre": "zero"})  # type: ignore[dict-item]
    with pytest.raises(SettingsError, match="expected a function"), word:
        pass
    heads = transom.intervene(model, {"blocks.0.residual.pre": ablate(heads=[0])})
    with pytest.raises(SettingsError, match="which has none"), heads:
        model(images("timm-class"))


def test_names_of_the_inside_are_names() -> None:
    assert set(INSIDE) <= set(NAMES)


def flowed(model: torch.nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Numbers of the blocks that run through the flow in one call, not through the host's own."""
    seen: list[int] = []
    run = BlockFlow._run

    def noted(self: BlockFlow, *args: object, **kwargs: object) -> object:
        seen.append(self.number)
        return run(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(BlockFlow, "_run", noted)
        call(model, x)
    return seen


@pytest.mark.parametrize("host", ["timm-class", "timm-rotary", "timm-parallel", "hf-vit"])
@torch.no_grad()
def test_blocks_that_nobody_watches_run_as_they_are(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = HOSTS[host](), images(host)
    last = DEPTH - 1
    with transom.capture(model):
        assert flowed(model, x, monkeypatch) == []
    with transom.capture(model, "blocks.1.residual.post"):
        assert flowed(model, x, monkeypatch) == [1]
        with transom.intervene(model, {f"blocks.{last}.ffn.output": 1.0}):
            assert flowed(model, x, monkeypatch) == [1, last]
        assert flowed(model, x, monkeypatch) == [1]
    transom.apply(model, "tome", r=2, where=1)
    assert flowed(model, x, monkeypatch) == list(range(1, DEPTH)), "tokens have left"
    with transom.trace(model) as trace:
        assert flowed(model, x, monkeypatch) == list(range(DEPTH))
    assert len(trace.lengths) == DEPTH


@pytest.mark.parametrize("restore", ["never", "end", "every"])
@torch.no_grad()
def test_idle_blocks_do_not_change_what_others_do(
    restore: Restore, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = HOSTS["timm-average"](), images("timm-average")
    transom.apply(model, "tome", r=2, where=1, restore=restore)
    short = call(model, x)
    monkeypatch.setattr(BlockFlow, "_idle", lambda self, call: False)
    assert same(call(model, x), short)


def test_the_check_holds_the_flow_itself_against_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HOSTS["timm-class"]()
    view = type(hosts.find(model).views[0])
    monkeypatch.setattr(view, "residual1", lambda self, y: 2 * y)
    with pytest.raises(HostError, match="changes its output"):
        transom.apply(model, "none")
