"""Manhattan decay between the projections of a host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.ops.attention import attend
from transom.papers.attention.rmt.attention import Form, axis_mask, decays, grid_mask
from transom.registry import Method
from transom.slots import Fill
from transom.tokens import Record


@dataclass(frozen=True)
class Decay:
    """Attention operator: patches look at each other the less the further apart they are.

    Attributes:
        initial_value, heads_range: a and r of the decay.
        form: "full", or "decomposed" into rows and columns.
    """

    initial_value: float
    heads_range: float
    form: Form

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record,
    ) -> Tensor:
        """Attended values (B, H, N, d).

        Args:
            q, k, v: (B, H, N, d).
            bias: of the host, broadcastable to (B, H, N, N); in the decomposed form each pass
                takes what belongs to the pairs that meet in it.
            scale: of the logits.
            record: of the tokens.

        Raises:
            TokensError: the tokens are not those of a known grid.
        """
        prefix = record.layout.prefix
        height, width = record.as_map(q[:, 0])[1].shape[1:3]
        decay = decays(q.shape[1], self.initial_value, self.heads_range, q.device)
        if self.form == "full":
            patches = grid_mask(decay, height, width).to(q.dtype)
            mask = F.pad(patches, (prefix, 0, prefix, 0))[None]
            return attend(q, k, v, mask if bias is None else mask + bias, scale=scale)

        lead = None if bias is None else bias[:, :, :prefix]
        front = attend(q[:, :, :prefix], k, v, lead, scale=scale) if prefix else None
        pairs = None if bias is None else _pairs(bias, len(q), prefix, (height, width))
        always = k[:, :, :prefix], v[:, :, :prefix]
        q, k, v = (t[:, :, prefix:].unflatten(2, (height, width)) for t in (q, k, v))
        rows = axis_mask(decay, width).to(q.dtype)
        v = _along_rows(q, k, v, always, rows, pairs, scale)
        q, k, v = (t.transpose(2, 3) for t in (q, k, v))
        if pairs is not None:
            pairs = pairs[0].transpose(2, 3), pairs[1].permute(0, 1, 3, 2, 5, 4)
        columns = axis_mask(decay, height).to(q.dtype)
        out = _along_rows(q, k, v, always, columns, pairs, scale).transpose(2, 3).flatten(2, 3)
        return out if front is None else torch.cat([front, out], 2)


Pairs = tuple[Tensor, Tensor]


def _pairs(bias: Tensor, batch: int, prefix: int, grid: tuple[int, int]) -> Pairs:
    """A bias of the logits of patches: towards the prefix and towards each other.

    Returns:
        (B, H or 1, h, w, P) and (B, H or 1, h, w, h, w).
    """
    count = bias.shape[-1]
    rows = bias.expand(batch, -1, count, -1)[:, :, prefix:].unflatten(2, grid)
    return rows[..., :prefix], rows[..., prefix:].unflatten(-1, grid)


def _along_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    always: tuple[Tensor, Tensor],
    mask: Tensor,
    pairs: Pairs | None,
    scale: float,
) -> Tensor:
    """Attention of patches (B, H, h, w, d) to those of their row and to the prefix.

    Args:
        q, k, v: of the patches.
        always: keys and values (B, H, P, d) of the prefix.
        mask: (H, w, w) added to the logits between patches.
        pairs: what the host adds to the logits; None for nothing.
        scale: of the logits.
    """
    batch, height = q.shape[0], q.shape[2]
    prefix = always[0].shape[2]

    def items(t: Tensor) -> Tensor:
        return t.transpose(1, 2).flatten(0, 1)  # (B h, H, w, ...)

    if prefix:
        first, second = (t[:, :, None].expand(-1, -1, height, -1, -1) for t in always)
        k, v = torch.cat([first, k], 3), torch.cat([second, v], 3)
    bias = F.pad(mask, (prefix, 0))[None]
    if pairs is not None:
        near = pairs[1].diagonal(dim1=2, dim2=4).movedim(-1, 2)  # (B, H, h, w, w)
        bias = bias + items(torch.cat([pairs[0], near], -1))
    y = attend(items(q), items(k), items(v), bias, scale=scale)
    return y.unflatten(0, (batch, height)).transpose(1, 2)


@dataclass(frozen=True)
class ManhattanDecay(Method):
    """Manhattan decay in the attention of a host.

    It brings no parameters, but a host was trained without it: fine-tune it, or use a large
    `initial_value` to see what locality costs.

    Attributes:
        initial_value: a; the larger, the slower all heads decay.
        heads_range: r, how much slower the last heads decay than the first.
        form: "full" attention with the decay of both axes, or "decomposed" into attention along
            rows, then along columns.
    """

    initial_value: float = 2.0
    heads_range: float = 4.0
    form: Form = "full"

    def __post_init__(self) -> None:
        if self.initial_value <= 0:
            raise SettingsError(
                f"initial_value is {self.initial_value!r}; expected a number above 0, since a "
                "head decays by 1 - 2^-initial_value"
            )
        if self.heads_range < 0:
            raise SettingsError(f"heads_range is {self.heads_range!r}; expected at least 0")

    def fit(self, host: Host) -> list[Fill]:
        # windows have a grid of their own, which is known where they are cut
        if host.grid is None and not (host.modality == "image" and host.reads == "maps"):
            raise FitError(
                f"{self.slug} needs the patches on a known grid, and this {host.family} has none"
            )
        decay = Decay(self.initial_value, self.heads_range, self.form)
        return [Fill(attention=decay)] * host.depth

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"initial_value": 6.0}, {}, {"form": "decomposed"}]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"initial_value": 1000.0}
