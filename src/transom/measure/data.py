"""Images for a measurement: folders, parquet files, tensors and pictures in memory.

What a model wants to see (size, crop, mean, standard deviation) is read from the model. Pictures
are kept as uint8 after resizing and cropping, 3·H·W bytes each, and normalised batch by batch.
"""

from __future__ import annotations

import hashlib
import io
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from transom.errors import DataError
from transom.measure.preprocessing import Preprocessing
from transom.measure.quality import check_labels

logger = logging.getLogger(__name__)

# PIL reports broken files with all of these; one of them must not end a long run
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)

Source = str | PathLike[str] | Tensor | Iterable[Any]


@dataclass(frozen=True)
class ImageSet:
    """Images ready to be measured on.

    Attributes:
        images: (N, 3, H, W), uint8 pixels, or floating point if they were given normalised.
        preprocessing: how pixels become the model's input.
        labels: (N,) int64, or None.
        names: of the images, for messages and reports.
        classes: names of the classes by label, where the source has them.
        skipped: (name, reason) of every image that could not be read.
    """

    images: Tensor
    preprocessing: Preprocessing
    labels: Tensor | None = None
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] | None = None
    skipped: tuple[tuple[str, str], ...] = field(default=())

    def __len__(self) -> int:
        return len(self.images)

    def batch(
        self,
        start: int,
        count: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Images start to start + count as the model's input (B, 3, H, W); B < count at the end."""
        images = self.images[start : start + count].to(device)
        if not images.is_floating_point():
            images = self.preprocessing.normalise(images)
        return images.to(dtype)

    def batches(
        self,
        size: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Iterator[Tensor]:
        """All images in order as inputs (B, 3, H, W), the last batch maybe smaller."""
        for start in range(0, len(self), size):
            yield self.batch(start, size, device, dtype)

    def sample(
        self,
        count: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Exactly `count` images (count, 3, H, W) for timing; images repeat if there are fewer."""
        batch = self.batch(0, count, device, dtype)
        return batch[torch.arange(count, device=batch.device) % len(batch)]

    def fingerprint(self) -> str:
        """Short digest of pixels, labels and normalisation; equal data has an equal one."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.preprocessing)).encode())
        digest.update(_bytes(self.images))
        if self.labels is not None:
            digest.update(_bytes(self.labels))
        return digest.hexdigest()[:16]


def load_images(
    source: Source,
    preprocessing: Preprocessing,
    *,
    labels: Tensor | Sequence[int] | bool | None = None,
    classes: int | None = None,
    limit: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Read images from wherever they are.

    Args:
        source: One of: a folder of images; a folder with one sub-folder a class (labels follow
            the sorted folder names); a parquet file with a column `image` (encoded bytes, or a
            struct with a field `bytes`) and maybe `label`; a tensor (N, 3, H, W), uint8 pixels or
            normalised floating point; an iterable of PIL images, uint8 arrays (H, W, 3), bytes
            or paths.
        preprocessing: What the model wants to see, see `preprocessing_of`.
        labels: (N,) class numbers for a tensor or an iterable, one for every given image; for a
            folder or parquet file False leaves its labels out.
        classes: How many classes the model's head has; labels are checked against it.
        limit: At most this many images; from a folder or file they are taken at even distances,
            so that every part of it counts.
        progress: Called with (images read, images in all) now and then.

    Raises:
        DataError: If there is no such source, no readable image in it, or its labels do not fit
            the head.
    """
    if limit is not None and limit < 1:
        raise DataError(f"limit={limit}: expected at least 1 image, or None for all")
    if isinstance(source, (str, PathLike)):
        path = Path(source)
        if labels is not None and not isinstance(labels, bool):
            raise DataError(
                f"labels were given for {path.name}, but a folder or file brings its own; pass "
                "labels=False to leave them out, or the images as a list"
            )
        found = find(path, classes if labels is not False else None, limit)
        if labels is False:
            found = replace(found, labels=None, classes=None)
    elif isinstance(source, Tensor):
        return _from_tensor(source, preprocessing, _labels(labels), classes, limit)
    elif isinstance(source, Iterable):
        found = _from_iterable(source, _labels(labels), limit)
    else:
        raise DataError(
            f"got a {type(source).__name__} as images; expected a folder, a parquet file, a "
            "tensor (N, 3, H, W) or an iterable of pictures"
        )
    return decode(found, preprocessing, classes, progress)


@dataclass(frozen=True)
class Found:
    """Pictures that are known but not decoded; `labels` has one entry a picture."""

    origin: str
    names: list[str]
    pictures: list[Any]
    labels: list[int] | None = None
    classes: tuple[str, ...] | None = None


def decode(
    found: Found,
    preprocessing: Preprocessing,
    classes: int | None,
    progress: Callable[[int, int], None] | None = None,
) -> ImageSet:
    """Read what was found; pictures that cannot be read are named and left out.

    Args:
        found: The pictures.
        preprocessing: What the model wants to see.
        classes: How many classes the head has; labels are checked against it.
        progress: Called with (images read, images in all) now and then.

    Raises:
        DataError: If no picture can be read, or the labels do not fit the head.
    """
    prepare = preprocessing.pixels()
    images: list[Tensor] = []
    kept: list[int] = []
    skipped: list[tuple[str, str]] = []
    for i, (name, picture) in enumerate(zip(found.names, found.pictures, strict=True)):
        try:
            images.append(prepare(open_picture(picture)))
            kept.append(i)
        except UNREADABLE as error:
            reason = str(error) or type(error).__name__
            if isinstance(picture, Path):
                reason = reason.replace(str(picture), picture.name)
            skipped.append((name, reason))
            logger.warning("skipped %s: %s", name, reason)
        if progress is not None:
            progress(i + 1, len(found.names))
    if not images:
        first = f"; the first says: {skipped[0][1]}" if skipped else ""
        raise DataError(
            f"no readable image in {found.origin} ({len(skipped)} could not be read{first})"
        )
    if skipped:
        logger.warning("skipped %d of %d images", len(skipped), len(found.names))
    labels = None
    if found.labels is not None:
        labels = torch.tensor([found.labels[i] for i in kept])
        if classes is not None:
            check_labels(labels, classes)
    return ImageSet(
        torch.stack(images),
        preprocessing,
        labels,
        tuple(found.names[i] for i in kept),
        found.classes,
        tuple(skipped),
    )


def open_picture(picture: Any) -> Image.Image:
    """One picture, decoded, in RGB.

    Args:
        picture: PIL image, uint8 array (H, W, 3) or (H, W), encoded bytes, or a path.

    Raises:
        OSError: It cannot be read; Pillow also raises the others of `UNREADABLE`.
    """
    if isinstance(picture, Image.Image):
        return picture.convert("RGB")
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim not in (2, 3):
            raise ValueError(
                f"array of shape {picture.shape} and type {picture.dtype}; "
                "expected uint8 (H, W, 3) or (H, W)"
            )
        return Image.fromarray(picture).convert("RGB")
    if isinstance(picture, bytes):
        picture = io.BytesIO(picture)
    elif not isinstance(picture, (str, PathLike)):
        raise ValueError(
            f"a {type(picture).__name__} is no picture; expected a PIL image, a uint8 array, "
            "bytes or a path"
        )
    with Image.open(picture) as opened:
        return opened.convert("RGB")


def find(path: Path, classes: int | None, limit: int | None) -> Found:
    """The pictures in a folder or file, not decoded.

    Args:
        path: As `source` of `load_images`.
        classes: How many class folders are expected; None for any number.
        limit: At most so many, at even distances.

    Raises:
        DataError: If there is nothing to read.
    """
    if path.is_dir():
        return _from_folder(path, classes, limit)
    if not path.exists():
        raise DataError(f"there is no folder or file {path}; give an image folder or parquet file")
    if path.suffix.lower() in (".parquet", ".pq"):
        return _from_parquet(path, limit)
    if path.suffix.lower() in Image.registered_extensions():
        return Found(path.name, [path.name], [path])
    raise DataError(
        f"{path.name} is neither a folder, a parquet file nor an image; "
        "give an image folder or a .parquet file"
    )


def _from_folder(path: Path, classes: int | None, limit: int | None) -> Found:
    folders = sorted(p for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
    loose = [p for p in sorted(path.iterdir()) if _is_image(p)]
    inside = [[p for p in sorted(f.rglob("*")) if _is_image(p)] for f in folders]
    count = sum(map(len, inside))
    if loose and count:
        raise DataError(
            f"{path.name} has {len(loose)} images beside {len(folders)} folders with images, so "
            "it is not clear whether the folders are classes; move one or the other away"
        )
    if not loose and not count:
        known = "JPEG, PNG, WebP, TIFF, BMP and what else Pillow reads"
        raise DataError(f"{path.name} holds no image ({known}), neither itself nor in sub-folders")
    if loose:
        chosen = _spread(loose, limit)
        return Found(path.name, [p.name for p in chosen], list(chosen))
    # A folder without images keeps its number: numbers follow the folder names, not the files.
    if classes is not None and len(folders) != classes:
        raise DataError(
            f"{path.name} has {len(folders)} class folders, but the head has {classes} classes; "
            "use the data the head was trained for, or leave the labels out (labels=False)"
        )
    pairs = [(p, label) for label, files in enumerate(inside) for p in files]
    pairs = _spread(pairs, limit)
    return Found(
        path.name,
        [p.relative_to(path).as_posix() for p, _ in pairs],
        [p for p, _ in pairs],
        [label for _, label in pairs],
        tuple(f.name for f in folders),
    )


def _is_image(path: Path) -> bool:
    return (
        path.suffix.lower() in Image.registered_extensions()
        and not path.name.startswith(".")
        and path.is_file()
    )


def _from_parquet(path: Path, limit: int | None) -> Found:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise DataError(
            f"reading {path.name} needs the package pyarrow: pip install pyarrow"
        ) from None
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path.name} cannot be read as parquet: {error}") from error
    names = file.schema_arrow.names
    if "image" not in names:
        raise DataError(f"{path.name} has the columns {names}; expected one called 'image'")
    labelled = "label" in names
    if labelled and not pa.types.is_integer(file.schema_arrow.field("label").type):
        raise DataError(
            f"the column 'label' of {path.name} holds {file.schema_arrow.field('label').type}; "
            "expected class numbers"
        )
    chosen = set(_spread(range(file.metadata.num_rows), limit))
    if not chosen:
        raise DataError(f"{path.name} has no rows")
    kept, pictures, labels = [], [], []
    row = 0
    for batch in file.iter_batches(256, columns=["image", "label"] if labelled else ["image"]):
        wanted = [i for i in range(batch.num_rows) if row + i in chosen]
        for i in wanted:
            kept.append(row + i)
            value = batch.column("image")[i].as_py()
            pictures.append(value.get("bytes") if isinstance(value, dict) else value)
            if labelled:
                label = batch.column("label")[i].as_py()
                labels.append(-1 if label is None else int(label))
        row += batch.num_rows
    return Found(
        path.name,
        [f"{path.name} row {i}" for i in kept],
        pictures,
        labels if labelled else None,
    )


def _from_tensor(
    images: Tensor,
    preprocessing: Preprocessing,
    labels: list[int] | None,
    classes: int | None,
    limit: int | None,
) -> ImageSet:
    if images.ndim != 4 or images.shape[1] != 3 or not len(images):
        raise DataError(
            f"got images of shape {tuple(images.shape)}; expected (N, 3, H, W) with N >= 1"
        )
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise DataError(
            f"got images of type {images.dtype}; expected uint8 pixels, or floating point that "
            "is normalised for the model"
        )
    kept = None
    if labels is not None:
        _same_number(len(labels), len(images))
        kept = torch.tensor(labels[:limit])
        if classes is not None:
            check_labels(kept, classes)
    images = images[:limit].detach()
    names = tuple(f"image {i}" for i in range(len(images)))
    return ImageSet(images, preprocessing, kept, names)


def _from_iterable(source: Iterable[Any], labels: list[int] | None, limit: int | None) -> Found:
    pictures = list(source if limit is None else islice(source, limit))
    if not pictures:
        raise DataError("the given images are empty; expected at least one picture")
    if labels is not None:
        if limit is None or len(labels) < len(pictures):
            _same_number(len(labels), len(pictures))
        labels = labels[: len(pictures)]
    names = [
        Path(p).name if isinstance(p, (str, PathLike)) else f"image {i}"
        for i, p in enumerate(pictures)
    ]
    return Found("the given images", names, pictures, labels)


def _labels(labels: Tensor | Sequence[int] | bool | None) -> list[int] | None:
    if labels is None or labels is False:
        return None
    if labels is True:
        raise DataError("labels=True: images in memory bring no labels; pass the class numbers")
    if isinstance(labels, Tensor) and (labels.ndim != 1 or labels.is_floating_point()):
        raise DataError(
            f"got labels of shape {tuple(labels.shape)} and type {labels.dtype}; "
            "expected (N,) integers"
        )
    return [int(label) for label in labels]


def _same_number(labels: int, images: int) -> None:
    if labels != images:
        raise DataError(f"got {labels} labels for {images} images; expected one for every image")


def _spread(items: Sequence[Any], limit: int | None) -> list[Any]:
    if limit is None or limit >= len(items):
        return list(items)
    return [items[i * len(items) // limit] for i in range(limit)]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
