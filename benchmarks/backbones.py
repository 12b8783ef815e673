"""Images a second and peak memory of the backbones, beside models everybody knows.

    python benchmarks/backbones.py [--per-room 2] [--names …] [--batch 4] [--rounds 7]

The lightest backbones of every room (random weights: only time counts here) and timm's deit_small,
swin_tiny, convnext_tiny and resnet50 run in the same interleaved rounds. Two published claims are
held against it as ratios: SHViT-S4, folded, over MobileViTv2 x1.0 at 256 pixels (published: 8.1
times as fast on a CPU), and Swin-T with PRepBN, folded, over Swin-T (published: about 51 against
43 ms as the backbone of a detector on a GPU, which is 1.19). Writes docs/results/backbones.csv with
the machine in it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import transom
from transom import registry
from transom.measure.cost import interleaved, peak_memory_mib
from transom.measure.environment import describe

KNOWN = ("deit_small_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50")
OUT = Path(__file__).parents[1] / "docs" / "results" / "backbones.csv"


def lightest(count: int) -> list[tuple[str, str, int]]:
    """Room, name and image size of the lightest backbones of each room."""
    found = []
    for slug, several in registry.backbones().items():
        sized = sorted(several, key=lambda b: cost(b.name, b.size)[1])
        found += [(slug, b.name, b.size) for b in sized[:count]]
    return found


def cost(name: str, size: int) -> tuple[float, float]:
    """Parameters in millions and GMACs."""
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name).eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()) / 1e6, counter.get_total_flops() / 2e9


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--per-room", type=int, default=1)
    parser.add_argument("--names", nargs="*", default=["swin_t_prepbn", "shvit_s4_official"])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    known = {b.name: (slug, b.size) for slug, s in registry.backbones().items() for b in s}
    chosen = lightest(given.per_room)
    chosen += [
        (known[n][0], n, known[n][1]) for n in given.names if n not in {c[1] for c in chosen}
    ]
    chosen += [("timm", name, 224) for name in KNOWN]
    chosen += [("timm", "mobilevitv2_100", 256)]

    rows: list[dict[str, Any]] = []
    runs: dict[str, Callable[[], object]] = {}
    for slug, name, size in chosen:
        torch.manual_seed(0)
        model = timm.create_model(name).eval().to(given.device)
        x = torch.randn(given.batch, 3, size, size, device=given.device)
        forms = {name: model}
        if slug in ("slab", "shvit"):
            forms[f"{name} folded"] = transom.fold(model, x[:1])
        for label, form in forms.items():
            params, gmacs = cost(name, size)
            runs[label] = lambda form=form, x=x: form(x)
            rows.append(
                {"room": slug, "model": label, "image": size, "params_m": round(params, 2),
                 "gmacs": round(gmacs, 3)}
            )  # fmt: skip
        print(f"built {name}", file=sys.stderr)
    timings = interleaved(runs, rounds=given.rounds, warmup=1, device=given.device)
    for row in rows:
        timing = timings[row["model"]]
        row["images_per_s"] = round(given.batch / timing.median_ms * 1e3, 2)
        row["images_per_s_q1"] = round(given.batch / timing.high_ms * 1e3, 2)
        row["images_per_s_q3"] = round(given.batch / timing.low_ms * 1e3, 2)
        row["peak_mib"] = round(peak_memory_mib(runs[row["model"]], given.device), 1)
        print("  ".join(f"{k}={v}" for k, v in row.items()))
    speed = {row["model"]: row["images_per_s"] for row in rows}
    claims = {
        "shvit_s4_official folded / mobilevitv2_100 at 256 (published on a CPU: 8.1)": (
            "shvit_s4_official folded", "mobilevitv2_100"),
        "swin_t_prepbn folded / swin_tiny at 224 (published on a GPU: 1.19)": (
            "swin_t_prepbn folded", "swin_tiny_patch4_window7_224"),
    }  # fmt: skip
    machine = {k: str(v) for k, v in describe(given.device).items()}
    machine["date"] = datetime.date.today().isoformat()
    machine["batch"] = str(given.batch)
    machine["command"] = " ".join(["python", "benchmarks/backbones.py", *sys.argv[1:]])
    for text, (a, b) in claims.items():
        if a in speed and b in speed:
            machine[text] = f"{speed[a] / speed[b]:.2f}"
            print(text, machine[text])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file:
        for key, value in machine.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
