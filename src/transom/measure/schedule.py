"""Where to reduce how much: schedules chosen by measurement on the user's machine.

A token step costs time wherever it runs, so few blocks with much can beat many blocks with little,
and which of them wins depends on the machine, the batch size and the model. Each pattern below is
measured at three strengths; the strength that gives the wished speed-up is read off between them
and measured again; of the patterns that reach the speed-up the most faithful one is chosen.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from transom import hosts, registry
from transom.errors import FitError, SettingsError
from transom.measure.budget import removals
from transom.measure.compare import compare
from transom.measure.row import LOWER_IS_BETTER, Row
from transom.measure.subjects import part

FORMAT = "transom-schedule-1"
STRENGTHS = (0.3, 0.55, 0.8)  # of the patch tokens, removed in all
REACHED = 0.97  # of the wished speed-up counts as reached: timing noise is of that order


@dataclass(frozen=True)
class Schedule:
    """A chosen schedule and what it was chosen from.

    Attributes:
        slug: of the method.
        settings: its hyperparameters, with one number a block.
        wished: the speed-up asked for.
        row: the measurement of the choice.
        candidates: pattern and measurement of every finalist, the choice among them.
        reached: whether the wished speed-up was measured; else the fastest was chosen.
    """

    slug: str
    settings: dict[str, Any]
    wished: float
    row: Row
    candidates: list[tuple[str, Row]]
    reached: bool

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write what ``transom.apply(model, slug, schedule=path)`` takes."""
        path = Path(path)
        content = {
            "format": FORMAT,
            "slug": self.slug,
            "settings": self.settings,
            "wished_speedup": self.wished,
            "measured_speedup": self.row.speedup[1],
            "batch_size": self.row.batch_size,
            "quality": self.row.quality,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return path


def patterns(depth: int) -> dict[str, list[float]]:
    """Shares of the removal by block, each list summing to one.

    Args:
        depth: number of blocks.
    """
    found = {
        "every block alike": [1.0] * depth,
        "falling to zero": [float(depth - 1 - i) or 0.0 for i in range(depth)],
        "first half": [1.0 if i < (depth + 1) // 2 else 0.0 for i in range(depth)],
    }
    for count in (1, 2, 3):
        places = {depth * i // (count + 1) for i in range(1, count + 1)}
        name = "one block" if count == 1 else f"{count} blocks"
        found[name] = [1.0 if i in places else 0.0 for i in range(depth)]
    return {name: [w / sum(ws) for w in ws] for name, ws in found.items() if sum(ws)}


def choose(
    model: nn.Module,
    images: Any,
    slug: str,
    speedup: float,
    *,
    target: str = "",
    rounds: int = 7,
    progress: Callable[[Row, int, int], None] | None = None,
    **options: Any,
) -> Schedule:
    """Choose a schedule for a wished speed-up by measuring.

    Args:
        model: a supported host or one that contains it, with nothing fitted.
        images: as in `compare`.
        slug: of a method that can be told how much to remove where.
        speedup: wished, over the plain host.
        target: as in `compare`.
        rounds: samples of every time; the finalists take twice as many.
        progress: as in `compare`.
        **options: passed on to `compare`.

    Returns:
        The choice.

    Raises:
        SettingsError: the method takes no schedule, or the speed-up is no number above 1.
        FitError: no pattern fits this host.
    """
    if not speedup > 1:
        raise SettingsError(f"speedup is {speedup!r}; expected a factor above 1")
    method = registry.methods().get(slug) or type(registry.build(slug, {}))
    host = hosts.find(part(model, target))
    if host.grid is None:
        raise FitError(f"the grid of this {host.family} is not known, so nothing can be scheduled")
    patches = host.grid[0] * host.grid[1]

    def settings(weights: Sequence[float], share: float) -> dict[str, Any]:
        found = method.removing(removals(weights, patches, share), patches)
        if found is None:
            raise SettingsError(f"{slug} cannot be told how many tokens to remove in which block")
        return found

    shapes = patterns(host.depth)
    plans = [(name, share, settings(shapes[name], share)) for name in shapes for share in STRENGTHS]
    common = {**options, "target": target, "control": False, "progress": progress}
    coarse = _measured(model, images, slug, [p[2] for p in plans], rounds, common)
    finals = []
    for name, weights in shapes.items():
        points = [
            (share, row.speedup[1])
            for (other, share, _), row in zip(plans, coarse, strict=True)
            if other == name
        ]
        finals.append((name, settings(weights, _strength(points, speedup))))
    rows = _measured(model, images, slug, [f[1] for f in finals], 2 * rounds, common)
    candidates = [(name, row) for (name, _), row in zip(finals, rows, strict=True)]
    enough = [i for i, row in enumerate(rows) if row.speedup[1] >= REACHED * speedup]
    if enough:
        best = max(enough, key=lambda i: _merit(rows[i]))
    else:
        best = max(range(len(rows)), key=lambda i: rows[i].speedup[1])
    return Schedule(slug, finals[best][1], speedup, rows[best], candidates, bool(enough))


def break_even(
    model: nn.Module,
    images: Any,
    method: Any,
    *,
    batch_sizes: Sequence[int] = (1, 2, 4, 8, 16),
    rounds: int = 7,
    **options: Any,
) -> int | None:
    """The smallest batch size from which on a method is faster than the plain host.

    Args:
        model: as in `compare`.
        images: as in `compare`.
        method: slug and settings, or an instance.
        batch_sizes: to try, rising.
        rounds: samples of every time.
        **options: passed on to `compare`.

    Returns:
        The batch size; None when the method is not faster at any of them.
    """
    pays: int | None = None
    for size in sorted(batch_sizes, reverse=True):
        result = compare(
            model, images, [method], batch_size=size, rounds=rounds, control=False, **options
        )
        # the whole middle half of the measurements has to lie above one
        if len(result.rows) < 2 or result.rows[1].speedup[0] <= 1:
            break
        pays = size
    return pays


def _measured(
    model: nn.Module,
    images: Any,
    slug: str,
    settings: list[dict[str, Any]],
    rounds: int,
    common: dict[str, Any],
) -> list[Row]:
    result = compare(model, images, [(slug, s) for s in settings], rounds=rounds, **common)
    if result.interrupted:
        raise KeyboardInterrupt
    if result.skipped:
        raise FitError(f"{result.skipped[0][0]}: {result.skipped[0][1]}")
    return result.rows[1:]


def _strength(points: Sequence[tuple[float, float]], wished: float) -> float:
    """Part to remove for the wished speed-up, by straight lines through measured points."""
    line = sorted([(0.0, 1.0), *points])
    for (a, fast_a), (b, fast_b) in itertools.pairwise(line):
        if fast_a <= wished <= fast_b and fast_b > fast_a:
            return a + (b - a) * (wished - fast_a) / (fast_b - fast_a)
    return line[-1][0] if wished > line[-1][1] else line[1][0]


def _merit(row: Row) -> float:
    name, value = next(iter(row.quality.items()))
    return -value if name in LOWER_IS_BETTER else value
