"""Where images come from, and what happens to those that cannot be used."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from transom.errors import DataError
from transom.measure.preprocessing import Preprocessing
from transom.train.data import Shuffled, TrainingImages, augmentation, load_splits, pictures
from transom.train.recipe import AugmentPart, DataPart

pa = pytest.importorskip("pyarrow")
import pyarrow.parquet as pq

SMALL = Preprocessing(size=(8, 8))


def encoded(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def parquet(path: Path, labels: list[int | None], broken: tuple[int, ...] = ()) -> str:
    rows = [b"no picture" if i in broken else encoded(i) for i in range(len(labels))]
    pq.write_table(pa.table({"image": rows, "label": pa.array(labels, pa.int64())}), path)
    return str(path)


def test_digits_are_split_by_class() -> None:
    splits = load_splits(DataPart(train="digits"), SMALL, 10)
    count = len(splits.train.pictures) + len(splits.test)
    assert count == 1797 and len(splits.test) == pytest.approx(0.2 * count, abs=5)
    assert splits.test.labels is not None
    assert (splits.test.labels.bincount() - 36).abs().max() <= 1
    assert not set(splits.train.names) & set(splits.test.names)


def test_textiles_have_three_classes() -> None:
    pytest.importorskip("conformal_clip_data")
    found = pictures("textiles")
    assert found.classes == ("nominal", "local", "global")
    assert np.bincount(found.labels).tolist() == [1000, 500, 500]


def test_corrupt_rows_are_named_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    train = parquet(tmp_path / "train.parquet", [0, 1, None, 1, 0, 1], broken=(1,))
    test = parquet(tmp_path / "test.parquet", [0, 1, 1], broken=(2,))
    with caplog.at_level(logging.WARNING):
        splits = load_splits(DataPart(train=train, test=test), SMALL, 2)
    assert splits.train.labels == [0, 1, 0, 1]
    assert len(splits.test) == 2
    skipped = dict(splits.skipped)
    assert set(skipped) == {"train.parquet row 1", "train.parquet row 2", "test.parquet row 2"}
    assert skipped["train.parquet row 2"] == "it has no label"
    assert "skipped 2 of 6 images" in caplog.text


def test_folders_and_saved_datasets_hold_the_same(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for label, name in enumerate(("cat", "dog")):
        (tmp_path / "folder" / name).mkdir(parents=True)
        for i in range(3):
            (tmp_path / "folder" / name / f"{i}.png").write_bytes(encoded(3 * label + i))
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}
    )
    rows = {"image": [{"bytes": encoded(i)} for i in range(6)], "label": [0, 0, 0, 1, 1, 1]}
    saved = datasets.Dataset.from_dict(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    part = {"holdout": 0.34}
    a = load_splits(DataPart(train=str(tmp_path / "folder"), **part), SMALL, 2)
    b = load_splits(DataPart(train=str(tmp_path / "saved"), **part), SMALL, 2)
    assert a.train.labels == b.train.labels and len(a.train.pictures) == 4
    for x, y in zip(a.train.pictures, b.train.pictures, strict=True):
        assert np.array_equal(x, y)
    assert torch.equal(a.test.images, b.test.images)
    assert b.train.classes == ("cat", "dog")


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (DataPart("digits", train_limit=0), "the train split of digits is empty"),
        (DataPart("digits", test_limit=0), "the test split of digits is empty"),
        (DataPart("digits", holdout=0.001), "the test split of digits is empty"),
        (DataPart("nowhere"), "there is no folder or file nowhere"),
        (DataPart("hub:name"), "names no split"),
    ],
)
def test_splits_that_cannot_be(part: DataPart, says: str) -> None:
    with pytest.raises(DataError, match=says):
        load_splits(part, SMALL, 10)


def test_labels_have_to_fit_the_head(tmp_path: Path) -> None:
    path = parquet(tmp_path / "train.parquet", [0, 1, 5, 1])
    with pytest.raises(DataError, match="labels reach from 0 to 5, but the head has 2 classes"):
        load_splits(DataPart(path, path), SMALL, 2)
    with pytest.raises(DataError, match="labels reach from 0 to 9"):
        load_splits(DataPart("digits"), SMALL, 9)


def test_pictures_need_labels(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(encoded(0))
    with pytest.raises(DataError, match="has no labels"):
        pictures(str(tmp_path))


def test_an_image_is_augmented_alike_whoever_reads_it() -> None:
    part = AugmentPart(scale=(0.3, 1.0), hflip=0.5, auto="rand-m9-mstd0.5-inc1", erase=0.5)
    found = pictures("digits")
    images = TrainingImages(found, augmentation(part, SMALL), seed=1)
    tickets = [5, 7, 5 + len(images)]
    first = [images[t][0] for t in tickets]
    again = [images[t][0] for t in reversed(tickets)][::-1]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], first[2]), "every epoch draws anew"
    other = TrainingImages(found, augmentation(part, SMALL), seed=2)
    assert not torch.equal(first[0], other[5][0])


def test_without_crop_the_picture_is_as_in_the_test() -> None:
    splits = load_splits(DataPart("digits"), Preprocessing(size=(8, 8), crop_pct=1.0), 10)
    images = TrainingImages(splits.train, augmentation(AugmentPart(), SMALL), seed=0)
    expected = SMALL.normalise(torch.tensor(splits.train.pictures[3]).permute(2, 0, 1)[None])
    torch.testing.assert_close(images[3][0], expected[0])


def test_every_epoch_has_every_image_in_another_order() -> None:
    sampler = Shuffled(10, seed=0)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert sorted(first) == list(range(10)) and sorted(second) == list(range(10, 20))
    assert [t - 10 for t in second] != first
