"""Unified Normalization: batch statistics, smoothed, that fold away after training.

At inference, per channel c of x (B, N, C),

    y = γ · x / √(ρ + ε) + β,        ρ the running second moment (no mean is subtracted)

which is a scale and a shift, so it goes into the linear map behind it (:func:`transom.fold`). Plain
batch statistics make transformers collapse in training; here they are smoothed over a window:

    q   = mean of x² over batch and tokens        σ² = geometric mean of the last P_f of them
    z   = x / √(σ² + ε)                           y  = γ z + β,     ρ ← α ρ + (1-α) σ²
    g   = g_y · γ · r                             r  = clamp(√(σ²+ε) / √(ρ+ε), 1/5, 5)
    m   = mean of the last P_b of mean(g · z)     ψ  ← α ψ + (1-α) m
    g_x = (g - ψ z) / √(σ² + ε)

No smoothing (σ² = q, m the newest) in the first steps, and none in a step whose window holds an
outlier: somewhere arithmetic minus geometric mean exceeds P_f · var(√window). Such a step puts ρ in
the place of its q, ψ in the place of its m, and is counted. r is 1 until step max(1000, warm-up).

Source: Yang et al., Unified Normalization for Accelerating and Stabilizing Transformers, ACM MM
2022, sec. 3; official code hikvision-research/Unified-Normalization@0ce9bf2 (Apache-2.0; this
file is our own). Its quirks are kept: the gradient of β is not scaled by r while that of γ is; a
padding mask counts in q alone; from the first step on ψ is what is subtracted, so the backward
pass is not the derivative of the forward pass; with a warm-up shorter than the window the empty
rows make the outlier test fire.

Checked against golden cases of the official layer (inference, the first steps, late steps with an
outlier) in output, gradients and every buffer. The published networks (T2T-ViT-14, translation)
were not trained here. Statistics are those of one device.

The backbone is T2T-ViT-14 with every norm replaced, those of the tokens-to-token module and the
last one included; on a host the norms of the blocks are. Its parameters have the official names but
for `tokens_to_token`, which is timm's `patch_embed` here (:func:`convert`). Of the paper's network
the file with its blocks is not in the official repository; they are those of T2T-ViT.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.papers.compression.unified_norm import t2t  # noqa: F401 - registers the backbone
from transom.papers.compression.unified_norm.norm import UnifiedNormLayer
from transom.registry import Backbone, Method
from transom.slots import BlockView, Fill

__all__ = ["BACKBONES", "UnifiedNorm", "UnifiedNormLayer", "convert"]

# as published for T2T-ViT-14; the norm has as many parameters as the one it replaces
BACKBONES = (Backbone("T2t_vit_14_all_un1d", params=21.5, gmacs=4.8),)


@dataclass(frozen=True)
class UnifiedNorm(Method):
    """Unified Normalization in place of the norms of a host's blocks.

    Attributes:
        window_size: P_f and P_b, or one number for both.
        warmup_iters: steps without smoothing.
        outlier_filtration: whether windows are tested for outliers (on for images, off for
            translation in the paper).
        eps: ε.
        momentum: α.
    """

    window_size: int | tuple[int, int] = 4
    warmup_iters: int = 4000
    outlier_filtration: bool = True
    eps: float = 1e-5
    momentum: float = 0.9
    needs_training = True

    def __post_init__(self) -> None:
        given = self.window_size
        sizes = (given,) if isinstance(given, int) else given
        if min(sizes) < 1:
            raise SettingsError(f"window_size is {given!r}; expected batches, 1 or more")
        if self.warmup_iters < 0:
            raise SettingsError(f"warmup_iters is {self.warmup_iters}; expected 0 or more steps")
        if self.eps <= 0:
            raise SettingsError(f"eps is {self.eps}; expected a positive number")
        if not 0 <= self.momentum < 1:
            raise SettingsError(f"momentum is {self.momentum}; expected a number from 0, below 1")

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(norms=self._norms(host, view)) for view in host.views]

    def _norms(self, host: Host, view: BlockView) -> tuple[UnifiedNormLayer, UnifiedNormLayer]:
        own = view.part("norm1"), view.part("norm2")
        if own[0] is None or own[1] is None:
            raise FitError(
                "unified-norm replaces the norms in front of attention and ffn, but the blocks of "
                f"this {host.family} ({type(view.module).__name__}) have none there; hosts with "
                "pre-norm blocks, such as timm's vit_* and transformers' ViT, fit"
            )
        return self._norm(host.width, own[0]), self._norm(host.width, own[1])

    def _norm(self, width: int, own: Any) -> UnifiedNormLayer:
        """A norm that begins with the weight and bias of the host's own."""
        layer = UnifiedNormLayer(
            width,
            self.window_size,
            self.warmup_iters,
            self.outlier_filtration,
            self.eps,
            self.momentum,
        )
        for name in ("weight", "bias"):
            given = getattr(own, name, None)
            if isinstance(given, Tensor) and given.shape == (width,):
                layer.get_parameter(name).data.copy_(given)
        return layer

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"window_size": size} for size in (1, 2, 4)]


def convert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Official state dict to ours: the tokens-to-token module has timm's name."""
    old, new = "tokens_to_token.", "patch_embed."
    return {new + n.removeprefix(old) if n.startswith(old) else n: t for n, t in state.items()}
