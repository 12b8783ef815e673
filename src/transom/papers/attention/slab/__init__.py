"""SLAB: a norm that folds away, and linear attention with ReLU features.

Two changes that make a transformer faster where it is deployed, both to be trained.

PRepBN takes the place of LayerNorm. Training slides from one to the other,

    y = λ · LN(x) + (1-λ) · RepBN(x),   RepBN(x) = BN(x) + α x,   λ = r0 · iter / total_step

with BN over batch and tokens and α one learned number; `iter` counts down from total_step to 0. At
inference RepBN is a scale and a shift per channel and goes into the linear maps behind it
(:func:`transom.fold`), so that no norm is left. Simplified linear attention (SLA) is

    out_i = φ(q_i) Σ_j φ(k_j + P_j)ᵀ v_j / (φ(q_i) · Σ_j φ(k_j + P_j) + 1e-6) + DWC(v)_i,  φ = ReLU

per head, without scaling: O(N) in the tokens. P (1, N, C) is a learned table, DWC a 5 x 5
depth-wise convolution of the map of values whose filters all heads share. x: (B, N, C) stays
(B, N, C).

Source: Guo et al., SLAB: Efficient Transformers with Simplified Linear Attention and Progressive
Re-parameterized Batch Normalization, ICML 2024; official code xinghaochen/SLAB@f58db00 (without a
licence; this package is our own).

On a host, PRepBN takes the norms of the blocks and SLA their attention. The host's prefix tokens
(class token, registers) take part in the linear attention and pass the convolution by; a token
that stands for several counts as often, and padding not at all. That is ours, as the paper has maps
only.

The networks are DeiT, Swin, PVT and CSWin with PRepBN alone (`*_prepbn`) or with both (`slab_*`),
by the names of the official configs and with the official names of parameters. The official
repository states neither parameters nor multiply-adds, so none are stated here. Where its fold of
the patch embedding forgets α times the bias of the convolution, ours does not.

Checked: golden cases of SLA, PRepBN (training step, warm-up, evaluation), a folded block and
a small DeiT. The released checkpoints were not available; no accuracy was reproduced.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.papers.attention.slab import models
from transom.papers.attention.slab.mixer import HostLinearAttention
from transom.papers.attention.slab.norm import PRepBN, RepBN, check_schedule
from transom.registry import Backbone, Method, Training
from transom.slots import BlockView, Fill

_log = logging.getLogger(__name__)

BACKBONES = tuple(Backbone(name) for name in models.default_cfgs)


@dataclass(frozen=True)
class SLAB(Method):
    """Progressive re-parameterised batch norm and simplified linear attention.

    Attributes:
        linear: whether attention becomes simplified linear attention.
        kernel_size: of its depth-wise convolution, odd.
        norm: whether the norms of the blocks become PRepBN.
        warm: training steps with the host's own norm alone.
        total_step: training steps in which λ goes from r0 to 0.
        r0: λ at the first of them.
        every: forward passes for one step of the schedule (gradient accumulation; 16 for the
            language model of the paper).
        alpha: initial share of the input in RepBN: 0 as in the language model of the paper, since
            a host is not built anew and its stream may be large; its vision networks begin with 1.
        scale: initial weight of its batch norm (0 for the language model); None takes weight and
            bias of the host's own norm.
        eps: of the batch norm.
        momentum: of its running statistics.
    """

    linear: bool = True
    kernel_size: int = 5
    norm: bool = True
    warm: int = 0
    total_step: int = 300_000
    r0: float = 1.0
    every: int = 1
    alpha: float = 0.0
    scale: float | None = None
    eps: float = 1e-5
    momentum: float = 0.1
    needs_training = True

    def __post_init__(self) -> None:
        if not self.linear and not self.norm:
            raise SettingsError("linear and norm are both False; expected at least one True")
        if self.kernel_size < 1 or self.kernel_size % 2 == 0:
            raise SettingsError(f"kernel_size is {self.kernel_size}; expected an odd number")
        check_schedule(self.warm, self.total_step, self.r0, self.every)
        if self.eps <= 0 or not 0 <= self.momentum <= 1:
            raise SettingsError(
                f"eps is {self.eps} and momentum {self.momentum}; expected a positive number and "
                "one from 0 to 1"
            )

    def fit(self, host: Host) -> list[Fill]:
        return [self._fill(host, view) for view in host.views]

    def _fill(self, host: Host, view: BlockView) -> Fill:
        norms = (
            (self._norm(host, view, 0), self._norm(host, view, 1)) if self.norm else (None, None)
        )
        return Fill(norms=norms, mixer=self._mixer(host, view) if self.linear else None)

    def _mixer(self, host: Host, view: BlockView) -> HostLinearAttention:
        given = view.projections()
        if given is None or host.grid is None:
            lacks = "known grid of patches" if host.grid is None else "plain projections"
            raise FitError(
                f"slab makes the attention of a block linear, but this {host.family} "
                f"({type(view.module).__name__}) has no {lacks}; linear=False fits the norms alone"
            )
        return HostLinearAttention(given, host.prefix, host.grid, self.kernel_size)

    def _norm(self, host: Host, view: BlockView, i: int) -> PRepBN | None:
        own: Any = view.part("norm2" if i else "norm1")
        if own is None:
            raise FitError(
                f"slab replaces the norms in front of attention and ffn, but the blocks of this "
                f"{host.family} ({type(view.module).__name__}) have none there; norm=False fits "
                "linear attention alone"
            )
        first = 1.0 if self.scale is None else self.scale
        rep = RepBN(host.width, self.eps, self.momentum, self.alpha, first)
        for name in ("weight", "bias") if self.scale is None else ():
            given = getattr(own, name, None)
            if isinstance(given, Tensor) and given.shape == (host.width,):
                rep.bn.get_parameter(name).data.copy_(given)
        return PRepBN(
            copy.deepcopy(own),
            rep,
            warm=self.warm,
            total_step=self.total_step,
            r0=self.r0,
            every=self.every,
        )

    def training(self, **options: Any) -> Training:
        super().training(**options)
        return _Schedule(self)

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"linear": False}, {"norm": False}, {}]


class _Schedule(Training):
    """The counters are the norm's own; here is only told when they will not get to the end."""

    def __init__(self, method: SLAB) -> None:
        self.method = method

    def at_step(self, model: nn.Module, step: int, total: int) -> Mapping[str, Any]:
        method = self.method
        needed = (method.warm + method.total_step) * method.every
        if step == 0 and method.norm and needed > total:
            _log.warning(
                "this training of %d steps ends before the norms have become RepBN, which takes "
                "%d; give slab a total_step of %d or less, evaluation uses RepBN alone",
                total,
                needed,
                max(1, total // method.every - method.warm),
            )
        return {}


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official state dict to ours: the names agree, but some networks were trained with RepBN bare.

    Args:
        state: with `norm.alpha` where PRepBN would have `norm.norm2.alpha`, or without.

    Returns:
        With the LayerNorm that nothing uses any more and the counters at the end of the schedule.
    """
    bare = [
        name.removesuffix(".alpha")
        for name in state
        if name.endswith(".alpha")
        and f"{name.removesuffix('.norm2.alpha')}.total_step" not in state
    ]
    out = dict(state)
    for norm in bare:
        parts = [n for n in state if n == f"{norm}.alpha" or n.startswith(f"{norm}.bn.")]
        for name in parts:
            out[name.replace(norm, f"{norm}.norm2", 1)] = out.pop(name)
        out[f"{norm}.norm1.weight"] = torch.ones_like(state[f"{norm}.bn.weight"])
        out[f"{norm}.norm1.bias"] = torch.zeros_like(state[f"{norm}.bn.weight"])
        for counter, value in (("warm", 0), ("iter", 0), ("total_step", 1)):
            out[f"{norm}.{counter}"] = torch.tensor(value)
    return out
