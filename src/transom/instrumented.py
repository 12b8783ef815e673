"""One attention of a decoder that several methods correct at once, each at a stage of its own.

    z = q kᵀ scale + bias                          (B, H, N, keys)
    z_last  <- last(z_last)                        logits of the last query
    a = softmax(z);   a <- probabilities(a)
    o = a v;          o <- heads(o)                what each head says, (B, H, N, d)

Corrections of different stages share one block and can be taken out one by one; the order in which
they were fitted does not matter, because the stages have an order. Only what a correction needs is
written out: without one of the probabilities the fused path stays, and a correction of the last
query writes out one row.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from transom.ops import attention

if TYPE_CHECKING:
    from transom.slots import Ask
    from transom.tokens import Record


class Correction(Protocol):
    """What happens at one stage."""

    def applies(self, ask: Ask | None) -> bool:
        """Whether there is anything to do in this call."""

    def __call__(self, x: Tensor, ask: Ask | None) -> Tensor:
        """What goes on in the place of x, in its shape."""


@dataclass(frozen=True)
class Instrumented:
    """Attention operator with up to three corrections.

    Attributes:
        last: of the logits of the last query, (B, H, 1, keys).
        probabilities: of all of them, (B, H, N, keys); asked for, it costs the matrix.
        heads: of their outputs before the output projection, (B, H, N, d).
    """

    last: Correction | None = None
    probabilities: Correction | None = None
    heads: Correction | None = None

    def stages(self) -> set[str]:
        """Names of the stages that are taken."""
        return {f.name for f in fields(self) if getattr(self, f.name) is not None}

    def joined(self, other: Instrumented) -> Instrumented:
        """Both in one attention; their stages differ."""
        return Instrumented(
            **{f.name: getattr(self, f.name) or getattr(other, f.name) for f in fields(self)}
        )

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None = None,
        ask: Ask | None = None,
    ) -> Tensor:
        """(B, H, N, d) from queries (B, H, N, d), keys and values (B, H, keys, d)."""
        last, weigh, heads = (
            edit if edit is not None and edit.applies(ask) else None
            for edit in (self.last, self.probabilities, self.heads)
        )
        row = None
        if last is not None:
            logits = (q[:, :, -1:] @ k.mT) * scale
            if bias is not None:
                logits = logits + (bias if bias.shape[-2] == 1 else bias[:, :, -1:])
            row = last(logits, ask).softmax(-1)
        if weigh is None:
            out = attention.attend(q, k, v, bias, scale=scale)
            if row is not None:
                out = torch.cat([out[:, :, :-1], row @ v], 2)
        else:
            a = attention.probabilities(q, k, bias, scale)
            if row is not None:
                a = torch.cat([a[:, :, :-1], row], 2)
            out = weigh(a, ask).to(v.dtype) @ v
        return out if heads is None else heads(out, ask)
