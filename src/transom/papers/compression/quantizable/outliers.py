"""How far activations lie out, on any host: infinity norm and kurtosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.lens.capture import capture

WATCHED = ("ffn.output", "residual.post")


def infinity_norm(x: Tensor) -> Tensor:
    """Largest magnitude of each sample (B,) of x (B, …)."""
    return x.flatten(1).abs().amax(1)


def kurtosis(x: Tensor, eps: float = 1e-6) -> Tensor:
    """Fourth moment of each sample (B,) of x (B, …) over the fourth power of its deviation.

    3 for a normal distribution; the deviation is the unbiased one, as in the official code.
    """
    flat = x.flatten(1)
    flat = flat.to(torch.promote_types(flat.dtype, torch.float32))
    away = flat - flat.mean(1, keepdim=True)
    return away.pow(4).mean(1) / (flat.std(1).pow(4) + eps)


@dataclass(frozen=True)
class Outliers:
    """What :func:`outliers` finds.

    Attributes:
        infinity_norm: by activation such as "blocks.3.ffn.output", averaged over samples.
        kurtosis: likewise.
        samples: how many there were.
    """

    infinity_norm: Mapping[str, float]
    kurtosis: Mapping[str, float]
    samples: int

    @property
    def largest(self) -> float:
        """Infinity norm of the activation where it is largest."""
        return max(self.infinity_norm.values())

    @property
    def mean_kurtosis(self) -> float:
        """Kurtosis averaged over the activations."""
        return sum(self.kurtosis.values()) / len(self.kurtosis)


@torch.no_grad()
def outliers(
    model: nn.Module,
    batches: Sequence[Any],
    names: Sequence[str] = WATCHED,
    *,
    decoder: bool | None = None,
) -> Outliers:
    """Outlier metrics of the activations of a host, with or without fitted methods.

    Padding, where there is any, counts as in the official code.

    Args:
        model: a supported host; it is called as it is, so put it into evaluation mode.
        batches: inputs of calls; a dictionary is passed by names.
        names: activations of each block, of those that :func:`transom.capture` knows.
        decoder: whether the decoder of the model is meant; None as in :func:`transom.capture`.

    Raises:
        SettingsError: there is nothing to measure, or a name is unknown.
        HostError: the model is no supported host.
    """
    if not batches or not names:
        raise SettingsError(
            f"outliers got {len(batches)} inputs and {len(names)} names; expected at least one of "
            "each"
        )
    norms: dict[str, float] = {}
    tails: dict[str, float] = {}
    samples = 0
    with capture(model, *(f"blocks.*.{name}" for name in names), decoder=decoder) as seen:
        for batch in batches:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
            for name, x in seen.items():
                norms[name] = norms.get(name, 0.0) + float(infinity_norm(x).double().sum())
                tails[name] = tails.get(name, 0.0) + float(kurtosis(x).double().sum())
            samples += len(next(iter(seen.values())))
    return Outliers(
        {name: total / samples for name, total in norms.items()},
        {name: total / samples for name, total in tails.items()},
        samples,
    )
