"""A dozen photographs that come with scikit-image and scikit-learn; nothing is downloaded.

Only files that lie in the wheels are used, and they are read from the installed folders: the
functions of `skimage.data` would download what they do not find.
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from transom.demo.saliency import IMAGE_SIZE, normalise
from transom.errors import DataError, TransomError

logger = logging.getLogger(__name__)

_FOLDERS = {"skimage": Path("data"), "sklearn": Path("datasets", "images")}
_DISTRIBUTIONS = {"skimage": "scikit-image", "sklearn": "scikit-learn"}

# Colour photographs with a subject first; then grey ones and such without one clear subject.
_FILES = {
    "astronaut": ("skimage", "astronaut.png"),
    "cat": ("skimage", "chelsea.png"),
    "coffee": ("skimage", "coffee.png"),
    "motorcycle": ("skimage", "motorcycle_left.png"),
    "rocket": ("skimage", "rocket.jpg"),
    "flower": ("sklearn", "flower.jpg"),
    "china": ("sklearn", "china.jpg"),
    "camera": ("skimage", "camera.png"),
    "coins": ("skimage", "coins.png"),
    "retina": ("skimage", "retina.jpg"),
    "galaxies": ("skimage", "hubble_deep_field.jpg"),
    "moon": ("skimage", "moon.png"),
}


@dataclass(frozen=True)
class Photo:
    """One photograph, as it is and as the model sees it.

    Attributes:
        name: short and unique.
        image: RGB at its full size and aspect.
        tensor: the model's input, float32, (3, size, size), normalised.
        display: the same pixels to draw on, uint8, (size, size, 3).
    """

    name: str
    image: Image.Image
    tensor: Tensor
    display: np.ndarray


def load_photos(size: int = IMAGE_SIZE) -> list[Photo]:
    """Load the demo's photographs.

    The shorter side is resized to `size` (bicubic, antialiased) and the centre is cropped.

    Args:
        size: side of the square that the model sees, in pixels.

    Returns:
        The photographs, always in the same order. One that the installed packages do not carry
        or that cannot be read is left out with a warning in the log.

    Raises:
        DataError: `size` is below 1, or not one photograph could be read.
        TransomError: scikit-image or scikit-learn is not installed.
    """
    if size < 1:
        raise DataError(f"size is the side of a picture in pixels, at least 1; given {size}")
    folders = {package: _find_folder(package) for package in _FOLDERS}
    missing = [_DISTRIBUTIONS[package] for package, folder in folders.items() if folder is None]
    if missing:
        raise TransomError(
            "the photographs of the demo come with scikit-image and scikit-learn, but "
            f"{' and '.join(missing)} cannot be found: run pip install 'transom[demo]'"
        )
    photos = []
    for name, (package, file) in _FILES.items():
        path = Path(folders[package] or "", file)
        try:
            with Image.open(path) as opened:
                image = opened.convert("RGB")
        except OSError as error:
            logger.warning("photograph %s left out, %s cannot be read: %s", name, path, error)
            continue
        display = np.asarray(square(image, size))
        # The copy is writable: torch refuses to share memory that it may not write.
        tensor = normalise(torch.from_numpy(display.copy()))
        photos.append(Photo(name, image, tensor, display))
    if not photos:
        raise DataError(
            "the installed scikit-image and scikit-learn carry none of the demo's photographs: "
            "run pip install --force-reinstall scikit-image scikit-learn"
        )
    return photos


def square(image: Image.Image, size: int = IMAGE_SIZE) -> Image.Image:
    """Resize the shorter side of a picture to `size` (bicubic) and crop its centre."""
    return ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)


def _find_folder(package: str) -> Path | None:
    """Find the folder of a package's pictures without importing the package."""
    spec = importlib.util.find_spec(package)
    locations = (spec.submodule_search_locations if spec else None) or []
    return Path(locations[0], _FOLDERS[package]) if locations else None
