"""Images from folders, parquet files and memory, and what models want to see."""

from __future__ import annotations

import io
import logging
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from transom.errors import DataError
from transom.measure.data import load_images
from transom.measure.preprocessing import Preprocessing, classes_of, preprocessing_of

SMALL = Preprocessing(size=(32, 32), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), crop_pct=1.0)


def picture(seed: int = 0, size: tuple[int, int] = (40, 36)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(noise)


def encoded(seed: int = 0) -> bytes:
    buffer = io.BytesIO()
    picture(seed).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    for c, name in enumerate(["cat", "ant", "bee"]):
        for i in range(3):
            path = tmp_path / "data" / name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(10 * c + i).save(path)
    return tmp_path / "data"


def test_class_folders_are_numbered_in_sorted_order(classes: Path) -> None:
    found = load_images(classes, SMALL, classes=3)
    assert found.classes == ("ant", "bee", "cat")
    assert found.labels is not None and found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert found.names[0] == "ant/0.png"
    assert found.images.shape == (9, 3, 32, 32) and found.images.dtype == torch.uint8


def test_an_empty_class_folder_keeps_its_number(classes: Path) -> None:
    (classes / "bat").mkdir()
    found = load_images(classes, SMALL, classes=4)
    assert found.labels is not None and sorted(set(found.labels.tolist())) == [0, 2, 3]


def test_class_folders_that_do_not_match_the_head(classes: Path) -> None:
    with pytest.raises(DataError, match="3 class folders, but the head has 10 classes"):
        load_images(classes, SMALL, classes=10)
    assert load_images(classes, SMALL, classes=10, labels=False).labels is None


def test_a_flat_folder_has_no_labels(classes: Path) -> None:
    (classes / "ant" / "notes.txt").write_text("not a picture")
    found = load_images(str(classes / "ant"), SMALL, classes=10)
    assert len(found) == 3 and found.labels is None and found.skipped == ()


def test_images_beside_class_folders_are_ambiguous(classes: Path) -> None:
    picture().save(classes / "loose.png")
    with pytest.raises(DataError, match="1 images beside 3 folders"):
        load_images(classes, SMALL)


def test_broken_images_are_named_skipped_and_counted(
    classes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (classes / "ant" / "0.png").write_bytes(b"\x89PNG broken")
    whole = (classes / "bee" / "1.png").read_bytes()
    (classes / "bee" / "1.png").write_bytes(whole[: len(whole) // 2])
    (classes / "cat" / "2.png").write_bytes(b"")
    with caplog.at_level(logging.WARNING, "transom"):
        found = load_images(classes, SMALL, classes=3)
    assert [name for name, _ in found.skipped] == ["ant/0.png", "bee/1.png", "cat/2.png"]
    assert all(str(classes) not in reason for _, reason in found.skipped)
    assert found.labels is not None and found.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert "skipped 3 of 9 images" in caplog.text


def test_nothing_readable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no folder or file"):
        load_images(tmp_path / "missing", SMALL)
    with pytest.raises(DataError, match="holds no image"):
        load_images(tmp_path, SMALL)
    (tmp_path / "a.jpg").write_bytes(b"no")
    with pytest.raises(DataError, match=r"no readable image in .*\(1 could not be read"):
        load_images(tmp_path, SMALL)
    (tmp_path / "table.csv").write_text("a,b")
    with pytest.raises(DataError, match="neither a folder, a parquet file nor an image"):
        load_images(tmp_path / "table.csv", SMALL)


def test_a_limit_takes_images_from_every_part(classes: Path) -> None:
    found = load_images(classes, SMALL, classes=3, limit=3)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="limit=0"):
        load_images(classes, SMALL, limit=0)


@pytest.mark.parametrize("nested", [False, True])
def test_parquet(tmp_path: Path, nested: bool) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images: list[object] = [encoded(i) for i in range(5)]
    images[3] = b"broken"
    if nested:
        images = [{"bytes": data, "path": None} for data in images]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": images, "label": [0, 1, 2, 0, 1]}), path)
    found = load_images(path, SMALL, classes=3)
    assert found.labels is not None and found.labels.tolist() == [0, 1, 2, 1]
    assert [name for name, _ in found.skipped] == ["a.parquet row 3"]
    with pytest.raises(DataError, match="from 0 to 2, but the head has 2 classes"):
        load_images(path, SMALL, classes=2)


def test_parquet_that_holds_something_else(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "text.parquet")
    with pytest.raises(DataError, match=r"columns \['text'\]; expected one called 'image'"):
        load_images(tmp_path / "text.parquet", SMALL)
    pq.write_table(pa.table({"image": [encoded()], "label": ["cat"]}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="expected class numbers"):
        load_images(tmp_path / "b.parquet", SMALL)
    (tmp_path / "c.parquet").write_bytes(b"nothing")
    with pytest.raises(DataError, match="cannot be read as parquet"):
        load_images(tmp_path / "c.parquet", SMALL)


def test_tensors_and_pictures_in_memory(tmp_path: Path) -> None:
    given = torch.randn(4, 3, 32, 32)
    found = load_images(given, SMALL, labels=[0, 1, 0, 1], classes=2)
    assert torch.equal(found.batch(1, 2), given[1:3])
    pixels = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert torch.allclose(load_images(pixels, SMALL).batch(0, 2), pixels / 127.5 - 1, atol=1e-6)
    picture().save(tmp_path / "a.png")
    mixed = [
        picture(),
        np.asarray(picture()),
        encoded(),
        tmp_path / "a.png",
        picture().convert("L"),
    ]
    found = load_images((item for item in mixed), SMALL)
    assert len(found) == 5 and torch.equal(found.images[0], found.images[1])
    for bad, message in [
        (torch.randn(3, 32, 32), r"\(3, 32, 32\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.int64), "int64"),
        ([], "empty"),
        (3, "got a int as images"),
        ([object()], "no readable image"),
    ]:
        with pytest.raises(DataError, match=message):
            load_images(bad, SMALL)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="3 labels for 4 images"):
        load_images(given, SMALL, labels=[0, 1, 0])
    with pytest.raises(DataError, match="bring no labels"):
        load_images(given, SMALL, labels=True)


def test_batches_cover_everything_and_samples_repeat() -> None:
    found = load_images([picture(i) for i in range(5)], SMALL)
    assert [len(batch) for batch in found.batches(2)] == [2, 2, 1]
    sample = found.sample(7)
    assert sample.shape == (7, 3, 32, 32) and torch.equal(sample[0], sample[5])
    assert found.batch(0, 1, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_the_fingerprint_follows_the_data() -> None:
    one = load_images([picture(0)], SMALL)
    assert one.fingerprint() == load_images([picture(0)], SMALL).fingerprint()
    assert one.fingerprint() != load_images([picture(1)], SMALL).fingerprint()
    assert one.fingerprint() != load_images([picture(0)], SMALL, labels=[1]).fingerprint()


def test_a_timm_model_sees_what_timm_would_show_it() -> None:
    model = timm.create_model("vit_tiny_patch16_224", depth=1)
    wanted = preprocessing_of(model)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    shown = load_images([picture(0, (300, 260))], wanted).batch(0, 1)[0]
    assert torch.allclose(shown, transform(picture(0, (300, 260))), atol=1e-6)


def test_the_size_is_that_of_the_model_at_hand() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=(32, 48), patch_size=8, depth=1)
    assert preprocessing_of(model).size == (32, 48)
    assert preprocessing_of(nn.Sequential(model), crop_pct=1.0).crop_pct == 1.0


@pytest.mark.parametrize(
    ("config", "model", "mean", "mode", "classes"),
    [
        ("ViTConfig", "ViTForImageClassification", 0.5, "squash", 7),
        ("DeiTConfig", "DeiTForImageClassificationWithTeacher", 0.5, "center", 7),
        ("Dinov2Config", "Dinov2Model", 0.485, "center", None),
        ("CLIPVisionConfig", "CLIPVisionModel", 0.48145466, "center", None),
        ("SiglipVisionConfig", "SiglipVisionModel", 0.5, "squash", None),
    ],
)
def test_hugging_face_families(
    config: str, model: str, mean: float, mode: str, classes: int | None
) -> None:
    settings = getattr(transformers, config)(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=32, patch_size=8, num_labels=7,
    )  # fmt: skip
    built = getattr(transformers, model)(settings)
    wanted = preprocessing_of(built)
    assert (wanted.size, wanted.mean[0], wanted.crop_mode) == ((32, 32), mean, mode)
    assert classes_of(built) == classes


def test_a_model_that_does_not_say_what_it_wants() -> None:
    with pytest.raises(DataError, match="does not say what images it wants"):
        preprocessing_of(nn.Linear(1, 1))
    assert preprocessing_of(nn.Linear(1, 1), size=(8, 8)).size == (8, 8)
    with pytest.raises(DataError, match="no setting 'zise'"):
        preprocessing_of(nn.Linear(1, 1), zise=(8, 8))
