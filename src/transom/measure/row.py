"""One measured row, and the columns in which rows are shown."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transom import parity, registry
from transom.errors import DataError

PLAIN = "plain"
CONTROL = "random"

# Of these a smaller value is the better one.
LOWER_IS_BETTER = frozenset({"kl", "difference", "mean absolute difference"})

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

    @property
    def timed(self) -> bool:
        """Whether its times may be shown: not while a golden case of the method fails."""
        return not parity.is_red(self.method)

    @property
    def untrained(self) -> bool:
        """Whether the method came with parameters that have no meaning before training."""
        if self.method not in registry.methods():
            return False
        return registry.build(self.method, self.settings).needs_training

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
        settings = {
            k: tuple(v) if isinstance(v, list) else v for k, v in values["settings"].items()
        }
        return cls(**{**values, **fixed, "settings": settings})


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
        return self.form(value) + (f" ±{self.spread(row):.0%}" if self.spread else "")


def _reader(part: str, name: str) -> Callable[[Row], float | None]:
    return lambda row: getattr(row, part).get(name)


def columns_of(rows: Sequence[Row], qualities: Sequence[str]) -> list[Column]:
    """The columns that these rows fill, from left to right.

    Args:
        rows: What will be shown.
        qualities: Names of the measures, the most telling one first.
    """
    columns = [
        Column("method", "slug of the method", lambda r: r.method, str, text=True),
        Column("settings", "what was set", lambda r: r.label, str, text=True),
        Column("tokens", "after the last block", lambda r: r.tokens, str),
        Column("GFLOPs", "per image, a multiply-add counted as two", lambda r: r.gflops, _3),
        Column("ratio", "GFLOPs ÷ plain", lambda r: r.flops_ratio, _2),
        Column(
            "ms/image",
            "median, ± half the distance of the quartiles in percent",
            lambda r: r.ms[1] if r.timed else None,
            _3,
            lambda r: (r.ms[2] - r.ms[0]) / 2 / r.ms[1],
        ),
        Column(
            "speed-up",
            "time of plain ÷ time, both from the rounds of this row",
            lambda r: r.speedup[1] if r.timed else None,
            _times,
        ),
        Column("limit", "speed-up the FLOPs would allow", lambda r: r.limit, _times),
        Column(
            "÷ twin",
            "time ÷ time of the free twin: the same token counts by plain slicing",
            lambda r: r.over_twin[1] if r.timed and r.over_twin is not None else None,
            _2,
        ),
        Column("MiB", "peak memory beyond weights and input", lambda r: r.memory_mib, _1),
    ]
    for name in qualities:
        columns.append(Column(name, "mean over the images", _reader("quality", name), _4))
    controls = [name for name in qualities[:1] if any(r.control for r in rows)]
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


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (tuple, list)):
        items = [_short(item) for item in value]
        return f"({', '.join(items if len(items) <= 4 else [*items[:2], '…', items[-1]])})"
    return str(value)


def _3(value: float) -> str:
    """Three significant digits, trailing zeros included."""
    if value == 0:
        return "0"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _1(value: float) -> str:
    return f"{value:.1f}"


def _2(value: float) -> str:
    return f"{value:.2f}"


def _4(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 10 else f"{value:.2f}"


def _times(value: float) -> str:
    return f"{value:.2f}×"
