"""Sparsifiner: predict at low rank which keys a query needs, and attend to those alone.

    c = softmax_K(H^-1/2 · (q W_q) ((k W_k)ᵀ P)ᵀ),  Â = c · |B|ᵀ,  mask = top keys of each row of Â

q, k: (B, H, N, d); W_q, W_k: (d, r) with bias; P, B: (N, K) parameters of a layer, shared by its
heads; c: (B, H, N - 1, K), of which the 8 largest stay; small entries of B become 0. Each patch
attends to ceil(0.25 N) keys, the class token (any prefix token) to all.

Source: Wei et al., Sparsifiner: Learning Sparse Instance-Dependent Attention for Efficient Vision
Transformers, CVPR 2023; official code lim142857/Sparsifiner@9a11e26 (MIT; this file is our own).

As a method the predictor works between the projections of a host, which keep their names and
weights; it has to be trained (phase 1 fits Â to the attention of the untouched host, which goes on
attending to everything; then the choice is in use). The backbones are whole classifiers with the
official names, and with token pruning: the class token's attention keeps ceil(rate · T) of all T
patches, the features of the others become 0.

Nothing passes through the choice to the predictor: without a reconstruction loss it is frozen. Its
parameters belong to places, so other image sizes are refused. With pruned tokens the number of keys
is at most that of the patches left in the same image (the official code takes the first image of
the batch and remembers it).

Two paths compute the same attention: "masked" in one fused kernel, "gathered" from copies of the
chosen keys (on CPUs the faster one where a query has less than about 1 key in 24). Beyond 1,024
tokens, outside of training, both work a few queries at a time, so that memory is not that of all
pairs of each head (and hooks on the predictor see nothing). Making the prediction is quadratic in
N as well; on a CPU it takes longer than fused dense attention at all
sizes tried (197 to 4,097 tokens), so there the connections are sparse but nothing is faster.

Checked: goldens of the attention (top-k, thresholds, phase 1), both models and the losses; both
paths against each other. Not reproduced: ImageNet accuracies. Distillation of tokens compares what
leaves the last norm where the host has one before its head, else what leaves its last block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.ops import attention
from transom.papers.attention.sparsifiner.loss import losses
from transom.papers.attention.sparsifiner.model import BACKBONES, SparseAttention
from transom.papers.attention.sparsifiner.predictor import (
    Budget,
    MaskPredictor,
    Path,
    Score,
    attend,
    predicted,
)
from transom.papers.attention.sparsifiner.training import Phases
from transom.registry import Method, Offer, Training
from transom.slots import Fill
from transom.tokens import Record

__all__ = ["BACKBONES", "Sparsifiner"]


LONG = 1024  # tokens; beyond, predictions are made a few queries at a time


class PredictedAttention(nn.Module):
    """Attention operator: over predicted connections, between a host's own projections.

    Attributes:
        predictor: of this block.
        path: of the attention.
    """

    def __init__(self, predictor: MaskPredictor, path: Path) -> None:
        super().__init__()
        self.predictor, self.path = predictor, path

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
    ) -> Tensor:
        """Heads (B, H, N, d) from q, k, v (B, H, N, d)."""
        assert record is not None
        prefix, live = record.layout.prefix, record.valid
        path, budget = self.path, self.predictor.budget
        long = q.shape[2] > LONG and not self.training
        if long and live is None and budget.score == "topk":
            return predicted(
                self.predictor, q, k, v, scale=scale, bias=bias, prefix=prefix, path=path
            )
        found = self.predictor(q, k, live, prefix, mask=False)
        if self.predictor.phase1:
            return attention.attend(q, k, v, bias, scale=scale)
        y = attend(q, k, v, found, scale=scale, bias=bias, prefix=prefix, path=path)
        if self.training:
            # only further losses train the predictor, yet it takes part in every backward pass,
            # or training on several processes would wait for it
            y = y + (0 * found.approx.sum()).to(y.dtype)
        return y


@dataclass(frozen=True)
class Sparsifiner(Method):
    """Predicted sparse connections in every attention.

    Attributes:
        keep_rate: part of all keys that a patch attends to.
        reduce_n: tokens over the rank of the prediction.
        reduce_c: width of a head over the width in which it is made.
        tied: one map for reducing the keys and for the basis.
        coef_topk: coefficients kept of each query; None uses coef_threshold instead.
        coef_threshold: coefficients up to this become 0.
        basis_threshold: entries of the basis up to this become 0.
        score: keep the best keys ("topk"), or those above score_threshold ("threshold").
        score_threshold: of the approximate attention.
        path: "masked", "gathered" (top-k only) or whichever is expected to be faster.
        seed: of the new parameters.
    """

    keep_rate: float = 0.25
    reduce_n: int = 6
    reduce_c: int = 2
    tied: bool = False
    coef_topk: int | None = 8
    coef_threshold: float = 0.0
    basis_threshold: float = 0.02
    score: Score = "topk"
    score_threshold: float = 0.001
    path: Path = "auto"
    seed: int = 0
    needs_grid: ClassVar[bool] = True
    needs_training = True

    def __post_init__(self) -> None:
        self._budget()
        if self.reduce_n < 1 or self.reduce_c < 1:
            raise SettingsError(
                f"reduce_n is {self.reduce_n} and reduce_c {self.reduce_c}; expected at least 1"
            )
        if self.path == "gathered" and self.score == "threshold":
            raise SettingsError(
                "path is 'gathered', but score='threshold' chooses another number of keys for each "
                "query; expected path 'masked' or 'auto'"
            )

    def _budget(self) -> Budget:
        return Budget(
            self.keep_rate,
            self.coef_topk,
            self.coef_threshold,
            self.basis_threshold,
            self.score,
            self.score_threshold,
        )

    def fit(self, host: Host) -> list[Fill]:
        assert host.grid is not None  # needs_grid
        tokens = host.prefix + host.grid[0] * host.grid[1]
        generator = torch.Generator().manual_seed(self.seed)
        fills = []
        for view in host.views:
            given = view.projections()
            if given is None:
                raise FitError(
                    f"sparsifiner predicts from queries and keys, but the attention of this "
                    f"{host.family} ({type(view.module).__name__}) does not tell how wide its "
                    "heads are"
                )
            predictor = MaskPredictor(
                given.q[0].shape[0] // given.heads,
                tokens,
                self.reduce_n,
                self.reduce_c,
                self.tied,
                self._budget(),
                generator,
            )
            fills.append(Fill(attention=PredictedAttention(predictor, self.path)))
        return fills

    def training(self, **options: Any) -> Training:
        """Two phases with the untouched host as teacher.

        Args:
            **options: see :class:`~transom.papers.attention.sparsifiner.training.Phases`.

        Raises:
            SettingsError: an option is unknown or out of range.
        """
        return Phases.of(options)

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"keep_rate": rate} for rate in (0.5, 0.25, 0.1)]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"keep_rate": 1.0}


OFFERS = (
    Offer("operator", "sparse-attention", SparseAttention),
    Offer("operator", "mask-predictor", MaskPredictor),
    Offer("objective", "sparsifiner-losses", losses),
)
