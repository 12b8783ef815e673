"""Attention operators beside plain attention of the same shape, over the number of tokens.

    python benchmarks/attention.py [--operators fna ...] [--sides 14 28 56 112 128]
                                   [--device cpu] [--rounds 10]

Forward passes on random q, k, v. Every operator of the table `OPERATORS` brings its forms by name:
the one of this library, SDPA on the same q, k, v, and whatever else it has to be held against.
Memory is the peak of one call beyond q, k, v and the output, with the masks and tables that a form
needs to have ready (MiB). A form leaves the table where its next call would take too long or too
much. Behind the measurements stands how time and memory grow, as the exponent of the number of
tokens over the larger half of the sizes: 1 is linear, 2 is that of all pairs. An operator that
says it is linear and is not, or that is slower than it says, makes the command fail. Sizes that
take long get fewer rounds, quick ones ten times as many. Writes docs/results/attention.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from attention_operators import OPERATORS, Form, Shape

from transom.measure.cost import MIB, interleaved, peak_memory_mib
from transom.measure.environment import describe

OUT = Path(__file__).parents[1] / "docs" / "results" / "attention.csv"
SIDES = (14, 28, 56, 112, 128)
SLOPE = 1.25  # above this an operator that calls itself linear is not
TIME_MS, MEMORY_MIB = 2_500, 1_500  # a single call may take so long and so much
ROUND_MS = 5_000  # all calls of a size together, beyond the least number of rounds
LEAST_ROUNDS, QUICK_MS = 3, 20


@dataclass(frozen=True)
class Row:
    """One measurement."""

    operator: str
    form: str
    tokens: int
    ms: float
    mib: float


def measure(name: str, sides: list[int], rounds: int, shape: Shape) -> list[Row]:
    """Every form of one operator over the sizes."""
    rows: list[Row] = []
    skip: set[str] = set()
    for side in sorted(sides):
        here = Shape(side, shape.batch, shape.heads, shape.width, shape.dtype, shape.device)
        for form in {row.form for row in rows} - skip:
            if _too_much([row for row in rows if row.form == form], here.tokens):
                skip.add(form)
                print(f"{name} {form}: left out from {here.tokens} tokens on")
        if rows and rows[0].form in skip:
            break  # there is nothing to hold the others against
        found = OPERATORS[name].forms(here, skip)
        forms = {form: one for form, one in found.items() if form not in skip}
        made = _agree(name, forms)
        times = interleaved(
            {form: one.run for form, one in forms.items()},
            rounds=_rounds(rows, here.tokens, rounds),
            warmup=0,  # every form has run once
            device=here.device,
        )
        for form, one in forms.items():
            mib = _extra(one, made[form], here.device)
            rows.append(Row(name, form, here.tokens, times[form].median_ms, mib))
            print(f"{name} N {here.tokens:6} {form:14} {rows[-1].ms:10.3f} ms {mib:10.2f} MiB")
    return rows


def _rounds(rows: list[Row], tokens: int, most: int) -> int:
    """More where all forms together are quick, fewer where they take long.

    Before the first size is measured it counts as quick.
    """
    before = max((row.tokens for row in rows), default=tokens)
    last = sum(row.ms for row in rows if row.tokens == before)
    # what is quick has to be repeated, should differences of a tenth be seen
    if last * (tokens / before) ** 2 < QUICK_MS:
        return 10 * most
    expected = last * (tokens / before) ** 2  # should they grow with all pairs
    return max(LEAST_ROUNDS, min(most, int(ROUND_MS / expected)))


def _too_much(rows: list[Row], tokens: int) -> bool:
    """Whether the next call would take too long or too much, should it grow with all pairs."""
    last = rows[-1]
    growth = (tokens / last.tokens) ** 2
    return last.ms * growth > TIME_MS or last.mib * growth > MEMORY_MIB


def _agree(name: str, forms: dict[str, Form]) -> dict[str, int]:
    """Run every form once and say how many bytes its output takes.

    Speeds of forms that do not compute the same are not worth comparing.
    """
    sizes, first = {}, None
    for form, one in forms.items():
        with torch.inference_mode():
            out = one.run()
        sizes[form] = out.numel() * out.element_size()
        if not one.exact:
            continue
        first = out if first is None else first
        torch.testing.assert_close(out, first, rtol=2e-2, atol=2e-2, msg=lambda m: f"{name}: {m}")
        if first.dtype == torch.float32 and first.device.type == "cpu":
            torch.testing.assert_close(out, first, rtol=1e-4, atol=1e-5, msg=f"{name} {form}")
    return sizes


def _extra(form: Form, made: int, device: torch.device) -> float:
    """Peak memory beyond the output of `made` bytes, with what is held, in MiB."""
    held = sum(t.numel() * t.element_size() for t in form.held)
    return peak_memory_mib(form.run, device) + (held - made) / MIB


def slope(rows: list[Row], value: Callable[[Row], float]) -> float | None:
    """Exponent of the number of tokens over the larger half of the sizes; None for one size."""
    largest = sorted(rows, key=lambda row: row.tokens)[-max(2, -(-len(rows) // 2)) :]
    if len(largest) < 2:
        return None
    x = [math.log(row.tokens) for row in largest]
    y = [math.log(max(value(row), 1e-6)) for row in largest]
    mean_x, mean_y = sum(x) / len(x), sum(y) / len(y)
    rise = sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True))
    return rise / sum((a - mean_x) ** 2 for a in x)


def growth(rows: list[Row]) -> tuple[list[list[str]], list[str]]:
    """Exponents of every form, and what grows faster than it says."""
    table, broken = [], []
    for name in dict.fromkeys(row.operator for row in rows):
        own = [row for row in rows if row.operator == name]
        for i, form in enumerate(dict.fromkeys(row.form for row in own)):
            line = [row for row in own if row.form == form]
            exponents = [slope(line, lambda row: row.ms), slope(line, lambda row: row.mib)]
            shown = ["" if e is None else f"{e:.2f}" for e in exponents]
            table.append([name, form, *shown])
            print(f"{name} {form:14} time ~ N^{shown[0] or '?'}  memory ~ N^{shown[1] or '?'}")
            if i == 0 and OPERATORS[name].linear:
                broken += [
                    f"{name}: {what} grows with N^{e:.2f}"
                    for what, e in zip(("time", "memory"), exponents, strict=True)
                    if e is not None and e > SLOPE
                ]
    return table, broken


def slower(rows: list[Row]) -> list[str]:
    """Where a first form takes longer than it says it ever does."""
    found = []
    for row in rows:
        bound = OPERATORS[row.operator].bound
        if bound is None or row.form != bound[0]:
            continue
        first = next(r for r in rows if (r.operator, r.tokens) == (row.operator, row.tokens))
        if first.ms > bound[1] * row.ms:
            found.append(
                f"{row.operator} takes {first.ms / row.ms:.2f} times the time of {row.form} for "
                f"{row.tokens} tokens, more than {bound[1]}"
            )
    return found


def ratios(rows: list[Row]) -> None:
    """How much faster and smaller the first form is than the others."""
    for row in rows:
        first = next(r for r in rows if (r.operator, r.tokens) == (row.operator, row.tokens))
        if row is not first:
            print(
                f"{row.operator} N {row.tokens:6}: {row.form} takes {row.ms / first.ms:.2f} times "
                f"the time and {row.mib / max(first.mib, 1e-6):.1f} times the memory"
            )


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--operators", nargs="+", choices=sorted(OPERATORS), default=[*OPERATORS])
    parser.add_argument("--sides", nargs="+", type=int, default=[*SIDES])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    dtype, device = getattr(torch, given.dtype), torch.device(given.device)
    shape = Shape(0, given.batch, given.heads, given.width, dtype, device)
    rows = [
        row for name in given.operators for row in measure(name, given.sides, given.rounds, shape)
    ]
    ratios(rows)
    table, broken = growth(rows)
    broken += slower(rows)
    facts = {
        **describe(device),
        "date": datetime.date.today(),
        "shape": f"batch {given.batch}, {given.heads} heads of {given.width}, {given.dtype}",
    }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file:
        for key, value in facts.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.writer(file)
        writer.writerow(["operator", "form", "tokens", "ms", "extra_mib"])
        for row in rows:
            writer.writerow([row.operator, row.form, row.tokens, f"{row.ms:.3f}", f"{row.mib:.3f}"])
        for name, form, time, memory in table:
            writer.writerow([name, form, "exponent", time, memory])
    if broken:
        sys.exit("; ".join(broken))


if __name__ == "__main__":
    main()
