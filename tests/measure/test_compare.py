"""`transom.compare` end to end on a tiny host: rows, columns, refusals, resuming, interrupts."""

from __future__ import annotations

import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import transom
from transom import registry
from transom.errors import DataError, FitError, HostError, SettingsError
from transom.measure import Comparison, ImageSet, Preprocessing, load_images, quality
from transom.measure.journal import Journal
from transom.measure.row import Row

FAST: dict[str, Any] = {"rounds": 1, "batch_size": 2}


def vit(classes: int = 5, **settings: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=3, embed_dim=24, num_heads=2,
        num_classes=classes, **settings,
    )  # fmt: skip
    if isinstance(model.get_classifier(), nn.Linear):
        nn.init.normal_(model.get_classifier().weight)  # timm starts heads at almost nothing
    return model.eval()


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def labelled(images: Tensor) -> Comparison:
    return transom.compare(
        vit(), images, ["tome", ("evit", {"keep_rate": 0.5}), "random", "none"],
        labels=[0, 1, 2, 3, 4], **FAST,
    )  # fmt: skip


def test_the_plain_host_comes_first_and_a_bare_slug_is_run_over_its_grid(
    labelled: Comparison,
) -> None:
    grid = registry.methods()["tome"].grid(3, 64)
    rows = [(row.method, row.settings) for row in labelled.rows]
    expected = [("plain", {}), *(("tome", settings) for settings in grid)]
    assert rows[: len(expected)] == expected
    assert ("evit", {"keep_rate": 0.5}) in rows
    assert sum(method == "random" for method, _ in rows) == len(
        registry.methods()["random"].grid(3, 64)
    )
    assert not labelled.interrupted and not labelled.skipped


def test_costs_of_the_rows(labelled: Comparison) -> None:
    plain, neutral = labelled.rows[0], labelled.rows[-1]
    assert plain.tokens == neutral.tokens == 65 and plain.over_twin is None
    assert neutral.method == "none" and neutral.flops_ratio == 1 and neutral.control == {}
    tome = [row for row in labelled.rows if row.method == "tome"]
    assert [row.tokens for row in tome] == sorted((row.tokens for row in tome), reverse=True)
    for row in tome:
        assert row.lengths[-1] == row.tokens < 65 and len(row.lengths) == 3
        assert row.flops_ratio < 1 and row.limit == pytest.approx(1 / row.flops_ratio)
        assert row.gflops == pytest.approx(row.flops_ratio * plain.gflops)
        assert row.over_twin is not None and row.over_twin[1] > 0
        assert 0 < row.ms[0] <= row.ms[1] <= row.ms[2]
        assert row.memory_mib is not None and row.memory_mib > 0
        assert (row.rounds, row.batch_size) == (1, 2)


def test_gflops_are_those_of_the_formula(labelled: Comparison) -> None:
    n, d, depth, classes = 65, 24, 3, 5
    block = 2 * n * d * (3 * d + d + 8 * d) + 2 * 2 * n * n * d
    rest = 2 * 64 * (3 * 4 * 4) * d + 2 * d * classes
    assert labelled.rows[0].gflops * 1e9 == pytest.approx(depth * block + rest, rel=1e-12)


def test_quality_with_labels(labelled: Comparison) -> None:
    assert labelled.qualities == ["top-1", "top-5", "agreement", "cosine"]
    plain = labelled.rows[0]
    assert plain.quality["agreement"] == 1 and plain.quality["top-5"] == 1
    assert plain.quality["cosine"] == pytest.approx(1)
    strong = next(row for row in labelled.rows if row.method == "evit")
    assert strong.quality["cosine"] < 1 - 1e-6
    assert strong.control.keys() == strong.quality.keys()
    assert strong.control["cosine"] != strong.quality["cosine"]


def test_the_control_has_the_tokens_of_its_row(images: Tensor, labelled: Comparison) -> None:
    strong = next(row for row in labelled.rows if row.method == "evit")
    model = vit()
    plain = model(images)
    transom.apply(model, "random", counts=strong.lengths)
    expected = quality.cosine(model(images), plain).mean().item()
    assert strong.control["cosine"] == pytest.approx(expected, abs=1e-6)


def test_the_model_stays_as_it_is(images: Tensor) -> None:
    model = vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    classes = [type(module) for module in model.modules()]
    result = transom.compare(model, images, ["tome"], dtype="bfloat16", **FAST)
    assert result.environment["dtype"] == "bfloat16"
    assert not transom.fittings(model)
    assert all(module.training for module in model.modules())
    assert [type(module) for module in model.modules()] == classes
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == before[name].dtype


def test_random_numbers_of_the_caller_are_not_touched(images: Tensor) -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    transom.compare(vit(), images, [("tome", {"r": 4})], **FAST)
    torch.manual_seed(3)
    assert torch.equal(torch.get_rng_state(), state)


def test_without_labels_fidelity_is_measured(images: Tensor) -> None:
    classifier = transom.compare(vit(), images, [("tome", {"r": 8})], **FAST)
    assert classifier.qualities == ["cosine", "agreement", "kl"]
    features = transom.compare(vit(0), images, [("tome", {"r": 8})], **FAST)
    assert features.qualities == ["cosine"]


class Dense(nn.Module):
    """A host inside a model that needs every patch in its place."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = vit(0)
        self.decoder = nn.Linear(24, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.backbone.forward_features(x)
        return self.decoder(tokens[:, 1:]).reshape(len(x), 1, 8, 8)


@pytest.mark.parametrize("target", ["", "backbone"])
def test_a_dense_model_with_measures_of_its_own(images: Tensor, target: str) -> None:
    def measures(output: Tensor, plain: Tensor) -> dict[str, Tensor | float]:
        return {"correlation": quality.correlation(output, plain), "batch": float(len(output))}

    result = transom.compare(
        Dense().eval(), images, [("tome", {"r": 8}), ("evit", {"keep_rate": 0.5})],
        target=target, restore="end", quality=measures, **FAST,
    )  # fmt: skip
    assert result.qualities == ["correlation", "batch", "cosine"]
    for row in result.rows:
        assert row.quality["batch"] == pytest.approx((2 * 2 + 2 * 2 + 1 * 1) / 5)
        assert row.quality["correlation"] <= 1 + 1e-9
    assert result.rows[0].quality["correlation"] == 1
    assert result.rows[1].quality["correlation"] < 1


def test_forward_chooses_what_is_run(images: Tensor) -> None:
    def tokens(model: Any, batch: Tensor) -> Tensor:
        return model.forward_features(batch)

    result = transom.compare(
        vit(), images, [("tome", {"r": 8})], forward=tokens, restore="end", labels=False, **FAST
    )
    head = 2 * 24 * 5
    assert result.rows[0].gflops * 1e9 == pytest.approx(
        transom.compare(vit(), images, [], **FAST).rows[0].gflops * 1e9 - head
    )


def test_outputs_that_cannot_be_compared_say_what_to_do(images: Tensor) -> None:
    def tokens(model: Any, batch: Tensor) -> Tensor:
        return model.forward_features(batch)

    with pytest.raises(DataError, match="restore='end'"):
        transom.compare(
            vit(), images, [("tome", {"r": 8})], forward=tokens, restore="never", **FAST
        )


def test_hugging_face(images: Tensor) -> None:
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48,
        image_size=32, patch_size=4, num_labels=5,
    )  # fmt: skip
    model = transformers.ViTForImageClassification(config).eval()
    result = transom.compare(model, images, [("tome", {"r": 8})], labels=[0, 1, 2, 3, 4], **FAST)
    assert result.qualities[0] == "top-1"
    assert result.rows[1].tokens == 65 - 2 * 8
    headless = transformers.ViTModel(config).eval()
    result = transom.compare(headless, images, [("tome", {"r": 8})], **FAST)
    assert result.qualities == ["cosine"] and result.rows[1].quality["cosine"] < 1


def test_methods_that_do_not_fit_are_listed_with_the_reason(images: Tensor) -> None:
    model = vit(class_token=False, global_pool="avg")
    result = transom.compare(model, images, ["evit", ("tome", {"r": 4})], **FAST)
    assert [row.method for row in result.rows] == ["plain", "tome"]
    assert [name for name, _ in result.skipped] == ["evit"]
    assert "class token" in result.skipped[0][1] and "evit left out" in result.caption()
    with pytest.raises(FitError, match=r"none of the methods fits.*class token"):
        transom.compare(model, images, ["evit"], **FAST)


def test_what_needs_no_training_is_compared_by_default(images: Tensor) -> None:
    result = transom.compare(vit(), images, rounds=1, batch_size=1, limit=1, control=False)
    rows = {row.method for row in result.rows}
    assert {"plain", "random", "tome", "pitome", "evit", "crossget"} <= rows
    for slug in rows - {"plain", "random"}:
        cls = registry.methods()[slug]
        assert cls.takes == "encoder" and not cls().needs_training
    assert all(row.control == {} for row in result.rows)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"methods": ["tomee"]}, SettingsError, "did you mean 'tome'"),
        ({"methods": [("tome", {"k": 1})]}, SettingsError, "no setting 'k'"),
        ({"methods": [7]}, SettingsError, "7 names no method"),
        ({"batch_size": 0}, SettingsError, "batch_size=0"),
        ({"dtype": "float7"}, SettingsError, "dtype='float7'"),
        ({"device": "nowhere"}, SettingsError, "device='nowhere'"),
        ({"target": "bakbone"}, HostError, "no part 'bakbone'"),
        ({"labels": [0, 1]}, DataError, "2 labels for 5 images"),
        ({"labels": [0, 1, 2, 3, 9]}, DataError, "5 classes"),
        ({"limit": 0}, DataError, "limit=0"),
    ],
)
def test_bad_arguments(
    images: Tensor, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = vit()
    with pytest.raises(error, match=message):
        transom.compare(model, images, **{"methods": ["tome"], **FAST, **settings})
    assert not transom.fittings(model)


def test_what_is_no_plain_host_is_refused(images: Tensor) -> None:
    with pytest.raises(HostError, match=r"expected a torch\.nn\.Module"):
        transom.compare("vit", images)  # type: ignore[arg-type]
    with pytest.raises(HostError, match="not a supported host"):
        transom.compare(nn.Linear(1, 1), images)
    model = transom.apply(vit(), "tome", r=4)
    with pytest.raises(FitError, match="tome is fitted to this model"):
        transom.compare(model, images)


def test_labels_of_a_folder_count_only_where_there_is_a_head(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40), (100, 50, 10)).save(tmp_path / name / "0.png")
    (tmp_path / "a" / "broken.png").write_bytes(b"no")
    result = transom.compare(vit(0), tmp_path, [], **FAST)
    assert result.qualities == ["cosine"]
    assert [name for name, _ in result.skipped_images] == ["a/broken.png"]
    assert "broken.png" in result.caption()
    with pytest.raises(DataError, match="2 class folders, but the head has 5 classes"):
        transom.compare(vit(5), tmp_path, [], **FAST)
    ready = load_images(tmp_path, Preprocessing(size=(32, 32)))
    assert isinstance(ready, ImageSet)
    assert transom.compare(vit(2), ready, [], **FAST).qualities[0] == "top-1"
    assert transom.compare(vit(2), ready, [], labels=False, **FAST).qualities[0] == "cosine"
    with pytest.raises(SettingsError, match="belong to load_images"):
        transom.compare(vit(2), ready, [], limit=1, **FAST)


def test_progress_and_resuming(images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "rows.jsonl"
    seen: list[tuple[str, int, int]] = []

    def progress(row: Row, done: int, total: int) -> None:
        seen.append((row.method, done, total))

    def run(seed: int = 0, **more: Any) -> Comparison:
        methods = [("tome", {"r": 4}), ("random", {"keep_rate": 0.5})]
        return transom.compare(
            vit(), images, methods, resume=path, progress=progress, seed=seed, **{**FAST, **more}
        )

    first = run()
    assert seen == [("plain", 1, 3), ("tome", 2, 3), ("random", 3, 3)]
    assert len(path.read_text().splitlines()) == 3
    second = run()
    assert second.rows == first.rows  # times included: nothing was measured again
    assert seen[3:] == seen[:3] and len(path.read_text().splitlines()) == 3
    third = run(batch_size=1)
    assert third.rows != first.rows and len(path.read_text().splitlines()) == 6


def test_other_weights_are_another_model(images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    model = vit()
    transom.compare(model, images, [], resume=path, **FAST)
    nn.init.normal_(model.get_classifier().weight)
    transom.compare(model, images, [], resume=path, **FAST)
    transom.compare(model, images[:4], [], resume=path, **FAST)
    assert len(path.read_text().splitlines()) == 3


def test_an_interrupt_keeps_what_is_finished(
    images: Tensor, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "rows.jsonl"
    calls = {"left": 10**9}

    def forward(model: nn.Module, batch: Tensor) -> Any:
        calls["left"] -= 1
        if calls["left"] < 0:
            raise KeyboardInterrupt
        return model(batch)

    def stop(row: Row, done: int, total: int) -> None:
        if row.method == "tome":
            calls["left"] = 3  # in the middle of the next row

    methods = [("tome", {"r": 4}), ("random", {"keep_rate": 0.5})]
    with caplog.at_level(logging.WARNING, "transom"):
        result = transom.compare(
            vit(), images, methods, forward=forward, progress=stop, resume=path, **FAST
        )
    assert result.interrupted and [row.method for row in result.rows] == ["plain", "tome"]
    assert "interrupted after 2 of 3 rows" in caplog.text
    assert "interrupted" in result.caption() and "interrupted" in str(result)
    calls["left"] = 10**9
    result = transom.compare(vit(), images, methods, forward=forward, resume=path, **FAST)
    assert not result.interrupted and len(result.rows) == 3


def test_a_line_that_was_cut_short_is_measured_again(images: Tensor, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    transom.compare(vit(), images, [("tome", {"r": 4})], resume=path, **FAST)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    transom.compare(vit(), images, [("tome", {"r": 4})], resume=path, **FAST)
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line)["key"] for line in lines)
    path.write_bytes(b"something else\n" + whole)
    with pytest.raises(DataError, match=r"line 1 of .* is no finished row"):
        Journal(path)


def test_rows_survive_json(labelled: Comparison, tmp_path: Path) -> None:
    path = labelled.to_json(tmp_path / "out" / "rows.json")
    again = Comparison.from_json(path)
    assert again.rows == labelled.rows and again.environment == labelled.environment
    row = dataclasses.replace(labelled.rows[1], settings={"r": (4, 2, 1)})
    assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row
    with pytest.raises(DataError, match="missing or unknown"):
        Row.from_dict({"method": "tome"})
    path.write_text("{}")
    with pytest.raises(DataError, match="holds no comparison"):
        Comparison.from_json(path)


def test_the_environment_says_what_is_needed_to_repeat(labelled: Comparison) -> None:
    environment = labelled.environment
    assert environment["images"] == 5 and environment["seed"] == 0
    assert environment["torch"] == torch.__version__.split("+")[0]
    assert {"processor", "cores", "threads", "timm", "device", "python"} <= environment.keys()
