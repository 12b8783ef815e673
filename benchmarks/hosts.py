"""Run the zoo of hosts and write the table that `transom hosts` prints.

    python benchmarks/hosts.py

Every family of tests/zoo is built small with random weights, biases and norms, and each slot is
tried on it: the neutral fitting must change nothing (1e-6), ToMe must change the output and its
removal must bring it back bit for bit; a plain attention in the attention slot, and copies of the
host's norms and ffns in those slots, must give the host's own output (1e-4). Writes
src/transom/data/hosts.json and docs/results/hosts.csv.
"""

from __future__ import annotations

import copy
import csv
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).parents[1]
sys.path.insert(0, str(HERE))

import transom  # noqa: E402
from tests.common.hosts import tensors  # noqa: E402
from tests.zoo import hf_zoo, timm_zoo  # noqa: E402
from transom.errors import FitError, TransomError  # noqa: E402
from transom.hosts.base import Host  # noqa: E402
from transom.measure.environment import describe  # noqa: E402
from transom.ops import reference  # noqa: E402
from transom.registry import Method  # noqa: E402
from transom.slots import Fill  # noqa: E402

Run = Callable[[nn.Module], list[Tensor]]
SLOTS = ("tokens", "attention", "norm", "ffn")


@dataclass(frozen=True)
class WrittenOut(Method):
    """Attention as a matrix, in the attention slot."""

    slug = "written-out"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(attention=reference.attention)] * host.depth


class Through(nn.Module):
    """A copy of a part of the host, in that part's slot."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = copy.deepcopy(part)

    def forward(self, x: Tensor, record: object = None) -> Tensor:
        out = self.part(x)
        return out if isinstance(out, Tensor) else out[0]


@dataclass(frozen=True)
class Copied(Method):
    """The host's own norms or ffns, copied."""

    slot: str = "norm"
    slug = "copied"

    def fit(self, host: Host) -> list[Fill]:
        names = ("norm1", "norm2") if self.slot == "norm" else ("ffn",)
        fills = []
        for i, view in enumerate(host.views):
            found = [view.part(name) for name in names]
            if None in found:
                raise FitError(f"block {i} of this {host.family} has no single {self.slot} module")
            own = [Through(part) for part in found]
            fills.append(Fill(norms=tuple(own)) if self.slot == "norm" else Fill(ffn=own[0]))
        return fills


def families() -> list[tuple[str, str, Callable[[], nn.Module], Run]]:
    """Library, family, what builds it and what runs it."""
    side = timm_zoo.SIDE

    def see(model: nn.Module) -> list[Tensor]:
        x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        return tensors(getattr(model, "encode_image", model)(x))

    found: list[tuple[str, str, Callable[[], nn.Module], Run]] = []
    builders = {**timm_zoo.FITS, **{name: made[0] for name, made in timm_zoo.REFUSED.items()}}
    for name, build in builders.items():
        library = "transom" if name in timm_zoo.OURS else "timm"
        found.append((library, name, lambda build=build: timm_zoo.own(build), see))
    for name, family in hf_zoo.FAMILIES.items():

        def give(model: nn.Module, family: Any = family) -> list[Tensor]:
            return tensors(model(**family.inputs(2, 0)))

        found.append(("transformers", name, family.build, give))
    return found


def far(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference; infinite for outputs of different shapes."""
    if [t.shape for t in a] != [t.shape for t in b]:
        return float("inf")
    return max(float((x.float() - y.float()).abs().max()) for x, y in zip(a, b, strict=True))


def tokens_slot(model: nn.Module, run: Run) -> str:
    """Say that it fits, or why not."""
    try:
        transom.apply(model, "none")
        transom.remove(model)
        expected = run(model)
        transom.apply(model, "none")
        neutral = far(run(model), expected)
        transom.remove(model)
        transom.apply(model, "tome", r=2)
    except TransomError as error:
        return str(error)
    changed = far(run(model), expected)
    transom.remove(model)
    back = far(run(model), expected)
    if neutral > 1e-6 or changed == 0 or back != 0:
        return f"WRONG: neutral {neutral:.1e}, real {changed:.1e}, removed {back:.1e}"
    return "fits"


def same_slot(model: nn.Module, run: Run, method: Method) -> str:
    """Say that it fits, or why not: the method computes what the host does."""
    try:
        transom.apply(model, method)
        transom.remove(model)
    except TransomError as error:
        return str(error)
    expected = run(model)
    transom.apply(model, method)
    difference = far(run(model), expected)
    transom.remove(model)
    return "fits" if difference < 1e-4 else f"WRONG: differs by {difference:.1e}"


def main() -> None:
    """Run the zoo."""
    rows: list[dict[str, str]] = []
    for library, name, build, run in families():
        try:
            model = build().eval()
        except BaseException as error:  # a family of a library that is not installed skips itself
            if isinstance(error, KeyboardInterrupt):
                raise
            print(f"{library} {name}: not built ({error})", file=sys.stderr)
            continue
        with torch.no_grad():
            row = {"library": library, "family": name, "model": type(model).__name__}
            row["tokens"] = tokens_slot(model, run)
            row["attention"] = same_slot(model, run, WrittenOut())
            row["norm"] = same_slot(model, run, Copied("norm"))
            row["ffn"] = same_slot(model, run, Copied("ffn"))
        rows.append(row)
        print(f"{library:12} {name:32}", " ".join(f"{row[slot][:24]:24}" for slot in SLOTS))
    versions = {k: v for k, v in describe("cpu").items() if k in ("torch", "timm", "transformers")}
    content = {"versions": versions, "families": rows}
    data = HERE / "src" / "transom" / "data" / "hosts.json"
    data.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    with (HERE / "docs" / "results" / "hosts.csv").open("w", newline="") as file:
        for key, value in versions.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    wrong = [row for row in rows if any("WRONG" in row[slot] for slot in SLOTS)]
    sys.exit(f"{len(wrong)} families are wrong" if wrong else 0)


if __name__ == "__main__":
    main()
