"""Train the layer and hold what it learned against the theory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom.errors import SettingsError
from transom.papers.lens.icl_linear_regression.model import (
    Circuits,
    InContextAttention,
    Patterns,
    circuits,
    patterns,
    sample,
)
from transom.papers.lens.icl_linear_regression.theory import debiased_gradient_step, ridge

Watch = Callable[[int, int], None]


def train(
    heads: int,
    *,
    d: int = 5,
    length: int = 40,
    noise: float = 0.1,
    steps: int = 2500,
    batch: int = 256,
    lr: float = 1e-2,
    seed: int = 0,
    linear: bool = False,
    watch: Watch | None = None,
) -> InContextAttention:
    """Train a layer on fresh tasks with Adam and squared error; the rate falls to zero.

    Args:
        heads: of the layer.
        d: covariates.
        length: examples of a prompt.
        noise: variance of the noise on a response.
        steps: of Adam.
        batch: tasks of a step.
        lr: learning rate at the start.
        seed: of weights and tasks.
        linear: train linear attention instead.
        watch: called with the number of finished steps and of all.

    Returns:
        The layer.

    Raises:
        SettingsError: an argument is out of range.
    """
    if min(d, length, steps, batch) < 1 or lr <= 0 or noise < 0:
        raise SettingsError(
            f"got d={d}, length={length}, steps={steps}, batch={batch}, lr={lr}, noise={noise}; "
            "expected counts from 1, a positive lr and a noise that is not negative"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = InContextAttention(d + 1, heads, linear=linear)
    optimizer = torch.optim.Adam(layer.parameters(), lr)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        prompts = sample(batch, length, d, noise, generator=generator)
        loss = (layer(prompts.query, prompts.z) - prompts.target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        falling.step()
        if watch is not None:
            watch(step + 1, steps)
    return layer


@dataclass(frozen=True)
class Outcome:
    """What a run found; errors are mean squared errors on the same fresh prompts.

    Attributes:
        error: of the layer, by length of the prompts.
        bayes: of the ridge predictor, likewise.
        single: of a layer with one head, likewise.
        linear: of linear attention, likewise.
        agreement: correlation of the layer's predictions with the debiased gradient step.
        patterns: of the layer's circuits.
        circuits: of the layer.
        lengths: of the prompts; the layers were trained with the first.
        said: (n, 2) predictions of the layer and debiased gradient steps for the same prompts, the
            steps scaled to fit.
    """

    error: dict[int, float]
    bayes: dict[int, float]
    single: dict[int, float]
    linear: dict[int, float]
    agreement: float
    patterns: Patterns
    circuits: Circuits
    lengths: tuple[int, ...]
    said: Tensor


@torch.no_grad()
def _errors(
    layers: dict[str, InContextAttention], length: int, d: int, noise: float, seed: int
) -> tuple[dict[str, float], float, Tensor]:
    prompts = sample(20_000, length, d, noise, generator=torch.Generator().manual_seed(seed))
    x, y, query = prompts.z[..., :d], prompts.z[..., d], prompts.query[:, 0, :d]
    target = prompts.target.flatten()
    said: dict[str, Tensor] = {
        name: torch.cat(
            [
                layer(q, z).flatten()
                for q, z in zip(prompts.query.split(2000), prompts.z.split(2000), strict=True)
            ]
        )
        for name, layer in layers.items()
    }
    said["bayes"] = ridge(x, y, query, noise)
    step = debiased_gradient_step(1.0, 0.5, x, y, query)
    agreement = torch.corrcoef(torch.stack([said["layer"], step]))[0, 1]
    errors = {n: float((s - target).square().mean()) for n, s in said.items()}
    scaled = step * (said["layer"] @ step) / (step @ step)
    return errors, float(agreement), torch.stack([said["layer"], scaled], 1)[:1000]


def run(
    *,
    heads: int = 2,
    d: int = 5,
    length: int = 40,
    noise: float = 0.1,
    steps: int = 2500,
    batch: int = 256,
    lr: float = 1e-2,
    seed: int = 0,
    watch: Watch | None = None,
) -> Outcome:
    """Train a layer, one with a single head and linear attention, and compare them.

    Args:
        heads: of the layer.
        d: covariates.
        length: examples of a prompt; the layers are also tried on prompts two and four times as
            long.
        noise: variance of the noise on a response.
        steps: of each training.
        batch: tasks of a step.
        lr: learning rate at the start.
        seed: of weights and tasks.
        watch: called with the number of finished steps and of all.

    Returns:
        Errors, patterns and circuits.
    """
    counts = {"layer": heads, "single": 1, "linear": 1}
    layers: dict[str, InContextAttention] = {}
    for i, (name, count) in enumerate(counts.items()):

        def told(step: int, total: int, before: int = i) -> None:
            if watch is not None:
                watch(before * total + step, len(counts) * total)

        layers[name] = train(
            count,
            d=d,
            length=length,
            noise=noise,
            steps=steps,
            batch=batch,
            lr=lr,
            seed=seed,
            linear=name == "linear",
            watch=told,
        )
    layer = layers["layer"]
    found = circuits(
        layer.q_proj.weight,
        layer.k_proj.weight,
        layer.v_proj.weight,
        layer.o_proj.weight,
        heads,
    )
    lengths = (length, 2 * length, 4 * length)
    results = {n: _errors(layers, n, d, noise, seed + 1) for n in lengths}
    by_name = {
        name: {n: results[n][0][name] for n in lengths}
        for name in ("layer", "bayes", "single", "linear")
    }
    return Outcome(
        by_name["layer"],
        by_name["bayes"],
        by_name["single"],
        by_name["linear"],
        results[length][1],
        patterns(found, d),
        found,
        lengths,
        results[length][2],
    )


def picture(outcome: Outcome, path: str | Path) -> Path:
    """Draw the circuits of every head, predictions beside the theory, and errors over lengths.

    Args:
        outcome: of :func:`run`.
        path: PNG to write.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    heads = len(outcome.circuits.qk)
    across = min(heads, 4)
    figure = Figure(figsize=(1.7 * across + 7.6, 3.9), layout="constrained")
    parts: Any = figure.subfigures(1, 3, width_ratios=[1.7 * across, 3.6, 4.0])
    left, middle, right = parts
    _circuits(left, outcome, across)
    axes = middle.subplots()
    said, step = outcome.said.T.tolist()
    reach = max(map(abs, said + step))
    axes.plot([-reach, reach], [-reach, reach], color="grey", linewidth=0.8)
    axes.plot(step, said, ".", markersize=2.5)
    axes.set(xlabel="debiased gradient step, scaled", ylabel="prediction of the layer")
    axes.set_title(f"correlation {outcome.agreement:.4f}", fontsize=10)
    axes.set_aspect("equal")
    axes = right.subplots()
    series = (
        ("linear attention", outcome.linear),
        ("1 head", outcome.single),
        (f"{heads} heads", outcome.error),
        ("ridge (Bayes)", outcome.bayes),
    )
    for name, errors in series:
        axes.plot(list(errors), list(errors.values()), marker="o", label=name)
    axes.set(
        xlabel=f"examples in the prompt (trained with {outcome.lengths[0]})",
        ylabel="mean squared error",
        xscale="log",
        yscale="log",
    )
    axes.set_title("error at other lengths", fontsize=10)
    axes.set_xticks(outcome.lengths, [str(n) for n in outcome.lengths])
    axes.minorticks_off()
    axes.legend(frameon=False, fontsize=8)
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path


def _circuits(figure: Any, outcome: Outcome, across: int) -> None:
    """Heat maps of W_QK and W_OV of the first heads, on one scale each."""
    axes = figure.subplots(2, across, squeeze=False, height_ratios=[6, 1.4])
    qk, ov = outcome.circuits
    # the query has no response yet, so this row meets zeros only and keeps its random start
    qk = qk[:, :-1]
    for row, values, name in ((0, qk, "W_QK"), (1, ov.mT, "W_OV")):
        limit = float(values.abs().max())
        for head in range(across):
            here = axes[row, head]
            here.imshow(values[head].numpy(), cmap="RdBu_r", vmin=-limit, vmax=limit)
            here.set(xticks=[], yticks=[])
            here.set_title(f"{name}, head {head}", fontsize=9)
        axes[row, 0].set_ylabel(f"±{limit:.2g}", fontsize=8)
    axes[0, 0].set_xlabel("covariates, response", fontsize=8)
