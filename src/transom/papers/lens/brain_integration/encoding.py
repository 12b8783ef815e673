"""Features to signal: ridge regression with contiguous folds, ceilings, windows, projection.

Everything is computed in float64, whatever comes in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transom.errors import SettingsError

ALPHAS: tuple[float, ...] = tuple(10.0**e for e in range(-1, 6))


class Fold(NamedTuple):
    """Events of one fold, as indices."""

    train: Tensor
    validation: Tensor
    test: Tensor


class Encoding(NamedTuple):
    """How well features predict each target, (E,): Pearson r, and the chosen alpha."""

    validation: Tensor
    test: Tensor
    alpha: Tensor


def folds(events: int, count: int = 5, gap: int = 0) -> list[Fold]:
    """Contiguous folds; of each held-out block the first half validates, the second tests.

    Args:
        events: in the order of time.
        count: folds; the first `events` mod `count` are one longer.
        gap: events on both sides of the held-out block that do not train either.

    Returns:
        The folds.

    Raises:
        SettingsError: a half of some fold would have fewer than two events, or none would train.
    """
    if count < 2 or events // count < 4 or gap < 0:
        raise SettingsError(
            f"{events} events in {count} folds with gap {gap}; expected two folds or more, four "
            "events a fold or more, and a gap of 0 or more"
        )
    every, start, made = torch.arange(events), 0, []
    for i in range(count):
        end = start + events // count + (i < events % count)
        middle = start + (end - start) // 2
        train = every[(every < start - gap) | (every >= end + gap)]
        if len(train) < 2:
            raise SettingsError(f"gap {gap} leaves {len(train)} events to train; make it smaller")
        made.append(Fold(train, every[start:middle], every[middle:end]))
        start = end
    return made


def standardise(train: Tensor, *others: Tensor) -> list[Tensor]:
    """Columns with the mean and population deviation of the training events; constants become 0.

    Args:
        train: (n, f).
        *others: (m, f), treated alike.

    Returns:
        All of them.
    """
    mean, deviation = train.mean(0), train.std(0, correction=0)
    # a column that is constant up to rounding would come out as noise
    constant = deviation <= 1e-12 * mean.abs().clamp_min(1e-300)
    deviation = deviation.masked_fill(constant, torch.inf)
    return [(x - mean) / deviation for x in (train, *others)]


def _ones(x: Tensor) -> Tensor:
    return torch.cat([x.new_ones(len(x), 1), x], 1)


def ridge(x: Tensor, y: Tensor, alphas: Sequence[float]) -> Tensor:
    """Ridge weights for several penalties from one decomposition; the intercept is penalised too.

    Args:
        x: (n, f).
        y: (n, E).
        alphas: penalties, each above 0.

    Returns:
        (alphas, 1 + f, E); row 0 is the intercept.

    Raises:
        SettingsError: a penalty is not positive, or the numbers of events differ.
    """
    if not alphas or min(alphas) <= 0:
        raise SettingsError(f"alphas are {list(alphas)}; expected at least one, each above 0")
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise SettingsError(
            f"features are {tuple(x.shape)} and targets {tuple(y.shape)}; expected (n, f) and "
            "(n, E) with the same n"
        )
    x, y = _ones(x.double()), y.double()
    penalties = torch.tensor(alphas, dtype=x.dtype, device=x.device)[:, None, None]
    if x.shape[1] <= len(x):
        values, vectors = torch.linalg.eigh(x.T @ x)
        return vectors @ ((vectors.T @ (x.T @ y)) / (values.clamp_min(0)[:, None] + penalties))
    values, vectors = torch.linalg.eigh(x @ x.T)  # fewer events than features
    dual = vectors @ ((vectors.T @ y) / (values.clamp_min(0)[:, None] + penalties))
    return x.T @ dual


def predict(x: Tensor, weights: Tensor) -> Tensor:
    """Features (n, f) and weights (..., 1 + f, E) -> predictions (..., n, E)."""
    return _ones(x.double()) @ weights


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Product-moment correlation along events, (..., n, E) -> (..., E), 0 where one is constant."""
    a, b = (t - t.mean(-2, keepdim=True) for t in (a, b))
    size = a.square().sum(-2).sqrt() * b.square().sum(-2).sqrt()
    r = (a * b).sum(-2) / size.masked_fill(size == 0, torch.inf)
    return r.clamp(-1, 1)


def encode(
    features: Tensor,
    targets: Tensor,
    *,
    count: int = 5,
    alphas: Sequence[float] = ALPHAS,
    gap: int = 0,
    inner: int | None = None,
) -> Encoding:
    """How well features predict every target on events that were held out.

    Args:
        features: (n, f), events in the order of time.
        targets: (n, E).
        count: folds.
        alphas: penalties to choose from, for each target by the best validation score.
        gap: events between training and held-out ones that are used for neither.
        inner: folds within each training set to choose alpha by, so that no event that is tested
            had a say; then `alpha` is the geometric mean over folds. None chooses as published, by
            the mean validation score of all folds.

    Returns:
        Scores averaged over folds.

    Raises:
        SettingsError: shapes or settings are out of range.
    """
    x, y = features.double(), targets.double()
    grid = torch.tensor(alphas, dtype=x.dtype, device=x.device)
    validations, tests, chosen = [], [], []
    for fold in folds(len(x), count, gap):
        train, val, test = standardise(*(x[i] for i in fold))
        weights = ridge(train, y[fold.train], alphas)
        validation = pearson(predict(val, weights), y[fold.validation])
        held = pearson(predict(test, weights), y[fold.test])
        if inner is not None:
            best = _inner(x[fold.train], y[fold.train], inner, alphas, gap)
            validation, held = (s.gather(0, best[None])[0] for s in (validation, held))
            chosen.append(grid[best])
        validations.append(validation)
        tests.append(held)
    validation, held = torch.stack(validations).mean(0), torch.stack(tests).mean(0)
    if inner is not None:
        return Encoding(validation, held, torch.stack(chosen).log().mean(0).exp())
    best = validation.argmax(0)
    return Encoding(validation.gather(0, best[None])[0], held.gather(0, best[None])[0], grid[best])


def _inner(x: Tensor, y: Tensor, count: int, alphas: Sequence[float], gap: int) -> Tensor:
    scores = []
    for fold in folds(len(x), count, gap):
        held = torch.cat([fold.validation, fold.test])
        train, other = standardise(x[fold.train], x[held])
        scores.append(pearson(predict(other, ridge(train, y[fold.train], alphas)), y[held]))
    return torch.stack(scores).mean(0).argmax(0)


def noise_ceiling(repeats: Tensor, splits: int = 20, seed: int = 0) -> Tensor:
    """The largest r a perfect model could reach on one presentation, from repeated ones.

    Random halves of the repeats are averaged and correlated over events, r; Spearman-Brown takes
    that to one presentation, r / (R/2 - (R/2 - 1) r), whose root is the ceiling.

    Args:
        repeats: (R, n, E), at least two presentations of the same events.
        splits: random halvings to average over.
        seed: of the halvings.

    Returns:
        (E,), 0 where responses do not repeat.

    Raises:
        SettingsError: there are fewer than two repeats.
    """
    if repeats.ndim != 3 or len(repeats) < 2 or splits < 1:
        raise SettingsError(
            f"repeats are {tuple(repeats.shape)} and splits {splits}; expected (R, n, E) with two "
            "repeats or more, and one split or more"
        )
    generator, half = torch.Generator().manual_seed(seed), len(repeats) // 2
    found = []
    for _ in range(splits):
        order = torch.randperm(len(repeats), generator=generator)
        first, second = (
            repeats[i].double().mean(0) for i in (order[:half], order[half : 2 * half])
        )
        found.append(pearson(first, second))
    r = torch.stack(found).mean(0).clamp_min(0)
    return (r / (half - (half - 1) * r)).sqrt()


def windows(
    signal: Tensor,
    onsets: Tensor,
    rate: float,
    *,
    around: float = 2.0,
    width: float = 0.2,
    step: float = 0.025,
) -> Tensor:
    """Mean activity in windows around every event.

    Args:
        signal: (electrodes, samples).
        onsets: (n,) in seconds.
        rate: samples a second.
        around: seconds before and after an event at which the windows' centres end.
        width: of a window, seconds.
        step: between windows, seconds; the defaults make 161.

    Returns:
        (n, electrodes, bins).

    Raises:
        SettingsError: a window reaches beyond the signal.
    """
    bins = round(2 * around / step) + 1
    offsets = torch.linspace(-around, around, bins, dtype=torch.float64)
    centres = onsets.double()[:, None] + offsets
    # rounded apart, so that every event has the same windows
    starts = (onsets.double() * rate).round().long()[:, None]
    starts = starts + ((offsets - width / 2) * rate).round().long()
    length = max(1, round(width * rate))
    if int(starts.min()) < 0 or int(starts.max()) + length > signal.shape[1]:
        raise SettingsError(
            f"windows reach from {float(centres.min()) - width / 2:.2f} to "
            f"{float(centres.max()) + width / 2:.2f} s but the signal has "
            f"{signal.shape[1] / rate:.2f} s; leave out events near its ends"
        )
    sums = torch.nn.functional.pad(signal.double().cumsum(1), (1, 0))
    return ((sums[:, starts + length] - sums[:, starts]) / length).transpose(0, 1)


def project(features: Tensor, eps: float = 0.1, seed: int = 0) -> Tensor:
    """Sparse random projection to as many columns as keep distances within a factor 1 ± eps.

    The number is that of Johnson and Lindenstrauss, 4 ln n / (eps^2/2 - eps^3/3); one entry in
    sqrt(f) is not zero. Features with no more columns come back as they are.

    Args:
        features: (n, ...), flattened.
        eps: distortion allowed, between 0 and 1.
        seed: of the projection.

    Returns:
        (n, columns).

    Raises:
        SettingsError: `eps` is out of range.
    """
    if not 0 < eps < 1:
        raise SettingsError(f"eps is {eps}; expected a number between 0 and 1")
    x = features.flatten(1).double()
    size = int(4 * math.log(len(x)) / (eps**2 / 2 - eps**3 / 3))
    if size >= x.shape[1]:
        return x
    generator, density = torch.Generator().manual_seed(seed), x.shape[1] ** -0.5
    uniform = torch.rand(x.shape[1], size, generator=generator)
    signs = (uniform < density / 2).double() - (uniform > 1 - density / 2).double()
    return x @ signs.to(x.device) / math.sqrt(density * size)
