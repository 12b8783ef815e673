"""The convolution, attention with relative terms, and the official layer made of both."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.ops import relative


def convolve(x: Tensor, weight: Tensor, bias: Tensor, *, causal: bool = True) -> Tensor:
    """One filter a channel over the tokens of each head.

    Args:
        x: (B, H, N, d).
        weight: (d, 1, kernel).
        bias: (d,).
        causal: whether a token sees those before it (zeros before the first) or as many on
            either side.

    Returns:
        As x.
    """
    batch, heads, count, width = x.shape
    reach = weight.shape[-1] - 1
    sides = (reach, 0) if causal else (reach // 2, reach - reach // 2)
    z = F.pad(x.transpose(-1, -2).reshape(batch * heads, width, count), sides)
    out = F.conv1d(z, weight, bias, groups=width)
    return out.view(batch, heads, width, count).transpose(-1, -2)


class Filter(nn.Module):
    """The convolution of one projection, by its official name."""

    def __init__(self, width: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, kernel_size, groups=width)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        """(B, H, N, d) -> (B, H, N, d)."""
        return convolve(x, self.conv.weight, present(self.conv.bias), causal=causal)


def present(bias: Tensor | None) -> Tensor:
    """What types leave open and is there."""
    assert bias is not None
    return bias


class Projection(nn.Module):
    """A linear map (..., D) -> (..., H, d), by its official name."""

    def __init__(self, width: int, heads: int, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(width, width, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).unflatten(-1, (self.heads, -1))


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    extra: Tensor | None = None,
    positions: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Fused attention with relative terms.

    Args:
        q: (B, H, L, d).
        k, v: (B, H, T, d).
        scale: of all logits, positions included.
        extra: (H, d), u.
        positions: (B, H, L, T), what positions add to the logits, scaled already.
        bias: broadcastable to (B, H, L, T), added likewise: masks, sizes.
        dropout: probability on the attention weights.

    Returns:
        (B, H, L, d).
    """
    if positions is not None:
        bias = positions if bias is None else positions + bias
    q = q if extra is None else q + extra[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


def attend_along(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    table: Tensor,
    table_bias: Tensor,
    *,
    scale: float,
    extra: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    rows: int = 256,
) -> Tensor:
    """The same with tables of a sequence, some queries at a time.

    A few queries can need few more offsets than there are keys, all of them together twice as many;
    and what positions add is never there for all pairs at once, but in the graph of a backward
    pass.

    Args:
        q: (B, H, L, d), the last L of the places.
        k, v: (B, H, T, d).
        table: (2P, H, d), R.
        table_bias: (2P, H), β.
        scale: of all logits.
        extra: (H, d), u.
        bias: broadcastable to (B, H, L, T), added to the scaled logits.
        dropout: probability on the attention weights.
        rows: queries at a time.

    Returns:
        (B, H, L, d).
    """
    (count, keys), out = (q.shape[2], k.shape[2]), []
    for start in range(0, count, rows):
        some = q[:, :, start : start + rows]
        first = keys - count + start
        # scaled before the product, where there is less to scale
        added = relative.logits(some * scale, table, keys, table_bias * scale, first)
        own = bias if bias is None or bias.shape[-2] == 1 else bias[..., start : start + rows, :]
        out.append(
            attend(some, k, v, scale=scale, extra=extra, positions=added, bias=own, dropout=dropout)
        )
    return out[0] if len(out) == 1 else torch.cat(out, 2)


def reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    extra: Tensor,
    table: Tensor,
    table_bias: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """Twin of :func:`attend_along`: the equation at the top, pair by pair.

    Args:
        q: (B, H, L, d).
        k, v: (B, H, T, d).
        extra: (H, d), u.
        table: (2P, H, d), R.
        table_bias: (2P, H), β.
        mask: broadcastable to (B, H, L, T), True for what is seen.
        scale: of the logits.
    """
    count, keys, origin = q.shape[2], k.shape[2], len(table) // 2
    columns = []
    for i in range(count):
        row = origin + torch.arange(keys) - (keys - count) - i
        content = torch.einsum("bhd,bhtd->bht", q[:, :, i] + extra, k)
        place = torch.einsum("bhd,thd->bht", q[:, :, i], table[row]) + table_bias[row].T
        columns.append((content + place) * scale)
    logits = torch.stack(columns, 2)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf)
    return logits.softmax(-1) @ v


class RelativeConvolutionalAttention(nn.Module):
    """The official attention: sequence first, memory in front of the keys.

    Args:
        heads: H.
        d_model: D.
        positions: P; the tables have 2P rows. 4096 in the official code.
        kernel_size: of the convolutions.
        dropout: probability on the attention weights.
        convolution: off leaves plain projections.
        positional: off leaves out u, R and β.
        sees_memory: whether the query convolution begins in the memory (ours).
    """

    def __init__(
        self,
        heads: int,
        d_model: int,
        positions: int = 4096,
        kernel_size: int = 3,
        dropout: float = 0.0,
        *,
        convolution: bool = True,
        positional: bool = True,
        sees_memory: bool = False,
    ) -> None:
        super().__init__()
        if d_model % heads:
            raise SettingsError(f"d_model is {d_model}; expected a multiple of {heads} heads")
        if kernel_size < 1 or positions < 1:
            raise SettingsError(
                f"kernel_size is {kernel_size} and positions is {positions}; expected 1 or more"
            )
        width = d_model // heads
        self.scale = width**-0.5
        self.reach = kernel_size - 1 if convolution and sees_memory else 0

        def projection(bias: bool) -> nn.Sequential:
            filters = [Filter(width, kernel_size)] if convolution else []
            return nn.Sequential(Projection(d_model, heads, bias), *filters)

        self.key_pos_embeddings: nn.Parameter | None
        self.key_pos_bias: nn.Parameter | None
        self.query_pos_bias: nn.Parameter | None
        self.query, self.key = projection(False), projection(False)
        self.value = projection(True)
        self.output = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)
        shapes = {
            "key_pos_embeddings": (2 * positions, heads, width),
            "key_pos_bias": (2 * positions, heads),
            "query_pos_bias": (heads, width),
        }
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)) if positional else None)

    def forward(
        self, x: Tensor, memory: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """Attend from a segment to itself and to what came before.

        Args:
            x: (L, B, D).
            memory: (M, B, D), treated as x was; None for none.
            mask: (L, T, 1 or B), nonzero where query i sees key j.

        Returns:
            (L, B, D).
        """
        context = x if memory is None else torch.cat([memory, x])
        length, keys = len(x), len(context)
        history = min(self.reach, keys - length)
        q = self._heads(self.query, context[keys - length - history :])[:, :, history:]
        k, v = self._heads(self.key, context), self._heads(self.value, context)
        bias = None
        if mask is not None:
            seen = mask.permute(2, 0, 1)[:, None] != 0  # (1 or B, 1, L, T)
            bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -math.inf)
        dropout = self.dropout.p if self.training else 0.0
        if self.key_pos_embeddings is None:
            out = attend(q, k, v, scale=self.scale, bias=bias, dropout=dropout)
        else:
            out = attend_along(
                q,
                k,
                v,
                self.key_pos_embeddings,
                present(self.key_pos_bias),
                scale=self.scale,
                extra=self.query_pos_bias,
                bias=bias,
                dropout=dropout,
            )
        return self.output(out.permute(2, 0, 1, 3).flatten(2))

    def _heads(self, projection: nn.Sequential, x: Tensor) -> Tensor:
        """(N, B, D) -> (B, H, N, d)."""
        linear, *filters = projection
        out = linear(x).permute(1, 2, 0, 3)
        for conv in filters:
            out = conv(out)
        return out
