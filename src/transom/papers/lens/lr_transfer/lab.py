"""Train over widths and learning rates, and watch the sharpness."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from transom.errors import SettingsError
from transom.papers.lens.lr_transfer.curvature import Curvature, top_eigenvalues
from transom.papers.lens.lr_transfer.network import Regime, ResidualNet, half_squared_error

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Sweep:
    """What a sweep found, by regime and width.

    Attributes:
        rates: the learning rates eta_0.
        watched: the rate along which the sharpness was taken.
        steps: at which it was taken.
        losses: at the end, one for each rate; infinite where training diverged.
        sharpness: gamma^2 lambda_max at those steps.
    """

    rates: tuple[float, ...]
    watched: float
    steps: tuple[int, ...]
    losses: dict[Regime, dict[int, tuple[float, ...]]]
    sharpness: dict[Regime, dict[int, tuple[float, ...]]]

    def best(self, regime: Regime) -> dict[int, int]:
        """Index of the best rate of each width."""
        return {
            width: min(range(len(values)), key=values.__getitem__)
            for width, values in self.losses[regime].items()
        }

    def variation(self, regime: Regime, start: int = 50) -> float:
        """Standard deviation of the sharpness over widths by its mean, averaged from a step on."""
        rows = torch.tensor([list(v) for v in self.sharpness[regime].values()])
        rows = rows[:, torch.tensor(self.steps) >= start]
        return float((rows.std(0, correction=0) / rows.mean(0)).mean())


def sweep(
    widths: Sequence[int] = (16, 32, 64, 128),
    rates: Sequence[float] = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0),
    regimes: Sequence[Regime] = ("mup", "ntk"),
    *,
    watched: float = 1.0,
    steps: int = 200,
    every: int = 10,
    depth: int = 3,
    inputs: int = 16,
    samples: int = 64,
    seed: int = 0,
    watch: Watch | None = None,
) -> Sweep:
    """Full-batch gradient descent of residual networks on the outputs of a small random teacher.

    Args:
        widths: of the networks.
        rates: eta_0; the step size is eta_0 gamma^2.
        regimes: to compare.
        watched: the rate at which the sharpness is taken; one of `rates`.
        steps: of each training.
        every: so many steps the sharpness is taken.
        depth: residual layers.
        inputs: features of an input.
        samples: of the batch.
        seed: of data and weights.
        watch: called with the number of finished trainings and of all.

    Returns:
        Losses and sharpness.

    Raises:
        SettingsError: `watched` is not among the rates, or a count is below 1.
    """
    if watched not in rates:
        raise SettingsError(f"watched is {watched}; expected one of the rates {list(rates)}")
    if min(steps, every, samples, *widths) < 1:
        raise SettingsError(
            f"steps={steps}, every={every}, samples={samples}, widths={list(widths)}; expected "
            "each to be 1 or more"
        )
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, inputs, generator=generator)
    teacher = torch.randn(inputs, generator=generator) / math.sqrt(inputs)
    y = torch.sin(2 * x @ teacher)
    losses: dict[Regime, dict[int, tuple[float, ...]]] = {}
    sharpness: dict[Regime, dict[int, tuple[float, ...]]] = {}
    done, total = 0, len(regimes) * len(widths) * len(rates)
    for regime in regimes:
        losses[regime], sharpness[regime] = {}, {}
        for width in widths:
            ends = []
            for rate in rates:
                start = torch.Generator().manual_seed(seed + 1)
                net = ResidualNet(inputs, width, depth, regime, generator=start)
                seen: list[float] = []
                for step in range(steps + 1):
                    if rate == watched and step % every == 0:
                        here = Curvature(
                            lambda net=net: half_squared_error(net(x), y),  # type: ignore[misc]
                            net.parameters(),
                        )
                        value = top_eigenvalues(here, tolerance=1e-2, most=40)
                        seen.append(float(value[0]) * net.gamma**2)
                    loss = half_squared_error(net(x), y)
                    if step == steps or not loss.isfinite():
                        break
                    grads = torch.autograd.grad(loss, list(net.parameters()))
                    with torch.no_grad():
                        for p, g in zip(net.parameters(), grads, strict=True):
                            p.sub_(g, alpha=net.rate(rate))
                end = float(loss.detach())
                ends.append(end if math.isfinite(end) else math.inf)
                if rate == watched:
                    sharpness[regime][width] = tuple(seen)
                done += 1
                if watch is not None:
                    watch(done, total)
            losses[regime][width] = tuple(ends)
    taken = tuple(range(0, steps + 1, every))
    return Sweep(tuple(rates), watched, taken, losses, sharpness)


def picture(result: Sweep, path: str | Path) -> Path:
    """Draw final loss over learning rate, and sharpness over steps, for each regime.

    Args:
        result: of :func:`sweep`.
        path: PNG to write.

    Returns:
        The path.
    """
    from matplotlib.figure import Figure

    count = len(result.losses)
    figure = Figure(figsize=(4.6 * count, 6.4), layout="constrained")
    axes = figure.subplots(2, count, squeeze=False, sharey="row")
    for column, regime in enumerate(result.losses):
        above, below = axes[0, column], axes[1, column]
        for i, (width, values) in enumerate(result.losses[regime].items()):
            colour = f"C{i}"
            above.plot(result.rates, values, marker="o", color=colour, label=f"width {width}")
            best = result.best(regime)[width]
            above.plot(result.rates[best], values[best], "*", color=colour, markersize=14)
            seen = result.sharpness[regime][width]
            below.plot(result.steps[: len(seen)], seen, color=colour)
        above.set(title=regime, xscale="log", yscale="log", xlabel="learning rate")
        above.set_xticks(result.rates, [f"{rate:g}" for rate in result.rates])
        above.minorticks_off()
        below.axhline(2 / result.watched, color="grey", linestyle=":", label="2 / learning rate")
        below.set(xlabel=f"step, learning rate {result.watched:g}", yscale="log")
    axes[0, 0].set_ylabel("final loss")
    axes[1, 0].set_ylabel("gamma² × sharpness")
    axes[0, 0].legend(frameon=False, fontsize=8)
    axes[1, 0].legend(frameon=False, fontsize=8)
    path = Path(path)
    figure.savefig(path, dpi=150)
    return path
