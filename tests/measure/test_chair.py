"""CHAIR by hand-counted captions, and comparisons that shorter or broken text must not win."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from transom.errors import DataError
from transom.measure.chair import compare, score
from transom.measure.mentions import Truth, Vocabulary, read_captions, read_truth

NAMES = ["person", "dog", "hot dog", "dining table", "knife", "bus", "scissors", "wine glass"]


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Path]:
    there = {1: ["person", "dog"], 2: ["dining table", "knife", "hot dog"], 3: []}
    instances = {
        "images": [{"id": i, "file_name": f"{i}.jpg"} for i in there],
        "annotations": [
            {"image_id": image, "category_id": 10 + NAMES.index(name), "bbox": [0, 0, 1, 1]}
            for image, names in there.items()
            for name in [*names, *names[:1]]  # two of the first kind are one kind
        ],
        "categories": [{"id": 10 + i, "name": name} for i, name in enumerate(NAMES)],
    }
    captions = [
        {"image_id": 1, "caption": "Two men and the man's dog wait for a bus; the bus is late."},
        {"image_id": 2, "caption": "A hot-dog and KNIVES on a table."},
        {"image_id": 3, "caption": ""},
    ]
    references = {
        "annotations": [{"image_id": 1, "caption": "A man waits for the buses.", "id": 5}]
    }
    paths = {name: tmp_path / f"{name}.json" for name in ("instances", "captions", "references")}
    paths["instances"].write_text(json.dumps(instances))
    paths["captions"].write_text(json.dumps(captions))
    paths["references"].write_text(json.dumps(references))
    paths["lines"] = tmp_path / "captions.jsonl"
    paths["lines"].write_text("\n\n".join(map(json.dumps, captions)) + "\n")
    paths["synonyms"] = tmp_path / "synonyms.txt"
    paths["synonyms"].write_text("person, man, woman\n\ndining table, table, desk\n")
    return paths


def test_counted_by_hand(files: dict[str, Path]) -> None:
    truth = read_truth(files["instances"], files["synonyms"])
    assert truth.objects == {
        1: {"person", "dog"},
        2: {"dining table", "knife", "hot dog"},
        3: frozenset(),
    }
    captions = read_captions(files["captions"])
    found = score(captions, truth)
    # image 1: person person dog bus bus; image 2: hot dog, knife, dining table
    assert found.instance == pytest.approx(2 / 8)
    assert found.distinct == pytest.approx(1 / 6)
    assert found.sentence == pytest.approx(1 / 3)
    assert found.recall == pytest.approx(5 / 5)
    assert found.length == pytest.approx((14 + 7 + 0) / 3)
    assert found.objects == pytest.approx(6 / 3)
    assert found.repeated == pytest.approx(2 / 8)
    assert (found.captions, found.empty) == (3, 1)


def test_lines_are_the_same_and_references_count_as_seen(files: dict[str, Path]) -> None:
    assert read_captions(files["lines"]) == read_captions(files["captions"])
    truth = read_truth(files["instances"], files["synonyms"], files["references"])
    assert truth.objects[1] == {"person", "dog", "bus"}
    assert score(read_captions(files["captions"]), truth).instance == 0


def test_without_synonyms_only_the_categories_count(files: dict[str, Path]) -> None:
    found = score(read_captions(files["captions"]), read_truth(files["instances"]))
    assert found.instance == pytest.approx(2 / 5)
    assert found.recall == pytest.approx(3 / 5)


@pytest.mark.parametrize(
    ("text", "objects"),
    [
        ("People eat hot dogs", ["person", "hot dog"]),
        ("a dog, hot", ["dog"]),
        ("buses pass two wine glasses", ["bus", "wine glass"]),
        ("a scissor and the scissors", ["scissors", "scissors"]),
        ("glass and wine", []),
        ("doghouse, person-like", ["person"]),
        ("", []),
    ],
)
def test_mentions(text: str, objects: list[str]) -> None:
    assert Vocabulary(NAMES).mentions(text) == objects


def test_an_ambiguous_name_is_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        found = Vocabulary(["bowl", "cup"], {"bowl": ["dish"], "cup": ["dish", "mug"]})
    assert "dish" in caplog.text
    assert found.mentions("a dish and a mug") == ["bowl", "cup"]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"categories": None}, "no list 'categories'"),
        ({"categories": []}, "lists no category"),
        ({"annotations": [{"image_id": 1, "caption": "a dog"}]}, "go into --references"),
        ({"annotations": [{"image_id": 1, "category_id": 99}]}, r"\['99'\]"),
        ({"images": [], "annotations": []}, "neither images nor"),
        ({"images": [{"id": None}]}, "usable image id"),
    ],
)
def test_annotations_that_cannot_be_used(
    files: dict[str, Path], change: dict[str, Any], word: str
) -> None:
    content = json.loads(files["instances"].read_text()) | change
    files["instances"].write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    with pytest.raises(DataError, match=word):
        read_truth(files["instances"])


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("[]", "holds no captions"),
        ("", "holds no captions"),
        ("{oops", "line 1"),
        ('[{"image_id": 1}]', "entry 0 lacks 'caption'"),
        ('[{"caption": "a"}]', "entry 0 lacks 'image_id'"),
        ('{"image_id": 1, "caption": 3}', "expected a text"),
        ('["a dog"]', "entry 0 lacks"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": "01", "caption": "b"}', "two captions"),
    ],
)
def test_captions_that_cannot_be_used(tmp_path: Path, text: str, word: str) -> None:
    path = tmp_path / "captions.json"
    path.write_text(text)
    with pytest.raises(DataError, match=word):
        read_captions(path)
    with pytest.raises(DataError, match="no file"):
        read_captions(tmp_path / "gone.json")


def test_synonyms_of_no_category(files: dict[str, Path]) -> None:
    files["synonyms"].write_text("person, man\nsofa, couch\n")
    with pytest.raises(DataError, match=r"line 2: 'sofa'"):
        read_truth(files["instances"], files["synonyms"])


def test_images_that_do_not_match_and_empty_captions(files: dict[str, Path]) -> None:
    truth = read_truth(files["instances"])
    with pytest.raises(DataError, match=r"1 of 2 captions .* 77"):
        score({1: "a dog", 77: "a dog"}, truth)
    with pytest.raises(DataError, match="all 2 captions are empty"):
        score({1: " ", 2: "..."}, truth)
    with pytest.raises(DataError, match="no captions"):
        score({}, truth)
    with pytest.raises(DataError, match="1 images have a caption in one set"):
        compare({1: "a dog", 2: "a dog"}, {1: "a dog"}, truth)
    with pytest.raises(DataError, match="nothing can be compared"):
        compare({1: "a dog", 2: ""}, {1: "", 2: "a dog"}, truth)


KINDS = [f"thing{chr(97 + i)}" for i in range(12)]


def world(images: int = 200, seed: int = 0) -> tuple[Truth, dict[int, str]]:
    """Scenes of four things, and captions that name three of them and then two they invent."""
    draw = np.random.default_rng(seed)
    objects, captions = {}, {}
    for image in range(images):
        order = [KINDS[i] for i in draw.permutation(len(KINDS))]
        objects[image] = frozenset(order[:4])
        said = order[:3] + [
            k for k, real in zip(order[4:6], draw.random(2), strict=True) if real < 0.6
        ]
        captions[image] = " and ".join(said)
    return Truth(objects, Vocabulary(KINDS)), captions


def naming(captions: dict[int, str], edit: Any) -> dict[int, str]:
    return {
        image: " and ".join(edit(image, text.split(" and "))) for image, text in captions.items()
    }


def test_a_real_improvement_is_better() -> None:
    truth, before = world()
    # what is invented makes room for the fourth thing that is there
    fourth = {i: min(truth.objects[i] - set(t.split(" and "))) for i, t in before.items()}
    after = naming(before, lambda i, said: [*said[:3], *[fourth[i]] * (len(said) > 3)])
    found = compare(before, after, truth)
    assert found.verdict == "better"
    assert found.differences["distinct at equal length"].falls
    assert found.after.recall is not None and found.before.recall is not None
    assert found.after.recall > found.before.recall


def test_shorter_text_is_not_better() -> None:
    truth, before = world()
    after = naming(before, lambda _, said: said[:3])  # CHAIR 0 at the same recall!
    found = compare(before, after, truth)
    assert found.after.instance == 0 and found.differences["distinct"].falls
    assert found.verdict == "shorter"
    d = found.differences["distinct at equal length"]
    assert (d.value, d.low, d.high) == (0, 0, 0)


def test_saying_less_is_a_trade_even_in_many_words() -> None:
    truth, before = world()
    after = naming(before, lambda _, said: [said[0], *["very very long talk"] * 9])
    found = compare(before, after, truth)
    assert found.after.instance == 0 and found.after.length > found.before.length
    assert found.verdict == "trade"
    assert "recall falls by" in found.why


def test_repeating_a_safe_word_gains_nothing() -> None:
    truth, before = world()
    after = naming(before, lambda _, said: [*said, *[said[0]] * 10])
    found = compare(before, after, truth)
    assert found.before.instance is not None and found.after.instance is not None
    assert found.after.instance < 0.5 * found.before.instance  # CHAIR as published is fooled
    assert found.after.repeated is not None and found.after.repeated > 0.6
    assert found.verdict == "unclear"


def test_the_same_is_unclear_and_more_inventions_are_worse() -> None:
    truth, before = world()
    same = compare(before, before, truth)
    assert same.verdict == "unclear" and same.differences["recall"].value == 0
    missing = {i: sorted(set(KINDS) - truth.objects[i]) for i in before}
    after = naming(before, lambda i, said: [*said, missing[i][0]])
    assert compare(before, after, truth).verdict == "worse"


def test_few_images_prove_nothing() -> None:
    truth, before = world(images=19)
    after = naming(before, lambda i, said: [s for s in said if s in truth.objects[i]])
    found = compare(before, after, truth)
    assert found.verdict == "unclear" and "19 images" in found.why


def test_the_bootstrap_covers_its_value() -> None:
    """Intervals of the change in recall contain the true change in about 95 % of repetitions."""
    hits, draw = 0, np.random.default_rng(0)
    for seed in range(60):  # two of three true objects stay in half of the captions
        truth, before = world(images=60, seed=seed)
        after = naming(before, lambda _, said: said[: 2 + (draw.random() < 0.5)])
        d = compare(before, after, truth, draws=300, seed=seed).differences["recall"]
        hits += d.low <= -1 / 8 <= d.high
    assert 52 <= hits <= 60


def test_command(files: dict[str, Path], tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from transom.cli import app

    out = tmp_path / "chair.json"
    given = ["lab", "chair", str(files["captions"]), "--annotations", str(files["instances"])]
    given += ["--synonyms", str(files["synonyms"]), "--out", str(out)]
    said = CliRunner().invoke(app, given)
    assert said.exit_code == 0, said.output
    for word in ("CHAIR_i", "recall", "words", "25.0%", "100.0%", "7.0"):
        assert word in said.output
    assert json.loads(out.read_text())["recall"] == 1

    said = CliRunner().invoke(app, [*given, "--against", str(files["lines"])])
    assert said.exit_code == 0, said.output
    assert "after, at equal length" in said.output and "too few" in said.output
    assert json.loads(out.read_text())["verdict"] == "unclear"

    said = CliRunner().invoke(app, [*given, "--against", str(files["synonyms"])])
    assert isinstance(said.exception, DataError) and "line 1" in str(said.exception)
