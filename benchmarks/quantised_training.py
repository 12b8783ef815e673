"""What INT8 and less cost a small ViT trained plainly, with clipped softmax, and with gates.

    python benchmarks/quantised_training.py [--seeds 0 1 2] [--steps 500]

The task asks heads to do nothing at most tokens: those that are marked have to give twice their
mean, every other one zero. Shown are the largest infinity norm of what the attentions give, the
largest of all activations, the mean kurtosis, the error (over the variance of the target) in
floating point, and by how much it rises with weights of 8 bits and activations of 8, 6, 5 and 4
(simulated, one static range for each tensor, from 128 calibration images, as in the paper) and in
torch's own INT8, whose ranges are those of each call. Writes docs/results/quantised_training.csv
row by row and says which form loses less than plain attention in every seed.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import transom
from transom.measure.environment import describe
from transom.papers.compression.quantizable import int8, outliers, quantised

OUT = Path(__file__).parents[1] / "docs" / "results" / "quantised_training.csv"
KINDS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "clipped": {"gamma": -0.03},
    "gated": {"gamma": 0.0, "gate": "conditional_per_token"},
}
BITS = (8, 6, 5, 4)
COLUMNS = ("attention", "largest", "kurtosis", "error", *(f"w8a{bits}" for bits in BITS), "int8")


def task(count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
    """Images (n, 8, 16, 16) of 16 patches, some of them marked, and targets (n, 16, 16)."""
    x = torch.randn(count, 1, 16, 16, generator=rng).repeat(1, 8, 1, 1)
    marked = torch.rand(count, 1, 4, 4, generator=rng) < 0.2
    mark = marked.float().repeat_interleave(4, 2).repeat_interleave(4, 3)
    x[:, :1] = 0.1 * x[:, :1] + 3 * mark
    patches = x[:, 1].unfold(1, 4, 4).unfold(2, 4, 4).flatten(3).flatten(1, 2)  # (n, 16, 16)
    of = marked.flatten(1)[..., None].float()
    mean = (patches * of).sum(1, keepdim=True) / of.sum(1, keepdim=True).clamp(min=1)
    return x, 2 * mean * of


class Tokens(nn.Module):
    """A ViT that gives a vector (B, N, 16) for every patch."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = VisionTransformer(
            img_size=16,
            patch_size=4,
            in_chans=8,
            embed_dim=32,
            depth=2,
            num_heads=4,
            num_classes=0,
            global_pool="",
            class_token=False,
        )
        self.head = nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.vit.forward_features(x))
        return y


def measure(kind: str, seed: int, steps: int) -> dict[str, float]:
    """Train one model and look at it."""
    torch.manual_seed(seed)
    model = Tokens()
    settings = KINDS[kind]
    if settings is not None:
        transom.apply(model.vit, "quantizable", **settings)
    rng = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    for _ in range(steps):
        x, target = task(32, rng)
        optimizer.zero_grad()
        F.mse_loss(model(x), target).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    x, target = task(512, torch.Generator().manual_seed(99))

    @torch.no_grad()
    def error(which: nn.Module) -> float:
        return float(F.mse_loss(which(x), target) / target.var())

    found = outliers(model.vit, [x], ["attention.output", "ffn.output", "residual.post"])
    plain = error(model)
    rises = []
    for bits in BITS:
        with quantised(model, [x[:128]], activation_bits=bits):
            rises.append(error(model) - plain)
    inside = [v for name, v in found.infinity_norm.items() if name.endswith("attention.output")]
    values = (max(inside), found.largest, found.mean_kurtosis, plain, *rises)
    return dict(zip(COLUMNS, (*values, error(int8(model)) - plain), strict=True))


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rows: list[tuple[str, int, dict[str, float]]] = []
    for seed in given.seeds:
        for kind in KINDS:
            rows.append((kind, seed, measure(kind, seed, given.steps)))
            shown = "  ".join(f"{name} {value:.4f}" for name, value in rows[-1][2].items())
            print(f"{kind:8} seed {seed}  {shown}", flush=True)
            write(given.out, rows, given.steps)
    for column in COLUMNS[4:]:
        for kind in KINDS:
            own = [found[column] for k, _, found in rows if k == kind]
            plain = [found[column] for k, _, found in rows if k == "plain"]
            better = sum(a < b for a, b in zip(own, plain, strict=True))
            mean = sum(own) / len(own)
            print(f"{column}: {kind} loses {mean:.4f}, less than plain in {better} of {len(own)}")


def write(path: Path, rows: list[tuple[str, int, dict[str, float]]], steps: int) -> None:
    """All rows, below what the machine is."""
    facts = {**describe(torch.device("cpu")), "date": datetime.date.today(), "steps": steps}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        for key, value in facts.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.writer(file)
        writer.writerow(["form", "seed", *COLUMNS])
        for kind, seed, found in rows:
            writer.writerow([kind, seed, *(f"{value:.5f}" for value in found.values())])


if __name__ == "__main__":
    main()
