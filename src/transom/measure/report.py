"""A comparison as one HTML file that needs nothing else: no network, no neighbours on the disk."""

from __future__ import annotations

import base64
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from transom.errors import DataError
from transom.measure.plot import pareto
from transom.measure.row import PLAIN, Column, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from transom.measure.comparison import Comparison

# High enough that blocks of the codec are not taken for patches of the model.
_JPEG_QUALITY = 88


@dataclass(frozen=True)
class Picture:
    """One picture of a section.

    Attributes:
        image: uint8 (H, W, 3) or (H, W), a PIL image, or a matplotlib figure.
        caption: What it shows; also read out where pictures are not seen.
        photo: Whether small losses do no harm; then it is kept as JPEG.
    """

    image: Any
    caption: str
    photo: bool = False


@dataclass(frozen=True)
class Section:
    """Pictures below the table, for example of one photograph under every method.

    Attributes:
        title: Heading.
        caption: What there is to see, one or two sentences.
        images: The pictures, shown side by side as far as there is room.
        open: Whether it is unfolded at first.
    """

    title: str
    caption: str = ""
    images: Sequence[Picture] = field(default_factory=tuple)
    open: bool = True


@dataclass(frozen=True)
class _Cell:
    text: str
    key: Any
    words: bool


def write(
    comparison: Comparison,
    path: str | os.PathLike[str],
    *,
    title: str | None = None,
    sections: Sequence[Section] = (),
) -> Path:
    """Write the report and return its path.

    Args:
        comparison: What to show; one that was interrupted says so.
        path: Of the HTML file; folders on the way are made.
        title: Heading; the model's name by default.
        sections: Pictures to show below the table.

    Raises:
        DataError: If a picture is none.
    """
    path = Path(path)
    text = render(comparison, title=title, sections=sections)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
    return path


def render(
    comparison: Comparison, *, title: str | None = None, sections: Sequence[Section] = ()
) -> str:
    """The report as text, see `write`."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("transom.measure"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    columns = comparison.columns()
    facts = dict(comparison.environment)
    command = facts.pop("command", "")
    return environment.get_template("report.html.j2").render(
        title=title or f"transom compare: {facts.get('model', 'a vision transformer')}",
        columns=columns,
        rows=[(row.method == PLAIN, _cells(row, columns)) for row in comparison.rows],
        plots=_plots(comparison),
        notes=comparison.caption().splitlines(),
        interrupted=comparison.interrupted,
        command=command,
        facts=[(name.replace("_", " "), value) for name, value in facts.items()],
        sections=[
            (section, [(_uri(picture), picture.caption) for picture in section.images])
            for section in sections
        ],
    )


def _cells(row: Row, columns: Sequence[Column]) -> list[_Cell]:
    cells = []
    for column in columns:
        value = column.value(row)
        cells.append(_Cell(column.show(row), "" if value is None else value, column.text))
    return cells


def _plots(comparison: Comparison) -> list[dict[str, str]]:
    """For every measure the plot in both colour schemes, as addresses that hold the picture."""
    if len(comparison.rows) < 2:
        return []
    return [
        {
            "name": name,
            "light": _figure_uri(pareto(comparison, name)),
            "dark": _figure_uri(pareto(comparison, name, dark=True)),
        }
        for name in comparison.qualities
    ]


def _figure_uri(figure: Figure) -> str:
    import matplotlib

    buffer = io.StringIO()
    # A fixed salt and no date: the same numbers give the same file, byte for byte.
    with matplotlib.rc_context({"svg.hashsalt": "transom"}):
        figure.savefig(
            buffer, format="svg", facecolor=figure.get_facecolor(), metadata={"Date": None}
        )
    return _data_uri("image/svg+xml", buffer.getvalue().encode())


def _uri(picture: Picture) -> str:
    image = picture.image
    if hasattr(image, "savefig"):
        return _figure_uri(image)
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise DataError(
                f"the picture {picture.caption!r} has shape {image.shape} and type {image.dtype}; "
                "expected uint8 (H, W, 3) or (H, W)"
            )
        image = Image.fromarray(image)
    if not isinstance(image, Image.Image):
        raise DataError(
            f"the picture {picture.caption!r} is a {type(image).__name__}; expected an array, a "
            "PIL image or a matplotlib figure"
        )
    buffer = io.BytesIO()
    if picture.photo:
        image.convert("RGB").save(buffer, "JPEG", quality=_JPEG_QUALITY, optimize=True)
        return _data_uri("image/jpeg", buffer.getvalue())
    image.save(buffer, "PNG", optimize=True)
    return _data_uri("image/png", buffer.getvalue())


def _data_uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
