"""Attention heads that can output nothing: clipped softmax, and gates on the heads."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import SettingsError

Gate = Literal["none", "unconditional_per_head", "conditional_per_head", "conditional_per_token"]
Predictor = Literal["linear", "mlp", "mlp2", "all"]


def clipped_softmax(
    scores: Tensor, gamma: float = -0.025, zeta: float = 1.0, dim: int = -1
) -> Tensor:
    """clip((ζ - γ) softmax(scores) + γ, 0, 1), in single precision at least.

    Args:
        scores: logits, masks added.
        gamma: γ, at most 0.
        zeta: ζ, at least 1.
        dim: axis of the softmax.

    Returns:
        Weights in the dtype of the scores, which do not add up to 1. What is clipped passes no
        gradient.
    """
    wide = torch.promote_types(scores.dtype, torch.float32)
    p = scores.softmax(dim, dtype=wide)
    if gamma or zeta != 1:
        p = ((zeta - gamma) * p + gamma).clamp(0, 1)
    return p.to(scores.dtype)


def stretch(alpha: float | None, length: int | None, gamma: float) -> float:
    """γ from the strength α by the longest sequence there may be: -α/T; `gamma` without an α.

    Raises:
        SettingsError: α comes without a length.
    """
    if alpha is None:
        return gamma
    if length is None or length < 1:
        raise SettingsError(
            f"alpha is {alpha} and the longest sequence {length}; expected a length of at least 1, "
            "because γ is -alpha / length"
        )
    return -alpha / length


def gate_parameters(
    gate: Gate,
    predictor: Predictor,
    dim: int,
    heads: int,
    init: float = 0.5,
    std: float | None = None,
) -> Any:
    """What a gate learns, under the official names of `alpha`.

    Args:
        gate: what a gate depends on.
        predictor: its form, if it depends on anything; "all" reads all of a token, the others a
            head's own features, one predictor a head.
        dim: D.
        heads: H.
        init: π, the gate that linear predictors begin with on average.
        std: of the weights' normal distribution; None keeps the usual one.

    Returns:
        A parameter (H,), a list of H predictors, a linear map from D to H, or None.
    """
    if gate == "none":
        return None
    if gate == "unconditional_per_head":
        return nn.Parameter(torch.zeros(heads))
    if predictor == "all":
        made: nn.Module = _begin(nn.Linear(dim, heads), init, std)
        return made
    width = dim // heads
    if predictor == "linear":
        return nn.ModuleList([_begin(nn.Linear(width, 1), init, std) for _ in range(heads)])
    hidden = max(width // 4, 1) if predictor == "mlp" else width
    return nn.ModuleList(
        nn.Sequential(
            _begin(nn.Linear(width, hidden), None, std),
            nn.ReLU(),
            _begin(nn.Linear(hidden, 1), None, std),
        )
        for _ in range(heads)
    )


def _begin(linear: nn.Linear, init: float | None, std: float | None) -> nn.Linear:
    if init is not None:
        part = min(max(init, 1e-16), 1 - 1e-16)
        nn.init.constant_(linear.bias, math.log(part) - math.log1p(-part))
    if std is not None:
        nn.init.normal_(linear.weight, std=std)
    return linear


def gate_values(alpha: Any, x: Tensor, heads: int, gate: Gate) -> Tensor:
    """σ of the logits of a gate.

    Args:
        alpha: of :func:`gate_parameters`.
        x: (B, T, D), the input of the attention.
        heads: H.
        gate: what it depends on.

    Returns:
        (H, 1, 1), (B, H, 1, 1) for a gate per head, or (B, H, T, 1) for one per token; always the
        last where the predictor reads all features.
    """
    if isinstance(alpha, Tensor):
        return alpha.sigmoid()[:, None, None]
    if isinstance(alpha, nn.Linear):
        logits: Tensor = alpha(x).transpose(1, 2)[..., None]
        return logits.sigmoid()
    own = x.unflatten(-1, (heads, -1)).unbind(2)
    logits = torch.stack([one(h) for one, h in zip(alpha, own, strict=True)], 1)  # (B, H, T, 1)
    if gate == "conditional_per_head":
        logits = logits.mean(2, keepdim=True)
    return logits.sigmoid()


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    gamma: float,
    zeta: float = 1.0,
) -> Tensor:
    """Attention with a clipped softmax, which makes the matrix.

    Args:
        q, k, v: (B, H, N, d).
        bias: broadcastable to (B, H, N, N), added to the logits; None for none.
        scale: of the logits.
        gamma, zeta: of :func:`clipped_softmax`.
    """
    scores = (q * scale) @ k.mT
    return clipped_softmax(scores if bias is None else scores + bias, gamma, zeta) @ v


class QuantizableAttention(nn.Module):
    """The official attention of BERT ("bert", without a projection behind it) or OPT ("opt").

    Args:
        dim: D.
        heads: H.
        form: where the scale goes, how masked scores are bounded, and the names of the parts.
        gamma, zeta: of the clipped softmax; 0 and 1 for a plain one.
        alpha: strength of the clipping for sequences of any length, in place of gamma.
        max_length: T of the longest sequence, if alpha is given.
        gate, predictor, init: of :func:`gate_parameters`.
        finetune: begin near the plain attention: small weights of linear predictors, and gates
            times 1/π.
        skip: output zeros, an ablation (BERT only).
        dropout: probability on the attention weights.

    Raises:
        SettingsError: a setting does not fit another.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        form: Literal["bert", "opt"] = "bert",
        *,
        gamma: float = 0.0,
        zeta: float = 1.0,
        alpha: float | None = None,
        max_length: int | None = None,
        gate: Gate = "none",
        predictor: Predictor = "linear",
        init: float = 0.5,
        finetune: bool = False,
        skip: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise SettingsError(f"{heads} heads do not divide the width {dim}; expected a divisor")
        self.heads, self.form, self.gate, self.skip = heads, form, gate, skip
        self.gamma, self.zeta = stretch(alpha, max_length, gamma), zeta
        check_stretch(self.gamma, zeta)
        self.factor = 1 / init if finetune else 1.0
        self.dropout = nn.Dropout(dropout)
        self.names = ("query", "key", "value") if form == "bert" else ("q_proj", "k_proj", "v_proj")
        for name in self.names:
            self.add_module(name, nn.Linear(dim, dim))
        if form == "opt":
            self.out_proj = nn.Linear(dim, dim)
        std = (0.01 if form == "bert" else 0.001) if finetune else None
        self.alpha = gate_parameters(gate, predictor, dim, heads, init, std)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, head_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Attend.

        Args:
            x: (B, T, D).
            mask: (B, 1, 1 or T, T), added to the scores; None for none.
            head_mask: broadcastable to (B, H, T, T), factor of the weights; None for none.

        Returns:
            (B, T, D), the attention weights (B, H, T, T), and the gate or None.
        """
        q, k, v = (
            getattr(self, name)(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for name in self.names
        )
        scale = q.shape[-1] ** -0.5
        scores = (q @ k.mT) * scale if self.form == "bert" else (q * scale) @ k.mT
        if mask is not None:
            scores = scores + mask
            if self.form == "opt":
                scores = scores.clamp(min=torch.finfo(scores.dtype).min)
        probs = clipped_softmax(scores, self.gamma, self.zeta)
        context = self._weighted(probs, head_mask) @ v
        gate = None
        if self.gate != "none":
            gate = gate_values(self.alpha, x, self.heads, self.gate)
            context = context * (gate * self.factor)
        merged = context.transpose(1, 2).flatten(2)
        if self.skip and self.form == "bert":
            merged = torch.zeros_like(merged)
        return (self.out_proj(merged) if self.form == "opt" else merged), probs, gate

    def _weighted(self, probs: Tensor, head_mask: Tensor | None) -> Tensor:
        if head_mask is None:
            return self.dropout(probs)
        if self.form == "bert":
            return self.dropout(probs) * head_mask
        return self.dropout(probs * head_mask)


def check_stretch(gamma: float, zeta: float) -> None:
    """Refuse limits that do not stretch.

    Raises:
        SettingsError: γ is above 0 or ζ below 1.
    """
    if gamma > 0 or zeta < 1:
        raise SettingsError(
            f"the softmax is stretched to [{gamma}, {zeta}]; expected gamma of at most 0 and zeta "
            "of at least 1"
        )
