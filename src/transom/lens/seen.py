"""What was seen through a lens: arrays, figures, words, and the page that shows them."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from transom.lens.drawing import Pixels, sheet

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Lens = Literal["attention", "rollout", "fates", "heads", "sinks", "concepts", "tree"]
Array = NDArray[Any]
LENSES: tuple[Lens, ...] = get_args(Lens)
OF_ROOM: dict[Lens, str] = {
    "heads": "vit-visual-analytics",
    "concepts": "pace",
    "tree": "dependency-vit",
}
"""Lenses that show what one room computes, and that room."""

EXPLAINED: dict[Lens, str] = {
    "attention": "Where each head looks: attention of the class token on the patches, or what "
    "patches get from all patches where there is no class token. First tile: mean of the heads.",
    "rollout": "Attention through all layers up to each one, half of it going straight on "
    "(Abnar and Zuidema, 2020). The brightest 2 % of the patches are shown alike.",
    "fates": "Patches that became one token share their mean colour and an outline; dropped "
    "patches are dark.",
    "heads": "Every head: what pruning it costs, how far it looks, which pattern it makes.",
    "sinks": "Attention that each patch gets. A sink is a patch that gets more than "
    "5 times the mean of the patches.",
    "concepts": "Concepts that explain the patch embeddings of one layer (PACE; Wang et al., "
    "2024). The colour of a patch is its main concept; with one concept alone, bright patches "
    "are those it explains. Concepts have no names: what they have in common shows in the "
    "patches that are most typical of each.",
    "tree": "Each patch hangs on the patch it sends most to (DependencyViT; "
    "Ding et al., 2023). The white square is the root; subtrees of one colour are parts.",
}


class Given(NamedTuple):
    """What a lens looks at.

    model: in eval mode.
    x: (B, 3, H, W) as the model wants it.
    names: of the images.
    pixels: of the images as the model sees them, to draw on.
    """

    model: nn.Module
    x: Tensor
    names: list[str]
    pixels: list[Pixels]


@dataclass
class Panel:
    """Pictures of one image that a slider goes through.

    Attributes:
        title: of the panel.
        frames: by name.
        axis: what the slider goes through.
    """

    title: str
    frames: list[tuple[str, Pixels]]
    axis: str = "layer"


@dataclass
class Look:
    """What was seen.

    Attributes:
        lens: through which.
        arrays: the numbers behind the pictures; L layers, B images, H heads, (h, w) grid.
            attention (L, B, H, h, w); rollout (L, B, h, w); index (L, B, N0); received
            (L, B, N) and norm (L, B, N); for heads the table, each (L, H), and mass (L, H, R).
        figures: of matplotlib, by the name of the image; for heads one, "heads".
        panels: the same as frames.
        summary: the essentials, in words.
        details: what a lens returned as a whole (for heads, its overview).
    """

    lens: Lens
    arrays: dict[str, Array]
    figures: dict[str, Figure] = field(default_factory=dict)
    panels: list[Panel] = field(default_factory=list)
    summary: list[str] = field(default_factory=list)
    details: Any = None

    def save(self, folder: str | Path, title: str = "") -> Path:
        """Write a PNG for each figure and the page.

        Args:
            folder: made if it is not there.
            title: of the page.

        Returns:
            The page, LENS.html.
        """
        import jinja2

        out = Path(folder)
        out.mkdir(parents=True, exist_ok=True)
        for i, (name, figure) in enumerate(self.figures.items()):
            stem = self.lens if name == self.lens else f"{self.lens}-{i}-{Path(name).stem}"
            figure.savefig(out / f"{stem}.png", dpi=110)
        panels = [
            {
                "title": p.title,
                "axis": p.axis,
                "frames": [(name, _encoded(x)) for name, x in p.frames],
            }
            for p in self.panels
        ]
        environment = jinja2.Environment(
            loader=jinja2.PackageLoader("transom.lens"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        page = environment.get_template("look.html.j2").render(
            title=title or self.lens,
            explained=EXPLAINED[self.lens],
            summary=self.summary,
            panels=panels,
        )
        path = out / f"{self.lens}.html"
        path.write_text(page, encoding="utf-8")
        return path


def with_panels(
    look: Look, names: list[str], frames: list[list[tuple[str, Pixels]]], axis: str = "layer"
) -> Look:
    """The same with a panel and a figure for each image."""
    for name, own in zip(names, frames, strict=True):
        look.panels.append(Panel(name, own, axis))
        look.figures[name] = sheet(name, own)
    return look


def drawn(figure: Figure) -> Pixels:
    """The pixels of a figure."""
    from PIL import Image

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110, format="png")
    return np.asarray(Image.open(buffer).convert("RGB"))


def _encoded(pixels: Pixels) -> str:
    """A data address; photographs are much smaller and faster as JPEG."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
