"""What token reduction costs beside the work it saves.

    python benchmarks/token_reduction.py [--rounds 30] [--threads 2] [--device cpu]

ViT-S/14 and ViT-B/16 at 224 pixels (random weights: only time counts here), batch 1 and 8. Every
row is timed in the same rounds as the plain fused host and its free twin (the same token counts by
plain slicing, fused attention), so a slow phase of the machine hits all three alike. The row
`naive-tome` is ToMe in its plainest form: attention as a matrix, merging as a dense 0/1 product.
Writes docs/results/token_reduction.csv with the machine in it, and prints the table.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

import transom
from transom.hosts.base import Host
from transom.measure.data import load_images
from transom.measure.environment import describe
from transom.measure.preprocessing import preprocessing_of
from transom.ops import matching, reference
from transom.papers.tokens.tome import ToMe
from transom.registry import Method
from transom.slots import Ask, Fill
from transom.tokens import Tokens

HOSTS = {
    "ViT-S/14": ("vit_small_patch14_dinov2", {"img_size": 224, "num_classes": 1000}),
    "ViT-B/16": ("vit_base_patch16_224", {}),
}
METHODS = [
    ("none", {}),
    ("evit", {"keep_rate": 0.7}),
    ("evit", {"keep_rate": 0.7, "fuse_token": True}),
    ("tome", {"r": 8}),
    ("tome", {"r": 16}),
    ("pitome", {"ratio": 0.95}),
    ("pitome", {"ratio": 0.9}),
    ("crossget", {"r": 8}),
    ("crossget", {"r": 16}),
    ("dependency-vit", {"prune_ratio": 0.16}),
]
OUT = Path(__file__).parents[1] / "docs" / "results" / "token_reduction.csv"


@dataclass(frozen=True)
class NaiveMerge:
    """ToMe's step with a dense membership matrix."""

    r: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        found = matching.bipartite(attended.key, self.r, tokens.prefix)
        fast = tokens.merge(found)
        return Tokens(reference.merge(tokens.x, found, tokens.size), fast.record)


@dataclass(frozen=True)
class NaiveToMe(Method):
    """ToMe without fused attention and without row copies."""

    r: int = 8
    slug = "naive-tome"

    def fit(self, host: Host) -> list[Fill]:
        return [
            Fill(tokens=NaiveMerge(r), attention=reference.attention, size_bias=True)
            for r in ToMe(r=self.r).per_block(host.depth)
        ]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--hosts", nargs="+", default=list(HOSTS), choices=list(HOSTS))
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)

    rows = []
    for name in given.hosts:
        for batch in given.batches:
            result = measure(name, batch, given.rounds, given.device)
            print(f"\n{name}, batch {batch}")
            print(result)
            for record in result.records():
                rows.append({"host": name, **record})
    machine = {k: str(v) for k, v in describe(given.device).items()}
    machine["date"] = datetime.date.today().isoformat()
    machine["command"] = " ".join(["python", "benchmarks/token_reduction.py", *sys.argv[1:]])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    names = list(dict.fromkeys(name for row in rows for name in row))
    with given.out.open("w", newline="") as file:
        for key, value in machine.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def measure(name: str, batch: int, rounds: int, device: str) -> transom.measure.Comparison:
    """All methods on one host at one batch size."""
    architecture, settings = HOSTS[name]
    torch.manual_seed(0)
    model = timm.create_model(architecture, **settings).eval()
    pixels = torch.randint(0, 256, (batch, 3, 224, 224), dtype=torch.uint8)
    images = load_images(pixels, preprocessing_of(model))
    return transom.compare(
        model,
        images,
        [*METHODS, NaiveToMe(r=8)],
        labels=False,
        device=device,
        batch_size=batch,
        rounds=rounds,
        control=False,
        progress=lambda row, done, total: print(
            f"  {done}/{total} {row.method} {row.label}", file=sys.stderr
        ),
    )


if __name__ == "__main__":
    main()
