"""The result of a comparison: its rows, as a table, a data frame, files and a picture."""

from __future__ import annotations

import csv
import io
import json
import os
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.errors import DataError, TransomError
from transom.measure.environment import Environment
from transom.measure.row import CONTROL, PLAIN, Column, Row, columns_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import JustifyMethod
    from rich.table import Table

    from transom.measure.report import Section

_FORMAT = "transom-comparison-1"


@dataclass
class Comparison:
    """Rows measured side by side on one host and one machine.

    Attributes:
        rows: The plain host first, then as asked for.
        environment: Model, machine, versions, seed and the command to repeat it.
        skipped: (method, reason) of what could not be fitted to this host.
        skipped_images: (name, reason) of images that could not be read.
        interrupted: Whether it was broken off before every row was measured.
    """

    rows: list[Row]
    environment: Environment
    skipped: list[tuple[str, str]] = field(default_factory=list)
    skipped_images: list[tuple[str, str]] = field(default_factory=list)
    interrupted: bool = False

    @property
    def qualities(self) -> list[str]:
        """Names of the quality columns, the most telling one first."""
        names: dict[str, None] = {}
        for row in self.rows:
            names.update(dict.fromkeys(row.quality))
        return list(names)

    @property
    def plain(self) -> Row | None:
        """The row of the plain host, once it is measured."""
        return next((row for row in self.rows if row.method == PLAIN), None)

    @property
    def noise(self) -> float | None:
        """Half the distance between the quartiles of the plain host's time ÷ its own time."""
        return None if self.plain is None else (self.plain.speedup[2] - self.plain.speedup[0]) / 2

    def table(self) -> Table:
        """The rows for a terminal, 120 columns or more; print it with `rich.print`."""
        from rich import box
        from rich.table import Table
        from rich.text import Text

        columns = self.columns()
        # with many measures columns move together, so that 120 columns still hold them
        gap = 1 if len(columns) <= 12 else 0
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, gap, 0, 0))
        table.caption, table.caption_justify = Text(self.caption()), "left"
        for column in columns:
            # long names of measures are broken, so that the numbers below stay close together
            lines = textwrap.wrap(column.title, 8, break_long_words=False, break_on_hyphens=False)
            justify: JustifyMethod = "left" if column.text else "right"
            table.add_column(
                Text("\n".join(lines)), justify=justify, no_wrap=True, vertical="bottom"
            )
        before = None
        for row in self.rows:
            cells = [column.show(row) for column in columns]
            table.add_row(*map(Text, cells if row.method != before else ["", *cells[1:]]))
            before = row.method
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, color_system=None, force_terminal=False, record=False)
        with console.capture() as captured:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")

    def columns(self) -> list[Column]:
        """What the table and the report show, from left to right."""
        return columns_of(self.rows, self.qualities)

    def caption(self) -> str:
        """What has to be said below the table: batch, noise, what is missing."""
        env = self.environment
        parts = []
        if self.plain is not None:
            parts.append(
                f"{env.get('model', 'model')} on {env.get('device', '?')}, batch "
                f"{self.plain.batch_size}, {env.get('images', '?')} images, medians of "
                f"{self.plain.rounds} rounds, noise of a speed-up ±{self.noise:.1%}"
            )
        red = sorted({row.method for row in self.rows if not row.timed})
        if red:
            parts.append(f"no speed is shown while parity fails: {', '.join(red)}")
        if any(row.control for row in self.rows):
            parts.append(
                f"by chance: {self.qualities[0]} of random pruning to the same token counts"
            )
        if "budget" in env:
            parts.append(
                f"settings found by measurement to need at most {env['budget']:g} of the plain "
                "host's GFLOPs"
            )
        raw = sorted({row.method for row in self.rows if row.untrained})
        if raw:
            parts.append(f"not trained, so only the costs count: {', '.join(raw)}")
        parts += [f"{method} left out: {reason}" for method, reason in self.skipped]
        if self.skipped_images:
            names = ", ".join(name for name, _ in self.skipped_images[:3])
            more = ", …" if len(self.skipped_images) > 3 else ""
            parts.append(
                f"images skipped as unreadable: {len(self.skipped_images)} ({names}{more})"
            )
        if self.interrupted:
            parts.append("interrupted: not every row was measured")
        return "\n".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        return {
            "format": _FORMAT,
            "environment": dict(self.environment),
            "interrupted": self.interrupted,
            "skipped": [list(pair) for pair in self.skipped],
            "skipped_images": [list(pair) for pair in self.skipped_images],
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write everything as one JSON file and return its path."""
        return _write(path, json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Comparison:
        """Read what `to_json` wrote.

        Raises:
            DataError: If the file is not there or holds something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as a comparison: {error}") from error
        if not isinstance(values, dict) or values.get("format") != _FORMAT:
            raise DataError(f"{path} holds no comparison; expected a file that to_json wrote")
        return cls(
            [Row.from_dict(row) for row in values["rows"]],
            values["environment"],
            [(a, b) for a, b in values["skipped"]],
            [(a, b) for a, b in values["skipped_images"]],
            values["interrupted"],
        )

    def records(self) -> list[dict[str, Any]]:
        """One flat mapping a row: units in the names, quartiles and measures in their own cells."""
        return [_record(row, self.qualities) for row in self.rows]

    def to_csv(self, path: str | os.PathLike[str]) -> Path:
        """Write `records` as a CSV file and return its path.

        Raises:
            DataError: If no row was measured.
        """
        records = self.records()
        if not records:
            raise DataError("no row was measured, so there is nothing to write")
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return _write(path, text.getvalue())

    def to_dataframe(self) -> Any:
        """`records` as a pandas DataFrame.

        Raises:
            TransomError: If pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError:
            raise TransomError(
                "to_dataframe needs pandas, which is not installed: pip install pandas; "
                "records(), to_csv(path) and to_json(path) do without it"
            ) from None
        return pd.DataFrame(self.records())

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        y: str | None = None,
        *,
        dark: bool = False,
    ) -> Figure:
        """Speed-up against quality with the Pareto front; see `transom.measure.plot.pareto`."""
        from transom.measure.plot import pareto, save_figure

        figure = pareto(self, y, dark=dark)
        if path is not None:
            save_figure(figure, path)
        return figure

    def save(
        self,
        path: str | os.PathLike[str],
        *,
        title: str | None = None,
        sections: Sequence[Section] = (),
    ) -> Path:
        """Write one self-contained HTML file; see `transom.measure.report.write`."""
        from transom.measure.report import write

        return write(self, path, title=title, sections=sections)


def _record(row: Row, qualities: list[str]) -> dict[str, Any]:
    twin = row.over_twin or (None, None, None)
    record: dict[str, Any] = {
        "method": row.method,
        "settings": row.label,
        "tokens": row.tokens,
        "gflops": row.gflops,
        "flops_ratio": row.flops_ratio,
        "ms_per_image": row.ms[1],
        "ms_per_image_q1": row.ms[0],
        "ms_per_image_q3": row.ms[2],
        "speedup": row.speedup[1],
        "speedup_q1": row.speedup[0],
        "speedup_q3": row.speedup[2],
        "speedup_limit": row.limit,
        "time_over_twin": twin[1],
        "time_over_twin_q1": twin[0],
        "time_over_twin_q3": twin[2],
        "peak_memory_mib": row.memory_mib,
        "batch_size": row.batch_size,
        "rounds": row.rounds,
    }
    record.update({name: row.quality.get(name) for name in qualities})
    record.update({f"{name} ({CONTROL})": row.control.get(name) for name in qualities})
    return record


def _write(path: str | os.PathLike[str], text: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path
