"""Train over widths, or depths, and learning rates, and watch the sharpness.

Over widths, all regimes are the same network at the narrowest one (but for the step size of the
first matrix in "standard"), where it learns features; what happens to it as it grows is what they
differ in. With the textbook gamma = 1 of NTK every width above a few neurons is lazy already: its
sharpness hardly moves, and so cannot move apart either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from transom.errors import SettingsError
from transom.papers.lens.lr_transfer.curvature import Curvature, top_eigenvalues
from transom.papers.lens.lr_transfer.network import Regime, ResidualNet, half_squared_error

NAMES: dict[Regime, str] = {
    "mup": "muP",
    "depth-mup": "Depth-muP",
    "ntk": "NTK",
    "standard": "standard",
}
Over = Literal["width", "depth"]
REGIMES: dict[Over, tuple[Regime, ...]] = {
    "width": ("mup", "ntk", "standard"),
    "depth": ("depth-mup", "mup"),
}
SIZES: dict[Over, tuple[int, ...]] = {"width": (32, 64, 128, 256), "depth": (2, 4, 8, 16)}
Watch = Callable[[int, int], None]
_LOST = 1e3  # a loss that starts near 1 does not come back from here


@dataclass(frozen=True)
class Sweep:
    """What a sweep found, by regime and size.

    Attributes:
        over: what a size is, a width or a depth.
        rates: the learning rates eta_0.
        watched: the rate along which the sharpness was taken.
        steps: at which it was taken.
        losses: after the training of each rate, geometric means over seeds; infinite where a
            training diverged.
        sharpness: gamma^2 lambda_max at those steps, means over seeds; for "standard" the
            eigenvalue in units of the step sizes, which for the others is the same.
    """

    over: Over
    rates: tuple[float, ...]
    watched: float
    steps: tuple[int, ...]
    losses: dict[Regime, dict[int, tuple[float, ...]]]
    sharpness: dict[Regime, dict[int, tuple[float, ...]]]

    def best(self, regime: Regime) -> dict[int, int]:
        """Index of the best rate of each size."""
        return {
            size: min(range(len(values)), key=values.__getitem__)
            for size, values in self.losses[regime].items()
        }

    def drift(self, regime: Regime) -> float:
        """Best rate of the largest network by that of the smallest."""
        best = self.best(regime)
        return self.rates[best[max(best)]] / self.rates[best[min(best)]]

    def variation(self, regime: Regime, start: int = 50) -> float:
        """Standard deviation of the sharpness over sizes by its mean, averaged from a step on."""
        rows = torch.tensor([list(v) for v in self.sharpness[regime].values()])
        rows = rows[:, torch.tensor(self.steps) >= start]
        return float((rows.std(0, correction=0) / rows.mean(0)).mean())


def sweep(
    sizes: Sequence[int] | None = None,
    rates: Sequence[float] = (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    regimes: Sequence[Regime] | None = None,
    *,
    over: Over = "width",
    watched: float = 0.25,
    steps: int = 60,
    watched_steps: int = 200,
    every: int = 10,
    width: int = 64,
    depth: int = 3,
    inputs: int = 16,
    samples: int = 128,
    seeds: int = 2,
    seed: int = 0,
    watch: Watch | None = None,
) -> Sweep:
    """Full-batch gradient descent of residual networks on products of two random features.

    Args:
        sizes: widths or depths of the networks; at the narrowest all regimes are the same network.
        rates: eta_0; the step size is eta_0 gamma^2, and eta_0 times the fan in for "standard".
        regimes: to compare; by default muP, NTK and "standard" over widths, muP with and without
            its factor for depth over depths.
        over: whether sizes are widths or depths.
        watched: the rate at which the sharpness is taken; low enough that training does not end
            at the edge of stability, where all curves meet at 2 / rate.
        steps: of each training of the rates.
        watched_steps: of the training along which the sharpness is taken.
        every: so many steps the sharpness is taken.
        width: of all networks, over depths.
        depth: residual layers of all networks, over widths.
        inputs: features of an input.
        samples: of the batch.
        seeds: data sets and weights to average over.
        seed: the first of them.
        watch: called with the number of finished trainings and of all.

    Returns:
        Losses and sharpness.

    Raises:
        SettingsError: a count is below 1, `over` is neither, or the training that is watched
            diverges.
    """
    if over not in SIZES:
        raise SettingsError(f"over is {over!r}; expected one of {list(SIZES)}")
    sizes = SIZES[over] if sizes is None else sizes
    regimes = REGIMES[over] if regimes is None else regimes
    if min(steps, watched_steps, every, samples, seeds, width, depth, *sizes) < 1:
        raise SettingsError(
            f"steps={steps}, watched_steps={watched_steps}, every={every}, samples={samples}, "
            f"seeds={seeds}, width={width}, depth={depth}, sizes={list(sizes)}; expected each to "
            "be 1 or more"
        )
    shapes = [(n, depth) if over == "width" else (width, n) for n in sizes]
    narrow = min(shape[0] for shape in shapes)
    losses: dict[Regime, dict[int, tuple[float, ...]]] = {}
    sharpness: dict[Regime, dict[int, tuple[float, ...]]] = {}
    done, total = 0, len(regimes) * len(sizes) * (len(rates) + 1) * seeds
    for regime in regimes:
        losses[regime], sharpness[regime] = {}, {}
        for size, (wide, deep) in zip(sizes, shapes, strict=True):
            ends, seen = torch.zeros(len(rates)), torch.zeros(watched_steps // every + 1)
            for k in range(seed, seed + seeds):
                x, y = _task(k, samples, inputs)
                for i in range(len(rates) + 1):
                    start = torch.Generator().manual_seed(k + 1)
                    net = ResidualNet(inputs, wide, deep, regime, narrow=narrow, generator=start)
                    if i < len(rates):
                        ends[i] += math.log(_train(net, x, y, rates[i], steps)) / seeds
                    else:
                        seen += _watched(net, x, y, watched, watched_steps, every) / seeds
                    done += 1
                    if watch is not None:
                        watch(done, total)
            losses[regime][size] = tuple(ends.exp().tolist())
            sharpness[regime][size] = tuple(seen.tolist())
    taken = tuple(range(0, watched_steps + 1, every))
    return Sweep(over, tuple(rates), watched, taken, losses, sharpness)


def _task(seed: int, samples: int, inputs: int) -> tuple[Tensor, Tensor]:
    """Inputs and the product of two projections of them, which no linear map can tell."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator)
    a, b = (x @ torch.randn(inputs, 2, generator=generator) / math.sqrt(inputs)).T
    return x, a * b / (a * b).std()


def _step(net: ResidualNet, x: Tensor, y: Tensor, rates: Sequence[float]) -> float:
    """One step of gradient descent; the loss before it."""
    parameters = list(net.parameters())
    loss = half_squared_error(net(x), y)
    grads = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        for p, g, rate in zip(parameters, grads, rates, strict=True):
            p.sub_(g, alpha=rate)
    return float(loss.detach())


def _train(net: ResidualNet, x: Tensor, y: Tensor, rate: float, steps: int) -> float:
    """The loss after so many steps; infinite when training diverges."""
    rates = net.rates(rate)
    for _ in range(steps):
        if not _step(net, x, y, rates) < _LOST:
            return math.inf
    with torch.no_grad():
        end = float(half_squared_error(net(x), y))
    return max(end, 1e-30) if end < _LOST else math.inf


def _watched(net: ResidualNet, x: Tensor, y: Tensor, rate: float, steps: int, every: int) -> Tensor:
    """Sharpness before the first step and after every so many."""
    rates, seen = net.rates(rate), []
    for step in range(steps + 1):
        if step % every == 0:
            here = Curvature(
                lambda: half_squared_error(net(x), y), net.parameters(), net.rates(1.0)
            )
            if not here.loss < _LOST:
                raise SettingsError(
                    f"training of width {len(net.w_out)}, depth {net.depth} diverges at the "
                    f"watched rate {rate} in {net.regime!r}; take a lower one"
                )
            seen.append(top_eigenvalues(here, tolerance=1e-2, most=40)[0])
        if step < steps:
            _step(net, x, y, rates)
    return torch.stack(seen)


def picture(result: Sweep, path: str | Path) -> Path:
    """Draw final loss over learning rate, and sharpness over steps, for each regime.

    Args:
        result: of :func:`sweep`.
        path: PNG to write.

    Returns:
        The path.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    count = len(result.losses)
    figure = Figure(figsize=(1.2 + 3.9 * count, 6.6), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, sharey="row")
    for column, regime in enumerate(result.losses):
        above, below = axes[0, column], axes[1, column]
        best = result.best(regime)
        for i, (size, values) in enumerate(result.losses[regime].items()):
            colour = colormaps["viridis"](0.9 * i / max(1, len(best) - 1))
            above.plot(
                result.rates, values, marker=".", color=colour, label=f"{result.over} {size}"
            )
            above.plot(
                result.rates[best[size]], values[best[size]], "*", color=colour, markersize=15,
                markeredgecolor="white", zorder=5,
            )  # fmt: skip
            below.plot(result.steps, result.sharpness[regime][size], color=colour)
        title = (
            f"{NAMES[regime]}: best rate × {result.drift(regime):g} over {result.over}s,\n"
            f"sharpness varies by {result.variation(regime, result.steps[-1] // 4):.0%}"
        )
        above.set_title(title, fontsize=10)
        above.set(xscale="log", yscale="log", xlabel="learning rate")
        above.set_xticks(result.rates, [f"{rate:g}" for rate in result.rates], fontsize=8)
        above.minorticks_off()
        below.axhline(2 / result.watched, color="grey", linestyle=":", label="2 / learning rate")
        below.set(xlabel=f"step, at learning rate {result.watched:g}", yscale="log")
        below.yaxis.set_major_locator(LogLocator(2))
        below.yaxis.set_major_formatter("{x:g}")
        below.minorticks_off()
    axes[0, 0].set_ylabel("final loss; star: best, end: diverges")
    axes[1, 0].set_ylabel("gamma² × sharpness")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[1, 0].legend(frameon=False, fontsize=8)
    path = Path(path)
    figure.savefig(path, dpi=110)
    return path
