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
from transom.lens import drawing, maps
from transom.lens.look import LENSES, look
from transom.measure.preprocessing import Preprocessing

FITTED = "fates"


CASES = [("timm-class", lens) for lens in LENSES] + [
    ("timm-registers", "sinks"),
    ("hf-vit", "heads"),
    ("hf-clip-vision", "rollout"),
]


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
    assert seen.summary and seen.arrays and len(seen.figures) == (1 if lens == "heads" else 2)
    page = seen.save(tmp_path, "A <title>").read_text(encoding="utf-8")
    assert "A &lt;title&gt;" in page and not re.search(r"(src|href)=\"(?!data:)", page)
    assert page.count("data:image/png;base64,") == sum(len(p.frames) for p in seen.panels)
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
    from transom.lens.look import _sinks

    seen = _sinks(found, ["one"], [np.zeros((32, 32, 3), dtype=np.uint8)])
    assert seen.arrays["sinks"][0, 0].nonzero()[0].tolist() == [5]
    assert "1.0 sinks an image get 50 %" in seen.summary[0]


def test_fates_show_what_was_dropped() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")[:1]
    transom.apply(model, "evit", keep_rate=0.5, fuse_token=False, layers=(1,))
    seen = look(model, x, "fates")
    dropped = int((seen.arrays["index"][-1] < 0).sum())
    assert dropped == 8 and "8 were dropped" in seen.summary[1]


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
        look(model, x, "rollout")
    with pytest.raises(HostError):
        look(torch.nn.Linear(2, 2), x)
    assert transom.look is look
