"""Attention operators beside plain attention of the same shape, over the number of tokens.

    python benchmarks/attention.py [--operators fna ...] [--sides 14 28 56 112 128]
                                   [--device cpu] [--rounds 10]

Forward passes on random q, k, v. Every operator of the table `OPERATORS` brings its forms by name:
the one of this library, SDPA on the same q, k, v, and whatever else it has to be held against.
Memory is the peak of one call beyond q, k, v and the output, with the masks and tables that a form
needs to have ready (MiB). A form leaves the table where its next call would take too long or too
much. Behind the measurements stands how time and memory grow, as the exponent of the number of
tokens over the larger half of the sizes: 1 is linear, 2 is that of all pairs. An operator that
says it is linear and is not, or that is slower than it says, makes the command fail. Writes
docs/results/attention.csv.
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
from torch import Tensor

from transom.measure.cost import MIB, interleaved, peak_memory_mib
from transom.measure.environment import describe
from transom.ops import attention, neighborhood
from transom.papers.attention.moh import routing, skipping

OUT = Path(__file__).parents[1] / "docs" / "results" / "attention.csv"
SIDES = (14, 28, 56, 112, 128)
SLOPE = 1.25  # above this an operator that calls itself linear is not
TIME_MS, MEMORY_MIB = 6_000, 6_000  # a single call may take so long and so much


@dataclass(frozen=True)
class Shape:
    """What an operator is measured on: a square grid of tokens.

    Attributes:
        side: of the grid; there are side² tokens.
        batch, heads, width: B, H and d of q, k and v.
    """

    side: int
    batch: int
    heads: int
    width: int
    dtype: torch.dtype
    device: torch.device

    @property
    def tokens(self) -> int:
        return self.side**2

    def random(self) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, side, side, H, d), views of one projection as in a host."""
        torch.manual_seed(0)
        size = (self.batch, self.side, self.side, 3, self.heads, self.width)
        q, k, v = torch.randn(size, device=self.device, dtype=self.dtype).unbind(3)
        return q, k, v


@dataclass(frozen=True)
class Form:
    """One way to compute.

    Attributes:
        run: the call; returns the output first.
        held: tensors that are ready before the call and count as its memory.
        exact: whether it gives what the form of this library gives.
    """

    run: Callable[[], Tensor]
    held: tuple[Tensor, ...] = ()
    exact: bool = True


@dataclass(frozen=True)
class Operator:
    """One entry of the table.

    Attributes:
        forms: from a shape to the forms by name; the first is this library's. They may be left
            out where `skip` says that they would not be measured.
        linear: whether time and memory of the first form have to grow linearly.
        bound: a form and a factor; the first form may take that many times its time at most.
    """

    forms: Callable[[Shape, set[str]], dict[str, Form]]
    linear: bool = True
    bound: tuple[str, float] | None = None


def fna(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """2-D neighborhood attention, 7 x 7 keys a query."""
    q, k, v = shape.random()
    flat = [t.flatten(1, 2).transpose(1, 2) for t in (q, k, v)]
    axes = neighborhood.axes((shape.side, shape.side), 7)
    choice = neighborhood.explain(q, k, v, 7)
    ready = {}
    if choice.tile is not None:
        ready = neighborhood.tiled.masks(axes, choice.tile, 0, shape.dtype, shape.device)
    held = tuple(mask for mask in ready.values() if mask is not None)
    forms = {
        "neighborhood": Form(lambda: neighborhood.attend(q, k, v, 7), held),
        "sdpa": Form(lambda: attention.attend(*flat), exact=False),
    }
    if "masked sdpa" not in skip:
        hidden = ~neighborhood.dense_mask(axes, shape.device)
        mask = torch.zeros(hidden.shape, dtype=shape.dtype, device=shape.device)
        mask.masked_fill_(hidden, float("-inf"))
        forms["masked sdpa"] = Form(lambda: _grid(attention.attend(*flat, mask), q), (mask,))
    table = _neighbours(axes, shape.device)
    forms["gather"] = Form(lambda: _gathered(q, k, v, table), (table,))
    if choice.path == "tiled" and "flex" not in choice.refused:
        forms["flex"] = Form(lambda: neighborhood.attend(q, k, v, 7, path="flex"))
    elif shape.device.type != "cpu":
        forms["tiled"] = Form(lambda: neighborhood.attend(q, k, v, 7, path="tiled"))
    return forms


def _grid(out: Tensor, like: Tensor) -> Tensor:
    return out.transpose(1, 2).reshape(like.shape)


def _neighbours(axes: tuple[neighborhood.Axis, ...], device: torch.device) -> Tensor:
    """(N, K) positions of the keys of each query."""
    rows, columns = (
        torch.tensor([range(*axis.window(i, axis.length)) for i in range(axis.length)])
        for axis in axes
    )
    places = rows[:, None, :, None] * axes[1].length + columns[None, :, None, :]
    return places.flatten(2).flatten(0, 1).to(device)


def _gathered(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The naive form: a copy of its keys and values for every query."""
    query, key, value = (t.flatten(1, 2).transpose(1, 2) for t in (q, k, v))
    near_k, near_v = key[:, :, table], value[:, :, table]  # (B, H, N, K, d)
    logits = (near_k @ query[..., None])[..., 0] * q.shape[-1] ** -0.5
    return _grid((logits.softmax(-1)[..., None, :] @ near_v)[..., 0, :], q)


def moh(shape: Shape, skip: set[str]) -> dict[str, Form]:
    """Half of the heads for each token, evenly spread: a quarter shared, a quarter routed."""
    q, k, v = (t.flatten(1, 2).transpose(1, 2) for t in shape.random())
    shared = chosen = max(shape.heads // 4, 1)
    score = torch.randn(shape.batch, shape.tokens, shape.heads - shared, device=shape.device)
    probability = score.softmax(-1).to(shape.dtype)
    mask = routing.top(probability, chosen)
    gate = torch.cat([torch.ones_like(probability[..., :shared]), probability * mask], -1)
    gates = routing.Gates(gate, probability, mask)

    scale = shape.width**-0.5

    def form(path: skipping.Path) -> Form:
        return Form(lambda: skipping.attend(q, k, v, gates, None, scale, path=path))

    return {
        "moh": form("auto"),
        "moh dense": form("dense"),
        "moh skip": form("skip"),
        "sdpa": Form(lambda: attention.attend(q, k, v), exact=False),
    }


OPERATORS: dict[str, Operator] = {
    "fna": Operator(fna),
    "moh": Operator(moh, linear=False, bound=("moh dense", 1.1)),
}


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
        found = OPERATORS[name].forms(here, skip)
        forms = {form: one for form, one in found.items() if form not in skip}
        _agree(name, forms)
        times = interleaved(
            {form: one.run for form, one in forms.items()},
            rounds=rounds,
            warmup=1,
            device=here.device,
        )
        for form, one in forms.items():
            mib = _extra(one, here.device)
            rows.append(Row(name, form, here.tokens, times[form].median_ms, mib))
            print(f"{name} N {here.tokens:6} {form:14} {rows[-1].ms:10.3f} ms {mib:10.2f} MiB")
    return rows


def _too_much(rows: list[Row], tokens: int) -> bool:
    """Whether the next call would take too long or too much, should it grow with all pairs."""
    last = rows[-1]
    growth = (tokens / last.tokens) ** 2
    return last.ms * growth > TIME_MS or last.mib * growth > MEMORY_MIB


def _agree(name: str, forms: dict[str, Form]) -> None:
    """Speeds of forms that do not compute the same are not worth comparing."""
    with torch.inference_mode():
        exact = {form: one.run() for form, one in forms.items() if one.exact}
    first = next(iter(exact.values()))
    for form, out in exact.items():
        torch.testing.assert_close(out, first, rtol=2e-2, atol=2e-2, msg=lambda m: f"{name}: {m}")
        if first.dtype == torch.float32 and first.device.type == "cpu":
            torch.testing.assert_close(out, first, rtol=1e-4, atol=1e-5, msg=f"{name} {form}")


def _extra(form: Form, device: torch.device) -> float:
    """Peak memory beyond the output, with what is held, in MiB."""
    with torch.inference_mode():
        out = form.run()
    made = out.numel() * out.element_size()
    held = sum(t.numel() * t.element_size() for t in form.held)
    del out
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
