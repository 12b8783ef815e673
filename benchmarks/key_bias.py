"""Three ways to add log(size) to the logits of each key, beside attention without it.

    python benchmarks/key_bias.py [--rounds 50] [--device cpu]

An additive (B, 1, 1, N) mask; the bias folded into extra channels of q and k; flex attention with
a score modification, compiled. Unfused attention shows what all of them avoid. Times are of the
attention alone, at the shapes of ViT-S/14 and ViT-B/16 at 224 pixels. Writes
docs/results/key_bias.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from transom.measure.cost import interleaved
from transom.measure.environment import describe
from transom.ops import attention, reference

SHAPES = {"ViT-S/14": (6, 257), "ViT-B/16": (12, 197)}
OUT = Path(__file__).parents[1] / "docs" / "results" / "key_bias.csv"


def ways(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> dict[str, Callable[[], object]]:
    """Every way by name, ready to be called."""
    from torch.nn.attention.flex_attention import flex_attention

    column = bias[:, 0, 0]  # (B, N)

    def add(score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return score + column[b, n]

    flex = torch.compile(flex_attention)
    return {
        "no bias": lambda: attention.attend(q, k, v),
        "mask": lambda: attention.attend(q, k, v, bias),
        "folded": lambda: attention.attend_folded(q, k, v, bias),
        "flex": lambda: flex(q, k, v, score_mod=add),
        "unfused": lambda: reference.attention(q, k, v, bias, q.shape[-1] ** -0.5),
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=50)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    rows = []
    for name, (heads, count) in SHAPES.items():
        for batch in (1, 8):
            torch.manual_seed(0)
            # as in a host: q, k, v are views of one projection
            qkv = torch.randn(batch, count, 3, heads, 64, device=given.device)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            size = torch.randint(1, 6, (batch, count, 1), device=given.device).float()
            bias = attention.key_bias(size, None, q.dtype)
            assert bias is not None
            runs = ways(q, k, v, bias)
            expected = reference.attention(q, k, v, bias, 0.125)
            failed = {}
            for way in list(runs):
                try:
                    out = runs[way]()
                except Exception as error:
                    failed[way] = type(error).__name__
                    del runs[way]
                    continue
                if way != "no bias":
                    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
            times = interleaved(runs, rounds=given.rounds, warmup=3, device=given.device)
            for way, time in times.items():
                ratio = time.over(times["no bias"])[1]
                rows.append([name, batch, way, f"{time.median_ms:.3f}", f"{ratio:.3f}"])
                print(
                    f"{name} batch {batch} {way:8} {time.median_ms:8.3f} ms  {ratio:.3f} of no bias"
                )
            for way, reason in failed.items():
                rows.append([name, batch, way, "", reason])
                print(f"{name} batch {batch} {way:8} failed: {reason}")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file:
        for key, value in {**describe(given.device), "date": datetime.date.today()}.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.writer(file)
        writer.writerow(["shape", "batch", "way", "ms", "time_over_no_bias"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
