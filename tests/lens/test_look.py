"""transom look: numbers are those of the model, pictures are written, and the model stays."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import transom
from tests.common.cases import anatomy
from tests.common.hosts import HOSTS, images
from transom import cli
from transom.errors import DataError, FitError, HostError, SettingsError, TokensError
from transom.lens import attending, drawing, heads, maps
from transom.lens.look import LENSES, look
from transom.measure.preprocessing import Preprocessing

FITTED = "fates"


CASES = [("timm-class", lens) for lens in LENSES] + [
    ("timm-registers", "sinks"),
    ("hf-vit", "heads"),
    ("hf-clip-vision", "rollout"),
    ("hf-vit", "concepts"),
    ("timm-average", "tree"),
]
REDUCING = {"tome": {"r": 3}, "evit": {"keep_rate": 0.6, "fuse_token": False}}
SPREAD = ("attention", "rollout", "sinks", "concepts", "tree")


@pytest.mark.parametrize(("host", "lens"), CASES)
def test_every_lens_on_hosts(host: str, lens: str, tmp_path: Path) -> None:
    model, x = HOSTS[host](), images(host)[:2]
    if lens == FITTED:
        transom.apply(model, "tome", r=3)
    before, parts = model(x), anatomy(model)
    seen = look(model, x, lens)  # type: ignore[arg-type]
    assert anatomy(model) == parts
    after = model(x)
    for one, two in zip(
        *(o if isinstance(o, tuple) else [o] for o in (before, after)), strict=True
    ):
        if isinstance(one, torch.Tensor):
            assert torch.equal(one, two)
    assert seen.summary and seen.arrays
    assert len(seen.figures) == {"heads": 1, "concepts": 3}.get(lens, 2)
    page = seen.save(tmp_path, "A <title>").read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in page and not re.search(r"(src|href)=\"(?!data:)", page)
    assert "url(" not in page and "@import" not in page and "fetch(" not in page
    assert page.count("data:image/jpeg;base64,") == sum(len(p.frames) for p in seen.panels)
    assert page.count('type="range"') == sum(len(p.frames) > 1 for p in seen.panels)
    written = sorted(tmp_path.glob("*.png"))
    assert len(written) == len(seen.figures)
    for path in written:
        with Image.open(path) as opened:
            assert np.asarray(opened.convert("RGB")).std() > 5


@torch.no_grad()
def test_attention_and_rollout_are_those_of_the_model() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    with transom.capture(model, "blocks.*.attention.probabilities") as held:
        model(x)
    a = list(held.values())
    seen = look(model, x, "attention").arrays["attention"]
    expected = torch.stack([each[:, :, 0, 1:] for each in a]).unflatten(-1, (4, 4))
    np.testing.assert_array_equal(seen, expected.numpy())
    flow = torch.eye(17).expand(len(x), -1, -1)
    for each in a:
        flow = (0.5 * each.mean(1) + 0.5 * torch.eye(17)) @ flow
    rolled = look(model, x, "rollout").arrays["rollout"][-1]
    np.testing.assert_allclose(rolled, flow[:, 0, 1:].unflatten(-1, (4, 4)).numpy(), atol=1e-6)


def test_a_sink_is_found() -> None:
    attention = torch.full((1, 2, 17, 17), 0.5 / 16)
    attention[..., 6] = 0.5
    found = maps.Maps([attention], [torch.ones(1, 17, 8)], (4, 4), 1, True)
    seen = attending.sinks(found, ["one"], [np.zeros((32, 32, 3), dtype=np.uint8)])
    assert seen.arrays["sinks"][0, 0].nonzero()[0].tolist() == [5]
    assert "1.0 sinks an image get 50 %" in seen.summary[0]


def test_fates_show_what_was_dropped() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")[:1]
    transom.apply(model, "evit", keep_rate=0.5, fuse_token=False, layers=(1,))
    seen = look(model, x, "fates")
    dropped = int((seen.arrays["index"][-1] < 0).sum())
    assert dropped == 8 and "8 were dropped" in seen.summary[1]


@pytest.mark.parametrize("slug", REDUCING)
@torch.no_grad()
def test_what_merged_and_pruned_tokens_see_is_spread_over_their_patches(slug: str) -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    transom.apply(model, slug, **REDUCING[slug])
    with transom.trace(model) as trace:
        model(x)
    with transom.capture(model, "blocks.2.attention.probabilities") as held:
        model(x)
    small = held["blocks.2.attention.probabilities"]
    index = trace.tokens[1].index
    assert index is not None and small.shape[-1] == trace.lengths[1] < 17
    seen = maps.maps_of(model, x, spread=True, residual=True)
    wide = seen.attention[2]
    for b in range(len(x)):
        for i in range(17):
            for j in range(17):
                to, of = int(index[b, i]), int(index[b, j])
                share = 0.0
                if to >= 0 and of >= 0:
                    share = small[b, :, to, of] / (index[b] == of).sum()
                torch.testing.assert_close(wide[b, :, i, j], 0 * wide[b, :, i, j] + share)
    there = index >= 0
    for values in (wide.sum(-1).mean(1), seen.rollout()[2].sum(-1)):
        torch.testing.assert_close(values, there.to(values))
    torch.testing.assert_close(seen.received().sum(-1), torch.ones(3, len(x)))
    behind = trace.tokens[2].index
    assert behind is not None and ((seen.residual[2] == 0).all(-1) == (behind < 0)).all()
    with pytest.raises(TokensError, match="removes tokens"):
        maps.maps_of(model, x)


@torch.no_grad()
def test_rollout_of_merged_tokens_is_that_of_the_tokens() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")[:1]
    transom.apply(model, "tome", r=3)
    with (
        transom.trace(model) as trace,
        transom.capture(model, "blocks.*.attention.probabilities") as held,
    ):
        model(x)
    flow, before = torch.eye(17), torch.arange(17)
    for weights, record in zip(held.values(), trace.tokens, strict=True):
        assert record.index is not None
        step = (weights[0].mean(0) + torch.eye(weights.shape[-1])) / 2
        member = torch.nn.functional.one_hot(before).float()  # of patches in tokens
        flow = member @ step @ (member.T / member.sum(0)[:, None]) @ flow
        before = record.index[0]
    rolled = maps.maps_of(model, x, spread=True).rollout()[-1]
    torch.testing.assert_close(rolled[0], flow)


@pytest.mark.parametrize("slug", REDUCING)
@pytest.mark.parametrize("lens", SPREAD)
def test_fitted_models_can_be_looked_at(slug: str, lens: str) -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    transom.apply(model, slug, **REDUCING[slug])
    before, parts = model(x), anatomy(model)
    seen = look(model, x, lens, concepts=3)  # type: ignore[arg-type]
    assert torch.equal(model(x), before) and anatomy(model) == parts
    assert all(np.isfinite(values).all() for values in seen.arrays.values())
    if lens == "concepts" and slug == "evit":
        assert (seen.arrays["weights"] == 0).any()


def test_replaced_attention_is_refused() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    transom.apply(model, "spectformer")
    with pytest.raises(TokensError, match="remove the method"):
        look(model, x, "attention")


def test_drawing() -> None:
    grey = np.full((40, 40, 3), 100, dtype=np.uint8)
    values = np.zeros((4, 4))
    values[1, 2] = 1
    drawn = drawing.overlay(grey, values).sum(-1)
    assert np.unravel_index(drawn.argmax(), drawn.shape)[0] // 10 == 1
    assert np.unravel_index(drawn.argmax(), drawn.shape)[1] // 10 == 2
    assert drawing.overlay(grey, np.ones((4, 4))).std(axis=(0, 1)).max() == 0
    wide = drawing.montage([(str(i), grey) for i in range(11)])
    assert wide.shape[1] > 9 * 128 and wide.shape[0] > 2 * 128
    marked = drawing.mark(grey, values).sum(-1)
    assert marked[10, 20] > marked[15, 25] == 300 > marked[5, 5]
    place = np.array([[0, 0], [1, -1]])
    painted = drawing.tint(grey, place, drawing.colours(2))
    assert (painted[5, 5] != painted[25, 5]).any() and (painted[5, 5] == painted[5, 30]).all()
    assert (painted[35, 35] == 40).all()


def test_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "a picture.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    words = ["look", str(picture), "--model", "transom/digits-vit", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["transom", *words, "--lens", "fates", "--method", "tome:r=2"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "tokens behind each layer" in said and "fates.html" in said
    assert (tmp_path / "out" / "fates.html").exists()
    assert (tmp_path / "out" / "fates-0-a picture.png").exists()


def test_errors_say_what_is_wrong(tmp_path: Path) -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    with pytest.raises(SettingsError, match="lenses are"):
        look(model, x, "glasses")  # type: ignore[arg-type]
    with pytest.raises(FitError, match="nothing is fitted"):
        look(model, x, "fates")
    with pytest.raises(DataError, match="no image"):
        look(model, [])
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with pytest.raises(DataError, match=r"broken\.png"):
        look(model, [broken], preprocessing=Preprocessing((32, 32)))
    transom.apply(model, "tome", r=2)
    with pytest.raises(TokensError, match="removes tokens"):
        look(model, x, "heads")
    with pytest.raises(HostError):
        look(torch.nn.Linear(2, 2), x)
    assert transom.look is look


def test_the_page_of_heads_holds_all_three_views() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    seen = look(model, x, "heads")
    figure = seen.figures["heads"]
    titles = " ".join(ax.get_title() for part in figure.subfigs for ax in part.axes)
    for words in ("importance", "by distance", "map of the heads' patterns", "seen from itself"):
        assert words in titles
    assert {"distribution", "representation", "distance", "cluster", "mass"} <= set(seen.arrays)
    model.reset_classifier(0)
    bare = look(model, x, "heads")
    assert "no classifier" in bare.summary[1] and "distribution" not in bare.arrays
    np.testing.assert_allclose(bare.arrays["representation"], seen.arrays["representation"])


def test_offsets_are_seen_from_the_patch_itself() -> None:
    right = np.zeros((12, 12))  # of a grid 3 x 4: everybody looks at the right neighbour
    for i in range(12):
        right[i, i + 1 if i % 4 < 3 else i] = 1
    found = heads.offsets(right, (3, 4))
    assert found.shape == (5, 7)
    assert found[2, 4] == 1 and found[2, 3] == 0.25 and found.sum() == 1.25
