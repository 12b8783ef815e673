"""The result of a comparison: its rows, as a table, a data frame, files and a picture."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom.errors import DataError, TransomError
from transom.measure.environment import Environment

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

    from transom.measure.report import Section

PLAIN = "plain"
CONTROL = "random"

# Of these a smaller value is the better one.
LOWER_IS_BETTER = frozenset({"kl", "difference", "mean absolute difference"})

_FORMAT = "transom-comparison-1"

Spread = tuple[float, float, float]


@dataclass(frozen=True)
class Row:
    """One method with one setting on one host.

    Attributes:
        method: Slug; "plain" for the host as it came.
        settings: What was set.
        tokens: Tokens after the last block, prefix included.
        lengths: Tokens after each block.
        gflops: Per image, a multiply-add counted as two.
        flops_ratio: GFLOPs ÷ GFLOPs of the plain host.
        ms: Time per image (lower quartile, median, upper quartile), ms.
        speedup: Time of the plain host ÷ this time, paired round by round, as three quartiles.
            In the row of the plain host: its time ÷ its own time, which shows the noise.
        limit: Speed-up that the FLOPs would allow: GFLOPs of the plain host ÷ GFLOPs.
        over_twin: Time ÷ time of the free twin (the same tokens after each block by plain
            slicing), three quartiles; None for the plain host.
        memory_mib: Highest memory of one call beyond weights and input, MiB.
        quality: Measures by name, means over the images.
        control: The same measures of random pruning to the same tokens after each block; empty
            where no token is given up.
        rounds: Samples each time was taken from.
        batch_size: Images of one call.
    """

    method: str
    settings: dict[str, Any]
    tokens: int
    lengths: tuple[int, ...]
    gflops: float
    flops_ratio: float
    ms: Spread
    speedup: Spread
    limit: float
    over_twin: Spread | None
    memory_mib: float | None
    quality: dict[str, float]
    control: dict[str, float]
    rounds: int
    batch_size: int

    @property
    def label(self) -> str:
        """Settings on one line, for example "r=8"."""
        return ", ".join(f"{name}={_short(value)}" for name, value in self.settings.items())

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Row:
        """The row that `to_dict` made the values of.

        Raises:
            DataError: If fields are missing or unknown.
        """
        names = {f.name for f in dataclasses.fields(cls)}
        if names != values.keys():
            raise DataError(
                f"these are not the values of a row: {sorted(names ^ values.keys())} are missing "
                "or unknown; they were written by another version of transom"
            )
        spreads = ("lengths", "ms", "speedup", "over_twin")
        fixed = {k: tuple(values[k]) for k in spreads if values[k] is not None}
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in values["settings"].items()}
        return cls(**{**values, **fixed, "settings": settings})


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

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), caption=self.caption())
        table.caption_justify = "left"
        for column in self.columns():
            table.add_column(column.title, justify="left" if column.text else "right", no_wrap=True)
        before = None
        for row in self.rows:
            if before is not None and row.method != before:
                table.add_section()
            before = row.method
            table.add_row(*(column.show(row) for column in self.columns()))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, color_system=None, force_terminal=False, record=False)
        with console.capture() as captured:
            console.print(self.table())
        return "\n".join(line.rstrip() for line in captured.get().splitlines()).strip("\n")

    def columns(self) -> list[Column]:
        """What the table, the report and the CSV file's reader see, from left to right."""
        columns = [
            Column("method", "slug of the method", lambda r: r.method, str, text=True),
            Column("settings", "what was set", lambda r: r.label, str, text=True),
            Column("tokens", "after the last block", lambda r: r.tokens, str),
            Column("GFLOPs", "per image, a multiply-add counted as two", lambda r: r.gflops, _3),
            Column("ratio", "GFLOPs ÷ plain", lambda r: r.flops_ratio, _2),
            Column(
                "ms/image",
                "median, ± half the distance of the quartiles",
                lambda r: r.ms[1],
                _3,
                lambda r: (r.ms[2] - r.ms[0]) / 2,
            ),
            Column("speed-up", "time of plain ÷ time, paired", lambda r: r.speedup[1], _times),
            Column("limit", "speed-up the FLOPs would allow", lambda r: r.limit, _times),
            Column(
                "÷ twin",
                "time ÷ time of the free twin: the same token counts by plain slicing",
                lambda r: None if r.over_twin is None else r.over_twin[1],
                _2,
            ),
            Column("MiB", "peak memory beyond weights and input", lambda r: r.memory_mib, _1),
        ]
        for name in self.qualities:
            columns.append(Column(name, "mean over the images", _reader("quality", name), _4))
        controls = [name for name in self.qualities[:1] if any(r.control for r in self.rows)]
        for name in controls:
            columns.append(
                Column(
                    "by chance",
                    f"{name} of random pruning to the same token counts",
                    _reader("control", name),
                    _4,
                )
            )
        return columns

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
        if any(row.control for row in self.rows):
            parts.append(
                f"by chance: {self.qualities[0]} of random pruning to the same token counts"
            )
        parts += [f"{method} left out: {reason}" for method, reason in self.skipped]
        if self.skipped_images:
            names = ", ".join(name for name, _ in self.skipped_images[:3])
            more = ", …" if len(self.skipped_images) > 3 else ""
            parts.append(f"{len(self.skipped_images)} unreadable images skipped: {names}{more}")
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
        import io

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


@dataclass(frozen=True)
class Column:
    """One column of the table and of the report.

    Attributes:
        title: Header with the unit.
        meaning: One line for readers who wonder.
        value: Of a row; None where there is none.
        form: A value as text.
        spread: What to write behind ±, if anything.
        text: Whether it holds words (left-aligned) instead of numbers.
    """

    title: str
    meaning: str
    value: Callable[[Row], Any]
    form: Callable[[Any], str]
    spread: Callable[[Row], float] | None = None
    text: bool = False

    def show(self, row: Row) -> str:
        """The cell of a row."""
        value = self.value(row)
        if value is None:
            return "–"
        return self.form(value) + (f" ±{_3(self.spread(row))}" if self.spread else "")


def _reader(part: str, name: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(row, part).get(name)


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


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        items = [_short(item) for item in value]
        return f"({', '.join(items if len(items) <= 4 else [*items[:2], '…', items[-1]])})"
    return str(value)


def _3(value: float) -> str:
    """Three significant digits without exponents."""
    if value == 0:
        return "0"
    if abs(value) < 1:
        return f"{value:.3f}" if abs(value) >= 0.01 else f"{value:.1e}"
    return f"{value:.{max(0, 2 - int(math.log10(abs(value))))}f}"


def _1(value: float) -> str:
    return f"{value:.1f}"


def _2(value: float) -> str:
    return f"{value:.2f}"


def _4(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _times(value: float) -> str:
    return f"{value:.2f}×"
