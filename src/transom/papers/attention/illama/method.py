"""The steps from a ViT to a decoder, on a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.papers.attention.illama.attention import Form, rotary, rotate, soft_causal
from transom.papers.attention.illama.model import RmsNorm, SwiGLU, hidden_width
from transom.registry import Method
from transom.slots import BlockView, Fill
from transom.tokens import Record

Step = Literal["mask", "rope", "rmsnorm", "swiglu"]
STEPS: tuple[Step, ...] = ("mask", "rope", "rmsnorm", "swiglu")


@dataclass(frozen=True)
class Decode:
    """Attention operator: soft causal mask and rotary positions in the order of a decoder.

    Attributes:
        rate: of the soft mask.
        form: where the mask meets the softmax.
        last: whether the prefix comes behind the patches in that order, and so sees them all.
        base: of the rotary angles; None for no rotation.
    """

    rate: float
    form: Form
    last: bool
    base: float | None

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
    ) -> Tensor:
        ordered = self.last and (self.rate < 1 or self.base is not None)
        prefix = record.layout.prefix if record is not None and ordered else 0
        if prefix:
            q, k, v = (t.roll(-prefix, -2) for t in (q, k, v))
            if bias is not None:
                bias = bias.roll(-prefix, -1)
                bias = bias if bias.shape[-2] == 1 else bias.roll(-prefix, -2)
        if self.base is not None:
            table = rotary(q.shape[-2], q.shape[-1], self.base, q)
            q, k = rotate(q, table), rotate(k, table)
        y = soft_causal(q, k, v, self.rate, form=self.form, scale=scale, bias=bias)
        return y.roll(prefix, -2) if prefix else y


class GatedFfn(nn.Module):
    """SwiGLU in the slot `ffn`."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.mlp = SwiGLU(dim, hidden_width(dim))

    def forward(self, h: Tensor, record: Record) -> Tensor:
        """Features (B, N, D) from normed ones."""
        return self.mlp(h)


@dataclass(frozen=True)
class DecoderSteps(Method):
    """The steps of iLLaMA, each on its own or all together.

    Attributes:
        steps: which of them: "mask" the soft causal mask, "rope" rotary positions beside the
            host's own, "rmsnorm" in place of its norms (with their weights), "swiglu" in place
            of its ffn (new parameters).
        soft_mask_rate: 1 bidirectional, 0 causal; change it while training with transom.adjust.
        form: "after" masks behind the softmax, as the paper does; "before" is strictly causal.
        class_token: "last" lets the prefix see all patches; "first" leaves it where the host has
            it, so that a class token sees nothing but itself (what the paper shows to collapse).
        rope_base: of the rotary angles.
    """

    steps: tuple[Step, ...] = STEPS
    soft_mask_rate: float = 0.0
    form: Form = "after"
    class_token: Literal["last", "first"] = "last"
    rope_base: float = 10000.0
    needs_training = True

    def __post_init__(self) -> None:
        if not self.steps or len(set(self.steps)) < len(self.steps):
            raise SettingsError(
                f"steps is {self.steps}; expected one or more of {STEPS}, each once"
            )
        if not 0 <= self.soft_mask_rate <= 1:
            raise SettingsError(
                f"soft_mask_rate is {self.soft_mask_rate}; expected a number from 0 to 1"
            )
        if self.rope_base <= 0:
            raise SettingsError(f"rope_base is {self.rope_base}; expected a positive number")

    def fit(self, host: Host) -> list[Fill]:
        if "rope" in self.steps and host.follows:
            raise FitError(
                f"{host.architecture or host.family} turns its queries and keys by positions of "
                "its own; leave 'rope' out of steps"
            )
        return [self._fill(host, view) for view in host.views]

    def _fill(self, host: Host, view: BlockView) -> Fill:
        operator = None
        if "mask" in self.steps or "rope" in self.steps:
            rate = self.soft_mask_rate if "mask" in self.steps else 1.0
            base = self.rope_base if "rope" in self.steps else None
            if base is not None:
                _even(view, host.width)
            operator = Decode(rate, self.form, self.class_token == "last", base)
        norms: tuple[RmsNorm | None, RmsNorm | None] = (None, None)
        if "rmsnorm" in self.steps:
            norms = (_norm(host, view, "norm1"), _norm(host, view, "norm2"))
        ffn = None
        if "swiglu" in self.steps:
            ffn = GatedFfn(host.width)
        return Fill(attention=operator, norms=norms, ffn=ffn)

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [
            {"steps": ("mask",), "soft_mask_rate": 0.5},
            {"steps": ("mask",)},
            {"steps": ("mask", "rmsnorm")},
        ]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"steps": ("mask",), "soft_mask_rate": 1.0}


def _even(view: BlockView, width: int) -> None:
    given = view.projections()
    if given is not None and given.q[0].shape[0] // given.heads % 2:
        raise FitError(
            f"heads of width {given.q[0].shape[0] // given.heads} cannot be turned in pairs of "
            "channels; leave 'rope' out of steps"
        )


def _norm(host: Host, view: BlockView, name: Literal["norm1", "norm2"]) -> RmsNorm:
    own = view.part(name)
    weight = getattr(own, "weight", None)
    if own is None or (weight is not None and weight.shape != (host.width,)):
        raise FitError(
            f"{host.architecture or host.family} has no {name} over its {host.width} channels "
            "that could be replaced; leave 'rmsnorm' out of steps"
        )
    norm = RmsNorm(host.width, getattr(own, "eps", 1e-6))
    if isinstance(weight, Tensor):
        norm.to(weight)
        with torch.no_grad():
            norm.weight.copy_(weight)
    return norm
