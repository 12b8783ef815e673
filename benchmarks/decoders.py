"""What leaving image tokens out buys inside a decoder: prefill, decoding, cache.

    python benchmarks/decoders.py [--visual 576 2880] [--threads 2] [--rounds 15 5] [--new 16]

A small LLaVA with a decoder in the shape of a Llama (random weights: only time counts here). One
image gives 576 tokens, five give 2,880; 64 words of text stand around them. Every method is timed
in the same rounds as the plain model and its free twin (the same token counts behind each layer by
plain slicing), so a slow phase of the machine hits all alike. Prefill is the reading of the prompt
with the cache being filled, decoding the mean of --new further tokens one by one. The limit is what
the operations alone would allow. Writes docs/results/decoders.csv with the machine in it.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import transom
from transom import registry
from transom.measure import cost
from transom.measure.cost import MIB, Timing
from transom.measure.environment import describe
from transom.measure.subjects import DecoderTwin, fitted, shared_copy
from transom.papers.tokens.dyvte import Router
from transom.registry import Method

SIDE = 24  # an image is a map of 24 x 24 tokens, as in LLaVA-1.5
TEXT = 64
IMAGE = 999
OUT = Path(__file__).parents[1] / "docs" / "results" / "decoders.csv"
COLUMNS = (
    *("visual", "method", "settings", "tokens", "prefill_gflops", "flops_ratio"),
    *("prefill_ms", "prefill_q1", "prefill_q3", "prefill_speedup", "prefill_limit"),
    *("prefill_over_twin", "over_twin_q1", "over_twin_q3"),
    *("token_ms", "token_q1", "token_q3", "token_speedup", "token_limit"),
    *("cache_mib", "cache_ratio", "rounds"),
)
SHOWN = (
    *("visual", "method", "settings", "flops_ratio", "prefill_ms", "prefill_speedup"),
    *("prefill_limit", "prefill_over_twin", "token_ms", "token_speedup", "cache_mib"),
)


def host(width: int, depth: int) -> Any:
    """A LLaVA whose eyes cost next to nothing, so that the decoder is what is timed."""
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=1,
            image_size=SIDE * 4, patch_size=4,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=1000, hidden_size=width, intermediate_size=width * 8 // 3,
            num_hidden_layers=depth, num_attention_heads=width // 64,
            num_key_value_heads=width // 64, max_position_embeddings=4096,
        ),
        image_token_id=IMAGE,
    )  # fmt: skip
    return transformers.LlavaForConditionalGeneration(config).eval()


def prompt(visual: int) -> dict[str, Tensor]:
    """Half of the text, the images, the other half."""
    images, rest = divmod(visual, SIDE * SIDE)
    if rest or not images:
        raise SystemExit(f"--visual {visual}: expected a multiple of {SIDE * SIDE}")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 900, (1, TEXT + visual), generator=generator)
    ids[:, TEXT // 2 : TEXT // 2 + visual] = IMAGE
    pixels = torch.randn(images, 3, SIDE * 4, SIDE * 4, generator=generator)
    return {"input_ids": ids, "pixel_values": pixels}


def methods(depth: int, visual: int) -> list[tuple[str, Method]]:
    """What is measured; every row has a name of its own."""
    grid = (visual // SIDE, SIDE)
    quarter, half = depth // 4 - 1, depth // 2 - 1
    thirds = tuple(depth * (i + 1) // 4 - 1 for i in range(3))

    def dpn(layers: tuple[int, ...], adaptive: bool) -> Method:
        strides = tuple(((2, 2),) for _ in layers)
        given = {"layers": layers, "strides": strides, "adaptive": adaptive, "image_grid": grid}
        return registry.build("dpn", given)

    return [
        ("none", registry.build("random-visual", {"keep_rate": 1.0})),
        ("random", registry.build("random-visual", {"keep_rate": 0.5})),
        ("dpn", dpn((half,), False)),
        ("dpn", dpn((quarter,), False)),
        ("dpn", dpn(thirds, False)),
        ("dpn with routers", dpn(thirds, True)),
        ("dyvte", registry.build("dyvte", {"exit_layer": half})),
        ("dyvte", registry.build("dyvte", {"exit_layer": quarter})),
        ("dyvte with routers", registry.build("dyvte", {})),
    ]


def decide(model: nn.Module, depth: int) -> None:
    """Routers that all run and of which the one behind a quarter of the depth says yes."""
    with torch.no_grad():
        for i, router in enumerate(m for m in model.modules() if isinstance(m, Router)):
            # a sum of many GELUs is above zero
            router.w2.weight.zero_()
            router.w2.weight[1] = float(i == depth // 4 - 1)


def prefilled(model: Any, given: dict[str, Tensor]) -> Any:
    """The output for a prompt as `generate` begins: with a cache, and one row of logits."""
    return model(**given, use_cache=True, logits_to_keep=1)


def reader(model: Any, given: dict[str, Tensor]) -> Callable[[], Any]:
    return lambda: prefilled(model, given)


def writer(model: Any, given: dict[str, Tensor], new: int) -> Callable[[], Any]:
    """A call that appends `new` tokens to a cache, one by one, and takes them off again."""
    with torch.inference_mode():
        cache = prefilled(model, given).past_key_values
    word = torch.tensor([[7]], device=given["input_ids"].device)

    def run() -> None:
        for _ in range(new):
            model(input_ids=word, past_key_values=cache, use_cache=True)
        cache.crop(-new)

    return run


def held(cache: Any) -> float:
    """MiB of keys and values of all layers."""
    return sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)) / MIB


def measure(
    visual: int, rounds: int, new: int, width: int, depth: int, device: str
) -> list[dict[str, Any]]:
    """All rows at one number of image tokens."""
    base = host(width, depth).to(device)
    given = {k: v.to(device) for k, v in prompt(visual).items()}
    subjects: dict[str, Any] = {"plain": shared_copy(base)}
    twins: dict[str, Any] = {}
    rows: dict[str, dict[str, Any]] = {"plain": {"visual": visual, "method": "plain"}}
    rows["plain"]["tokens"] = visual + TEXT
    for name, method in methods(depth, visual):
        settings = {k: v for k, v in method.settings().items() if v != type(method)().settings()[k]}
        settings.pop("image_grid", None)
        label = f"{name} {settings}"
        model = subjects[label] = fitted(base, method, "", None)
        decide(model, depth)
        with torch.inference_mode(), transom.trace(model) as trace:
            prefilled(model, given)
        if len(set(trace.lengths)) > 1:
            twins[label] = fitted(base, DecoderTwin(tuple(trace.lengths)), "", None)
        text = ", ".join(f"{k}={v}" for k, v in settings.items())
        rows[label] = {
            "visual": visual, "method": name, "settings": text, "tokens": trace.lengths[-1]
        }  # fmt: skip
    reads = {label: reader(model, given) for label, model in subjects.items()}
    free = {f"twin of {label}": reader(model, given) for label, model in twins.items()}
    writes = {label: writer(model, given, new) for label, model in subjects.items()}
    flops = {label: (cost.gflops(reads[label]), cost.gflops(writes[label])) for label in subjects}
    prefill = cost.interleaved({**reads, **free}, rounds=rounds, warmup=1, device=device)
    decoding = cost.interleaved(writes, rounds=rounds, warmup=1, device=device)
    with torch.inference_mode():
        caches = {label: held(prefilled(m, given).past_key_values) for label, m in subjects.items()}
    for label, row in rows.items():
        twin = prefill.get(f"twin of {label}")
        read, token = flops[label]
        row.update(
            prefill_gflops=f"{read:.3f}",
            flops_ratio=f"{read / flops['plain'][0]:.4f}",
            prefill_limit=f"{flops['plain'][0] / read:.3f}",
            token_limit=f"{flops['plain'][1] / token:.3f}",
            cache_mib=f"{caches[label]:.2f}",
            cache_ratio=f"{caches[label] / caches['plain']:.4f}",
            rounds=rounds,
            **spread("prefill", prefill[label], prefill["plain"], 1),
            **spread("token", decoding[label], decoding["plain"], new),
        )
        if twin is not None:
            low, median, high = prefill[label].over(twin)
            row["prefill_over_twin"] = f"{median:.3f}"
            row["over_twin_q1"], row["over_twin_q3"] = f"{low:.3f}", f"{high:.3f}"
    return list(rows.values())


def spread(what: str, time: Timing, plain: Timing, calls: int) -> dict[str, str]:
    """Median and quartiles of one call, and the speed-up paired round by round."""
    return {
        f"{what}_ms": f"{time.median_ms / calls:.3f}",
        f"{what}_q1": f"{time.low_ms / calls:.3f}",
        f"{what}_q3": f"{time.high_ms / calls:.3f}",
        f"{what}_speedup": f"{plain.over(time)[1]:.3f}",
    }


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--visual", type=int, nargs="+", default=[576, 2880])
    parser.add_argument("--rounds", type=int, nargs="+", default=[15, 5], help="for each --visual")
    parser.add_argument("--new", type=int, default=16, help="tokens of a decoding run")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    print(*SHOWN, sep="\t")
    for i, visual in enumerate(given.visual):
        rounds = given.rounds[min(i, len(given.rounds) - 1)]
        for row in measure(visual, rounds, given.new, given.width, given.depth, given.device):
            rows.append(row)
            print(*(row.get(name, "") for name in SHOWN), sep="\t", flush=True)
    machine = {k: str(v) for k, v in describe(given.device).items()}
    machine["date"] = datetime.date.today().isoformat()
    machine["decoder"] = f"{given.depth} layers, width {given.width}, {TEXT} words"
    machine["command"] = " ".join(["python", "benchmarks/decoders.py", *sys.argv[1:]])
    given.out.parent.mkdir(parents=True, exist_ok=True)
    with given.out.open("w", newline="") as file:
        for key, value in machine.items():
            file.write(f"# {key}: {value}\n")
        writer_ = csv.DictWriter(file, COLUMNS, restval="", lineterminator="\n")
        writer_.writeheader()
        writer_.writerows(rows)


if __name__ == "__main__":
    main()
