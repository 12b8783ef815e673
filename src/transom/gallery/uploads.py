"""Pictures from strangers: looked at before they are decoded, and decoded once.

What is kept is not the upload but a picture of our own: turned upright, in RGB, at most 1024
pixels wide and high, without metadata.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib

from PIL import Image, ImageOps

from transom.errors import GalleryError

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
MAX_SIDE = 1024  # of what is kept
_MIN_SIDE = 8

_SIGNATURES = (
    (b"\xff\xd8\xff", b"", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", b"", "PNG"),
    (b"RIFF", b"WEBP", "WEBP"),
)
_BROKEN = (
    OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError,
    struct.error, zlib.error, OverflowError,
)  # fmt: skip


def read_picture(
    data: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> Image.Image:
    """A picture from uploaded bytes.

    Args:
        data: as they came; neither their name nor their claimed type counts.
        max_bytes: refused above.
        max_pixels: refused above, before anything is decoded.

    Returns:
        RGB, no side longer than 1024 pixels.

    Raises:
        GalleryError: it is too large, no JPEG, PNG or WebP, or broken.
    """
    if len(data) > max_bytes:
        raise GalleryError(
            f"the picture has {len(data) / 2**20:.1f} MiB; at most {max_bytes / 2**20:g} are taken"
        )
    form = sniff(data)
    if form is None:
        raise GalleryError("the file is no picture that is taken here: expected JPEG, PNG or WebP")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size, which is checked right here
            opened = Image.open(io.BytesIO(data), formats=[form])
        width, height = opened.size
        if width * height > max_pixels:
            raise GalleryError(
                f"the picture has {width}×{height} pixels; at most {max_pixels / 1e6:g} million "
                "are taken"
            )
        if min(width, height) < _MIN_SIDE:
            raise GalleryError(f"the picture has {width}×{height} pixels; at least 8×8 are needed")
        opened.draft("RGB", (MAX_SIDE, MAX_SIDE))  # lets a JPEG be decoded small
        upright = ImageOps.exif_transpose(opened)
        upright.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        return _flat(upright)
    except Image.DecompressionBombError as error:
        raise GalleryError(
            f"the picture has far more than the {max_pixels / 1e6:g} million pixels that are taken"
        ) from error
    except _BROKEN as error:
        raise GalleryError(
            f"the {form} cannot be decoded: {str(error)[:200] or type(error).__name__}"
        ) from error


def sniff(data: bytes) -> str | None:
    """The format that the first bytes show: "JPEG", "PNG", "WEBP", or None."""
    for start, at_eight, form in _SIGNATURES:
        if data.startswith(start) and data[8:12].startswith(at_eight):
            return form
    return None


def _flat(picture: Image.Image) -> Image.Image:
    """RGB on white, without anything that came along."""
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        layer = picture.convert("RGBA")
        ground = Image.new("RGBA", layer.size, "white")
        picture = Image.alpha_composite(ground, layer)
    if picture.mode.startswith("I"):
        picture = picture.point(lambda value: value / 256).convert("L")
    result = Image.new("RGB", picture.size)
    result.paste(picture.convert("RGB"))
    return result
