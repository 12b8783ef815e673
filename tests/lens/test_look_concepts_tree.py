"""The lenses on concepts and on dependency trees, and what their page does in a browser."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

import transom
from tests.common.hosts import HOSTS, images
from transom import cli, hosts
from transom.errors import DataError, HostError, SettingsError
from transom.lens.look import look
from transom.lens.seen import Look, Panel
from transom.papers.lens import pace
from transom.papers.tokens.dependency_vit import dependency_mask, grow


def halves(count: int = 3, seed: int = 0) -> Tensor:
    """Pictures whose left half has one texture and whose right half has another."""
    draw = torch.Generator().manual_seed(seed)
    x = 0.1 * torch.randn(count, 3, 32, 32, generator=draw)
    stripes = (torch.arange(32) // 2 % 2 * 2.0 - 1).expand(32, 32)
    x[..., :16] += stripes[:, :16]
    x[..., 16:] -= 2 * stripes.T[:, 16:]
    return x


def test_planted_textures_are_concepts() -> None:
    model = HOSTS["timm-class"]()
    seen = look(model, halves(), "concepts", concepts=2, layer=0)
    main = seen.arrays["phi"].argmax(-1)
    left, right = main[..., :2], main[..., 2:]
    assert (left == left.flat[0]).all() and (right == 1 - left.flat[0]).all()
    assert [p.axis for p in seen.panels] == ["layer", "concept", "concept", "concept"]
    assert [len(p.frames) for p in seen.panels] == [1, 3, 3, 3]


def test_concepts_are_those_of_the_room() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    seen = look(model, x, "concepts", concepts=3, seed=4)
    with torch.no_grad():
        patches = pace.look_at(model, x, seed=4)
        fitted = pace.learn(patches, 3, seed=4)
    theta = fitted.explanation.theta
    order = theta.mean(0).argsort(descending=True)
    np.testing.assert_allclose(seen.arrays["theta"], theta[:, order].numpy(), rtol=1e-5)
    phi = fitted.explanation.phi[..., order].unflatten(1, (4, 4))
    np.testing.assert_allclose(seen.arrays["phi"], phi.numpy(), rtol=1e-4, atol=1e-6)
    assert (np.diff(seen.arrays["theta"].mean(0)) <= 1e-6).all()


def test_what_concepts_were_fitted_to_is_said() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    own = look(model, x[:1], "concepts", concepts=2)
    assert "fitted to the 1 picture given: 16 patches behind layer 1 of 3" in own.summary[0]
    assert "class probabilities took part" in own.summary[1]
    assert "so few pictures" in own.summary[2]
    other = look(model, x[:1], "concepts", concepts=2, basis=halves(9))
    assert "9 other pictures" in other.summary[0] and "not to those given" in other.summary[0]
    assert not any("so few" in line for line in other.summary)
    fitted = look(model, halves(9), "concepts", concepts=2)
    np.testing.assert_array_equal(other.arrays["mus"], fitted.arrays["mus"])
    model.reset_classifier(0)
    assert "no class took part" in look(model, x, "concepts", concepts=2).summary[1]


def test_the_tree_is_that_of_the_room() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    seen = look(model, x, "tree")
    mask = dependency_mask(model, x)
    np.testing.assert_allclose(seen.arrays["mask"][0], mask.numpy(), rtol=1e-6)
    np.testing.assert_array_equal(seen.arrays["parents"][0, 1], grow(mask[1]).parents)
    assert "attends as usual" in seen.summary[0]
    assert [name for name, _ in seen.panels[0].frames] == [
        "all layers",
        "layers 1 to 2",
        "layers 2 to 2",
    ]


def test_reversed_attention_is_read_as_it_is() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    plain = look(model, x, "tree").arrays["mask"]
    transom.apply(model, "dependency-vit")
    fitted = look(model, x, "tree")
    assert "reversed attention" in fitted.summary[0] and "usual" not in fitted.summary[0]
    assert not np.allclose(fitted.arrays["mask"], plain)
    transom.remove(model)
    own = timm.create_model(
        "dependencyvit_tiny_patch16_224", img_size=32, embed_dim=32, depth=2, num_heads=2
    ).eval()
    assert "reversed attention" in look(own, x, "tree").summary[0]


@pytest.mark.parametrize("least", [1, 3, 5, 30])
def test_parts_are_subtrees_of_a_size(least: int) -> None:
    tree = grow(np.random.default_rng(0).random((25, 25)))
    top = tree.cut(least)
    names, sizes = np.unique(top, return_counts=True)
    assert all(size >= least for name, size in zip(names, sizes, strict=True) if name != tree.root)
    for token, above in enumerate(tree.parents):
        assert top[token] == token or top[token] == top[above], "a part hangs together"
    if least == 1:
        assert len(names) == 25
    with pytest.raises(SettingsError, match="at least 1"):
        tree.cut(0)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node to run the page's script")
def test_the_slider_shows_one_frame_at_a_time(tmp_path: Path) -> None:
    frames = [(f"layer {i}", np.full((8, 8, 3), 40 * i, dtype=np.uint8)) for i in range(3)]
    page = Look("attention", {}, panels=[Panel("cat", frames)]).save(tmp_path)
    text = page.read_text(encoding="utf-8")
    assert text.count('class="frame on"') == 1 and 'max="2"' in text
    script = text.split("<script>")[1].split("</script>")[0]
    harness = """
const frame = i => { const on = new Set(i === 2 ? ["on"] : []); return {dataset: {name: "layer "+i},
  on, classList: {toggle: (c, yes) => yes ? on.add(c) : on.delete(c)}}; };
const frames = [0, 1, 2].map(frame), output = {textContent: ""};
const slider = {value: "2", addEventListener(kind, f) { this.fire = f; this.kind = kind; }};
const section = {querySelector: q => q === "input" ? slider : output,
  querySelectorAll: () => frames};
globalThis.document = {querySelectorAll: () => [section]};
"""
    check = """
for (const i of [0, 1, 2]) {
  slider.value = String(i); slider.fire();
  const on = frames.map(f => f.on.has("on"));
  if (on.filter(Boolean).length !== 1 || !on[i] || output.textContent !== "layer " + i)
    throw new Error(JSON.stringify([i, on, output]));
}
console.log(slider.kind);
"""
    done = subprocess.run(
        ["node", "-e", harness + script + check], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "input"


def test_command_with_several_lenses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from PIL import Image

    picture = tmp_path / "noise.png"
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(picture)
    out = tmp_path / "out"
    words = ["look", str(picture), "--model", "transom/digits-vit", "--out", str(out)]
    words += ["--lens", "concepts,tree", "--concepts", "3", "--layer", "1"]
    monkeypatch.setattr(sys, "argv", ["transom", *words])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code
    said = capsys.readouterr().out
    assert "3 concepts were fitted to the 1 picture given" in said and "the root is" in said
    written = {path.name for path in out.iterdir()}
    expected = {"concepts.html", "concepts.png", "concepts-1-noise.png", "tree.html"}
    assert written == expected | {"tree-0-noise.png"}


def test_errors_say_what_is_wrong() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    with pytest.raises(SettingsError, match="at least 2"):
        look(model, x, "concepts", concepts=1)
    with pytest.raises(SettingsError, match="at most one a patch"):
        look(model, x, "concepts", concepts=100)
    with pytest.raises(SettingsError, match="layers 0 to 2"):
        look(model, x, "concepts", layer=7)
    with pytest.raises(HostError, match="has no class token"):
        look(HOSTS["timm-average"](), x, "concepts")
    with pytest.raises(DataError, match="no image"):
        look(model, x, "concepts", basis=[])
    assert hosts.find(model) and not transom.fittings(model)
