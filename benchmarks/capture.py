"""What looking into a model costs, and that not looking costs nothing.

    python benchmarks/capture.py [--rounds 60] [--threads 2] [--device cpu]

ViT-S/16 and ViT-B/16 at 224 pixels (random weights: only time counts here), batch 1 and 8. All
ways are timed in the same rounds, each on a copy of the host that shares its weights:

- plain: the host; plain again is a second copy of it, which shows how far two equal things differ
  here.
- after: the host once capture has been open and is closed.
- nothing asked: inside `transom.capture(model)`.
- other layers: what the rest of the blocks pays when one residual of the last block is kept.
- one map ... everything: what keeping these costs.
- one head ablated: an intervention at one head output.

The command fails if "after" or "nothing asked" takes more than 1 % longer than the plain host
(median of the rounds) and more than the spread of two equal hosts. Writes
docs/results/capture.csv.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import csv
import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import transom
from transom.lens.capture import ablate
from transom.measure.cost import Timing, interleaved
from transom.measure.environment import describe
from transom.watching import NAMES

HOSTS = {"ViT-S/16": "vit_small_patch16_224", "ViT-B/16": "vit_base_patch16_224"}
OUT = Path(__file__).parents[1] / "docs" / "results" / "capture.csv"
ALLOWED = 1.01  # time of a call in which nothing is asked, in that of the plain host
FREE = ("after", "nothing asked")

WATCHED: dict[str, Callable[[nn.Module], contextlib.AbstractContextManager[Any]]] = {
    "nothing asked": transom.capture,
    "other layers": lambda m: transom.capture(m, "blocks.-1.residual.post"),
    "one map": lambda m: transom.capture(m, "blocks.6.attention.probabilities"),
    "all maps": lambda m: transom.capture(m, "blocks.*.attention.probabilities"),
    "all residuals": lambda m: transom.capture(m, "blocks.*.residual.post"),
    "everything": lambda m: transom.capture(m, *(f"blocks.*.{name}" for name in NAMES)),
    "one head ablated": lambda m: transom.intervene(
        m, {"blocks.6.attention.head_output": ablate(heads=[0])}
    ),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    rows: list[dict[str, object]] = []
    slow = []
    for name in given.hosts:
        for batch in given.batches:
            times = measure(HOSTS[name], batch, given.rounds, given.device)
            _, _, noise = times["plain again"].over(times["plain"])
            print(f"\n{name}, batch {batch}")
            for way, time in times.items():
                low, ratio, high = time.over(times["plain"])
                print(f"  {way:18} {time.median_ms:9.3f} ms  {ratio:.4f} ({low:.4f} to {high:.4f})")
                rows.append(
                    {
                        "host": name,
                        "batch": batch,
                        "watched": way,
                        "ms": f"{time.median_ms:.4f}",
                        "over_plain": f"{ratio:.4f}",
                        "over_plain_low": f"{low:.4f}",
                        "over_plain_high": f"{high:.4f}",
                    }
                )
                if way in FREE and ratio > max(ALLOWED, noise):
                    slow.append(f"{name}, batch {batch}: {way} takes {ratio:.4f} of the plain host")
    machine = {k: str(v) for k, v in describe(given.device).items()}
    machine["date"] = datetime.date.today().isoformat()
    machine["command"] = " ".join(["python", "benchmarks/capture.py", *sys.argv[1:]])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file:
        for key, value in machine.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    if slow:
        sys.exit("\n".join(slow))


def measure(architecture: str, batch: int, rounds: int, device: str) -> dict[str, Timing]:
    """All ways on one host at one batch size."""
    torch.manual_seed(0)
    plain = timm.create_model(architecture).eval().to(device)
    images = torch.randn(batch, 3, 224, 224, device=device)
    hosts = {way: twin(plain) for way in ("plain again", "after", *WATCHED)}
    with transom.capture(hosts["after"], "blocks.*.residual.post"):
        hosts["after"](images)
    with contextlib.ExitStack() as stack:
        for way, watched in WATCHED.items():
            stack.enter_context(watched(hosts[way]))
        return interleaved(
            {"plain": run(plain, images), **{way: run(m, images) for way, m in hosts.items()}},
            rounds=rounds,
            warmup=3,
            device=device,
        )


def twin(model: nn.Module) -> nn.Module:
    """A copy with the very same parameters."""
    shared = {id(p): p for p in model.parameters()}
    return copy.deepcopy(model, shared)


def run(model: nn.Module, images: Tensor) -> Callable[[], object]:
    """One call of the model."""
    return lambda: model(images)


if __name__ == "__main__":
    main()
