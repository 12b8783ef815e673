"""Images and labels for training: where they come from, how they are augmented, in what order.

Everything random about one image depends on the seed, the epoch and the image alone, not on the
process that reads it or on what was read before. A run that was stopped therefore goes on with
the images it would have seen.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.data import create_transform
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from transom.errors import DataError
from transom.measure.data import UNREADABLE, Found, ImageSet, decode, find, open_picture
from transom.measure.preprocessing import Preprocessing
from transom.measure.quality import check_labels
from transom.train.recipe import AugmentPart, DataPart

logger = logging.getLogger(__name__)

KEPT_BYTES = 2**30
"""Decoded pictures are kept in memory up to this size; later ones are decoded when needed."""


@dataclass(frozen=True)
class Splits:
    """What a run is trained and judged on.

    Attributes:
        train: pictures that can be read, with labels.
        test: ready for the model.
        skipped: (name, reason) of what could not be used, of both.
    """

    train: Found
    test: ImageSet
    skipped: tuple[tuple[str, str], ...]


def load_splits(part: DataPart, preprocessing: Preprocessing, classes: int) -> Splits:
    """Find, check and split the data of a recipe.

    Args:
        part: the section.
        preprocessing: what the model wants to see.
        classes: of the model's head.

    Raises:
        DataError: there is no such data, a split is empty, or labels are missing or outside the
            head.
    """
    if part.test is None:
        train, test = _held_out(pictures(part.train), part.holdout)
    else:
        train, test = pictures(part.train), pictures(part.test)
    train, test = _thinned(train, part.train_limit), _thinned(test, part.test_limit)
    for name, found in (("train", train), ("test", test)):
        if not found.pictures:
            raise DataError(f"the {name} split of {found.origin} is empty")
    readable, skipped = _readable(train)
    assert readable.labels is not None
    check_labels(torch.tensor(readable.labels), classes)
    labelled, unlabelled = _labelled(test)
    judged = decode(labelled, preprocessing, classes)
    return Splits(readable, judged, (*skipped, *unlabelled, *judged.skipped))


def pictures(source: str) -> Found:
    """The labelled pictures a recipe names, not decoded.

    Args:
        source: see :class:`~transom.train.recipe.DataPart`.

    Raises:
        DataError: there is no such data, or it has no labels.
    """
    if source == "digits":
        return _digits()
    if source == "textiles":
        return _textiles()
    if source.startswith("hub:"):
        return _hub(source)
    path = Path(source)
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        found = _saved(path)
    else:
        found = find(path, None, None)
    if found.labels is None:
        raise DataError(
            f"{found.origin} has no labels; expected one folder a class, or a column 'label'"
        )
    return found


def _digits() -> Found:
    """1,797 handwritten digits, 8×8."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError("the digits come with scikit-learn: pip install scikit-learn") from None
    bunch = load_digits()
    arrays = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    names = [f"digit {i}" for i in range(len(arrays))]
    labels = [int(label) for label in bunch.target]
    return Found("digits", names, list(arrays), labels, tuple("0123456789"))


def _textiles() -> Found:
    """2,000 simulated textiles, 250×250: no defect, a local one, a global one."""
    try:
        import conformal_clip_data
    except ImportError:
        raise DataError(
            "the textile pictures come with a package: pip install conformal-clip-data"
        ) from None
    classes = ("nominal", "local", "global")
    root = Path(str(conformal_clip_data.textile_simulated_root()))
    files = [
        (path, i) for i, name in enumerate(classes) for path in sorted((root / name).iterdir())
    ]
    files = [(path, label) for path, label in files if path.suffix == ".jpg"]
    names = [f"{classes[label]}/{path.name}" for path, label in files]
    return Found("textiles", names, [p for p, _ in files], [label for _, label in files], classes)


def _saved(path: Path) -> Found:
    datasets = _datasets(str(path))
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        raise DataError(f"{path.name} holds the splits {list(loaded)}; name one: {path}/SPLIT")
    return _from_datasets(loaded, path.name)


def _hub(source: str) -> Found:
    _, _, rest = source.partition(":")
    name, _, split = rest.rpartition(":")
    if not name:
        raise DataError(f"{source!r} names no split; expected hub:NAME:SPLIT")
    datasets = _datasets(source)
    try:
        loaded = datasets.load_dataset(name, split=split)
    except (OSError, ValueError) as error:
        raise DataError(f"{source!r} cannot be loaded: {error}") from error
    return _from_datasets(loaded, name)


def _datasets(source: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"reading {source} needs the package datasets: pip install datasets"
        ) from None
    return datasets


def _from_datasets(loaded: Any, origin: str) -> Found:
    """The rows of a Hugging Face data set; pictures stay encoded."""
    names = {"image": ("image", "img"), "label": ("label", "labels", "fine_label")}
    columns = {}
    for role, known in names.items():
        columns[role] = next((name for name in known if name in loaded.column_names), None)
        if columns[role] is None:
            raise DataError(
                f"{origin} has the columns {loaded.column_names}; expected one of {list(known)}"
            )
    image, label = columns["image"], columns["label"]
    feature = loaded.features[label]
    undecoded = _datasets(origin).Image(decode=False)
    rows = loaded.select_columns([image, label]).cast_column(image, undecoded)
    found = [row[image] or {} for row in rows]
    pictures = [value.get("bytes") or value.get("path") for value in found]
    labels = [-1 if value is None else int(value) for value in rows[label]]
    classes = tuple(feature.names) if hasattr(feature, "names") else None
    return Found(
        origin, [f"{origin} row {i}" for i in range(len(labels))], pictures, labels, classes
    )


def _select(found: Found, indices: list[int]) -> Found:
    assert found.labels is not None
    return replace(
        found,
        names=[found.names[i] for i in indices],
        pictures=[found.pictures[i] for i in indices],
        labels=[found.labels[i] for i in indices],
    )


def _thinned(found: Found, limit: int | None) -> Found:
    count = len(found.pictures)
    if limit is None or limit >= count:
        return found
    return _select(found, [i * count // limit for i in range(max(limit, 0))])


def _held_out(found: Found, part: float) -> tuple[Found, Found]:
    """Training and test pictures: the same part of every class, always the same pictures."""
    assert found.labels is not None
    draw = random.Random(0)
    test: set[int] = set()
    for label in sorted(set(found.labels)):
        own = [i for i, one in enumerate(found.labels) if one == label]
        test.update(draw.sample(own, round(part * len(own))))
    indices = range(len(found.labels))
    return (
        _select(found, [i for i in indices if i not in test]),
        _select(found, [i for i in indices if i in test]),
    )


def _labelled(found: Found) -> tuple[Found, list[tuple[str, str]]]:
    """Pictures with a label; a row of a file without one is marked -1."""
    assert found.labels is not None
    kept = [i for i, label in enumerate(found.labels) if label != -1]
    if len(kept) == len(found.labels):
        return found, []
    missing = [name for name, label in zip(found.names, found.labels, strict=True) if label == -1]
    for name in missing:
        logger.warning("skipped %s: it has no label", name)
    return _select(found, kept), [(name, "it has no label") for name in missing]


def _readable(found: Found) -> tuple[Found, list[tuple[str, str]]]:
    """Pictures that can be read, decoded as far as memory is meant for it."""
    found, skipped = _labelled(found)
    kept, decoded, room = [], [], KEPT_BYTES
    for i, (name, picture) in enumerate(zip(found.names, found.pictures, strict=True)):
        try:
            pixels = np.asarray(open_picture(picture))
        except UNREADABLE as error:
            reason = str(error) or type(error).__name__
            if isinstance(picture, Path):
                reason = reason.replace(str(picture), picture.name)
            skipped.append((name, reason))
            logger.warning("skipped %s: %s", name, reason)
            continue
        kept.append(i)
        room -= pixels.nbytes
        decoded.append(pixels if room >= 0 else picture)
    if not kept:
        raise DataError(
            f"no readable image in {found.origin} ({len(skipped)} could not be read; the first "
            f"says: {skipped[0][1] if skipped else 'nothing'})"
        )
    if skipped:
        logger.warning("skipped %d of %d images", len(skipped), len(skipped) + len(kept))
    return replace(_select(found, kept), pictures=decoded), skipped


def augmentation(part: AugmentPart, preprocessing: Preprocessing) -> Callable[[Any], Tensor]:
    """The training transform of timm: an RGB picture becomes the model's input (3, H, W).

    Args:
        part: the section.
        preprocessing: size, mean and standard deviation.
    """
    whole = part.scale is None
    jitter: Any = part.color_jitter or None
    transform: Callable[[Any], Tensor] = create_transform(
        input_size=(3, *preprocessing.size),
        is_training=True,
        scale=(1.0, 1.0) if whole else part.scale,
        ratio=(1.0, 1.0) if whole else part.ratio,
        hflip=part.hflip,
        color_jitter=jitter,
        auto_augment=part.auto,
        re_prob=part.erase,
        re_mode="pixel",
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
    )
    return transform


class TrainingImages(Dataset[tuple[Tensor, int, int]]):
    """Augmented images.

    An item is asked for by its ticket, epoch · N + index, as :class:`Shuffled` hands them out.

    Args:
        found: N readable pictures with labels.
        transform: from a picture to the model's input.
        seed: of the augmentation.
    """

    def __init__(self, found: Found, transform: Callable[[Any], Tensor], seed: int) -> None:
        self.found, self.transform, self.seed = found, transform, seed

    def __len__(self) -> int:
        return len(self.found.pictures)

    def __getitem__(self, ticket: int) -> tuple[Tensor, int, int]:
        assert self.found.labels is not None
        index = ticket % len(self)
        seed_everything(self.seed, ticket)
        image = self.transform(open_picture(self.found.pictures[index]))
        return image, self.found.labels[index], index


class Shuffled(Sampler[int]):
    """Tickets of one epoch in a random order that depends on the seed and the epoch.

    Args:
        count: N, pictures.
        seed: of the order.
    """

    def __init__(self, count: int, seed: int) -> None:
        self.count, self.seed, self.epoch = count, seed, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng((self.seed, self.epoch)).permutation(self.count)
        return iter((self.epoch * self.count + order).tolist())


def seed_everything(*numbers: int) -> None:
    """Set every generator that augmentation and models draw from, by several numbers at once.

    `torch.manual_seed` would do more than is needed: without an accelerator it remembers each call
    with its stack, which for a seed an image costs more than the image.
    """
    first, second, third = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(first))
    np.random.seed(int(second))  # noqa: NPY002  timm draws from the global one
    torch.default_generator.manual_seed(int(third))
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(int(third))
