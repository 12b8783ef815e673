"""Clipped softmax and gated heads in the attention of a host."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.hosts.projected import Projected, expect
from transom.ops import attention
from transom.papers.compression.quantizable.attention import (
    Gate,
    attend,
    check_stretch,
    gate_parameters,
    gate_values,
    stretch,
)
from transom.projections import Projections
from transom.registry import Method
from transom.slots import Ask, Fill
from transom.tokens import Record


class ClippedAttention(nn.Module):
    """Attention operator with a clipped softmax; plain attention where nothing is stretched.

    Args:
        gamma, zeta: of the softmax.
    """

    def __init__(self, gamma: float, zeta: float) -> None:
        super().__init__()
        self.gamma, self.zeta = gamma, zeta

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
        ask: Ask | None = None,
    ) -> Tensor:
        """Heads (B, H, N, d) of q (B, H, N, d) and k, v (B, H, M, d)."""
        if not self.gamma and self.zeta == 1:
            return attention.attend(q, k, v, bias, scale=scale)
        return attend(q, k, v, bias, scale, self.gamma, self.zeta)


class GatedMixer(Projected):
    """Mixer: the host's attention from its projections, with a gate on every head.

    Args:
        given: the host's projections.
        method: the settings.
        gamma: of the softmax.
    """

    def __init__(self, given: Projections, method: Quantizable, gamma: float) -> None:
        super().__init__(given)
        self.clipped = ClippedAttention(gamma, method.zeta)
        self.gate: Gate = method.gate
        self.factor = 1 / method.init if method.finetune else 1.0
        dim = given.q[0].shape[1]
        std = 0.01 if method.finetune else None
        made = gate_parameters(method.gate, method.predictor, dim, given.heads, method.init, std)
        self.alpha = (
            made.to(given.q[0])
            if isinstance(made, nn.Module)
            else nn.Parameter(made.detach().to(given.q[0]))
        )

    def forward(self, h: Tensor, ask: Ask) -> Tensor:
        """Mixed tokens (B, N, D) of normed ones."""
        gate = gate_values(self.alpha, h, self.heads, self.gate) * self.factor

        def gated(q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
            y: Tensor = self.clipped(q, k, v, **given)
            return y * gate

        ask.operator = gated
        q, k, v = self.split(h)
        return self.join(ask.attend(q, k, v, dropout=0.0, scale=q.shape[-1] ** -0.5))


@dataclass(frozen=True)
class Quantizable(Method):
    """Heads that can output nothing.

    Attributes:
        gamma: γ of the clipped softmax, at most 0; 0 for a plain softmax.
        zeta: ζ, at least 1.
        alpha: strength of the clipping in place of gamma, which becomes -alpha / max_length.
        max_length: tokens of the longest sequence, if alpha is given; None takes those of the
            host's own image size.
        gate: "none", or what the gate of a head depends on: nothing, the tokens of a sample on
            average, or each token. Gates rebuild the attention from the host's projections.
        predictor: of a gate that depends on something: "linear", "mlp" (a quarter of the head's
            width hidden) or "mlp2" (all of it) from a head's own features, "all" linear from all.
        init: π, the gate that linear predictors begin with.
        finetune: begin near the host: small weights of predictors, gates times 1/π (linear
            predictors only).
        host: which part of a model is meant, an "encoder" or a "decoder" (without gates).
        seed: of what is drawn.
    """

    gamma: float = -0.025
    zeta: float = 1.0
    alpha: float | None = None
    max_length: int | None = None
    gate: Literal[
        "none", "unconditional_per_head", "conditional_per_head", "conditional_per_token"
    ] = "none"
    predictor: Literal["linear", "mlp", "mlp2", "all"] = "linear"
    init: float = 0.5
    finetune: bool = False
    host: Literal["encoder", "decoder"] = "encoder"
    seed: int = 0

    def __post_init__(self) -> None:
        check_stretch(self.gamma, self.zeta)
        if self.alpha is not None and self.alpha < 0:
            raise SettingsError(f"alpha is {self.alpha}; expected at least 0")
        if self.max_length is not None and self.max_length < 1:
            raise SettingsError(f"max_length is {self.max_length}; expected at least 1")
        if not 0 < self.init < 1:
            raise SettingsError(f"init is {self.init}; expected a gate between 0 and 1")
        if self.host == "decoder" and self.gate != "none":
            raise SettingsError(
                "gates rebuild the attention, which a decoder's cache forbids; give gate='none' "
                "with host='decoder'"
            )
        even = self.gate == "unconditional_per_head" and self.init == 0.5
        linear = self.gate.startswith("conditional") and self.predictor in ("linear", "all")
        if self.finetune and not (even or linear):
            raise SettingsError(
                f"finetune begins near the host, which gate={self.gate!r} with "
                f"predictor={self.predictor!r} and init={self.init} cannot; give a conditional "
                "gate with predictor 'linear' or 'all', or an unconditional one with init=0.5"
            )
        object.__setattr__(self, "takes", self.host)

    @property
    def needs_training(self) -> bool:
        """Whether a host that was not trained with it computes something else."""
        clips = bool(self.gamma if self.alpha is None else self.alpha) or self.zeta != 1
        return clips or (self.gate != "none" and not self.finetune)

    def fit(self, host: Host) -> list[Fill]:
        gamma = stretch(self.alpha, self._length(host), self.gamma)
        if self.gate == "none":
            clipped = ClippedAttention(gamma, self.zeta)
            return [Fill(attention=copy.deepcopy(clipped)) for _ in range(host.depth)]
        instead = "fit it with gate='none'"
        if host.follows:
            raise FitError(
                "quantizable rebuilds attention from its projections for a gate, but positions "
                f"enter every attention of this {host.family} host; {instead}"
            )
        given = [expect(view, "quantizable", instead) for view in host.views]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            return [Fill(mixer=GatedMixer(one, self, gamma)) for one in given]

    def _length(self, host: Host) -> int | None:
        if self.alpha is None or self.max_length is not None:
            return self.max_length
        if host.grid is None:
            raise FitError(
                f"quantizable got alpha without max_length, and this {host.family} host has no "
                "size of its own; give max_length, the tokens of the longest sequence"
            )
        return host.prefix + host.grid[0] * host.grid[1]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        gated = {"gamma": 0.0, "gate": "conditional_per_token"}
        return [{}, {**gated, "predictor": "mlp"}, {**gated, "init": 0.25}]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"gamma": 0.0}
