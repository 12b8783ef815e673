"""RCMHA: attention with relative positions and a short convolution behind q, k and v.

    q = conv(W_q x),   k = conv(W_k [m, x]),   v = conv(W_v [m, x] + b_v)
    conv(z)_t = b + w_0 z_{t-2} + w_1 z_{t-1} + w_2 z_t       per channel of a head, all heads alike
    logit_ij = ((q_i + u) · k_j + q_i · R[P + j - M - i] + β[P + j - M - i]) / sqrt(d)

x: (L, B, D), m: (M, B, D) the memory, what a layer got one segment before; T = M + L keys. R
(2P, H, d) and β (2P, H) are tables by offset, u (H, d) one more bias of the query; the last two
terms of q do not have it. The query convolution begins at the segment and does not see the memory.

Source: Hermansh et al., RCMHA: Relative Convolutional Multi-Head Attention for Natural Language
Modelling, 2023; official code hermansh-id/rcmha@87df49b (this file is our own, from the equations).
The script released there builds its model without the convolution, so it trains the baseline; the
class of the paper is the one followed here. Official names of parameters throughout.

What the relative terms add is one product with the table and a shift of it in memory
(:mod:`transom.ops.relative`); the rest is fused attention with that as a mask. Ours beside the
paper: offsets beyond the table get its end rows (the official class fails); `sees_memory` lets the
query convolution look into the memory, and then two segments are the joined one exactly; either
part can be switched off, so that MHA, MDHA, RMHA and RCMHA are four corners of one class.

As a method on encoders it convolves q, k and v of the host over the patches, symmetrically, and
adds tables over the sequence or over rows and columns of the grid (ours). It begins as the host
itself (w the identity, tables and u zero), or as the official code does (w random). Checked
against goldens of the official class and model and against a lookup of every pair. The results of
the paper (one small data set, no spread) were not reproduced.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import FitError, SettingsError, TokensError
from transom.hosts.base import Host
from transom.hosts.heads import head_shape
from transom.ops import relative
from transom.registry import Method, Offer
from transom.slots import Fill
from transom.tokens import Record

Positions = Literal["sequence", "grid"]

_log = logging.getLogger(__name__)


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
        return convolve(x, self.conv.weight, _present(self.conv.bias), causal=causal)


def _present(bias: Tensor | None) -> Tensor:
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
        positions: (B, H, L, T), what positions add to the logits before the scale.
        bias: broadcastable to (B, H, L, T), added behind the scale: masks, sizes.
        dropout: probability on the attention weights.

    Returns:
        (B, H, L, d).
    """
    if positions is not None:
        positions = positions * scale
        bias = positions if bias is None else positions + bias
    q = q if extra is None else q + extra[:, None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale)


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
    """Twin of :func:`attend` with the tables of a sequence: the equation at the top, pair by pair.

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
        positions = None
        if self.key_pos_embeddings is not None:
            positions = relative.logits(q, self.key_pos_embeddings, keys, self.key_pos_bias)
        bias = None
        if mask is not None:
            seen = mask.permute(2, 0, 1)[:, None] != 0  # (1 or B, 1, L, T)
            bias = torch.zeros_like(seen, dtype=q.dtype).masked_fill(~seen, -math.inf)
        out = attend(
            q,
            k,
            v,
            scale=self.scale,
            extra=self.query_pos_bias,
            positions=positions,
            bias=bias,
            dropout=self.dropout.p if self.training else 0.0,
        )
        return self.output(out.permute(2, 0, 1, 3).flatten(2))

    def _heads(self, projection: nn.Sequential, x: Tensor) -> Tensor:
        """(N, B, D) -> (B, H, N, d)."""
        linear, *filters = projection
        out = linear(x).permute(1, 2, 0, 3)
        for conv in filters:
            out = conv(out)
        return out


class FeedForward(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.layer1, self.layer2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer2(self.dropout(self.layer1(x).relu()))


class Layer(nn.Module):
    """Pre-norm layer; the memory goes through the norm of its input."""

    def __init__(
        self, attention: RelativeConvolutionalAttention, width: int, hidden: int, dropout: float
    ) -> None:
        super().__init__()
        self.self_attn = attention
        self.feed_forward = FeedForward(width, hidden, dropout)
        self.norm_self_attn, self.norm_ff = nn.LayerNorm(width), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, memory: Tensor | None, mask: Tensor) -> Tensor:
        """(L, B, D) -> (L, B, D)."""
        before = None if memory is None else self.norm_self_attn(memory)
        x = x + self.dropout(self.self_attn(self.norm_self_attn(x), before, mask))
        return x + self.dropout(self.feed_forward(self.norm_ff(x)))


class RelativeTransformer(nn.Module):
    """Layers with memory and the last norm."""

    def __init__(self, layers: Sequence[Layer], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor]:
        """Run the layers.

        Args:
            x: (L, B, D).
            memory: (layers, M, B, D) or None.

        Returns:
            (L, B, D) and what each layer got, (layers, L, B, D), detached.
        """
        length = len(x)
        before = 0 if memory is None else memory.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        mask = F.pad(causal, (before, 0), value=True)[..., None]
        got = []
        for i, layer in enumerate(self.layers):
            got.append(x.detach())
            x = layer(x, None if memory is None else memory[i], mask)
        return self.norm(x), torch.stack(got)


class RelativeLanguageModel(nn.Module):
    """Causal language model over segments.

    Args:
        n_vocab: number of tokens known.
        d_model: D.
        heads: H.
        d_ff: hidden width of the feed-forward network.
        n_layers: number of layers.
        positions: P of every layer.
        kernel_size: of the convolutions.
        dropout: of attention, feed-forward and both branches.
        convolution: see :class:`RelativeConvolutionalAttention`.
        positional: likewise.
        sees_memory: likewise.
    """

    def __init__(
        self,
        n_vocab: int,
        d_model: int = 128,
        heads: int = 8,
        d_ff: int = 256,
        n_layers: int = 6,
        positions: int = 4096,
        kernel_size: int = 3,
        dropout: float = 0.0,
        *,
        convolution: bool = True,
        positional: bool = True,
        sees_memory: bool = False,
    ) -> None:
        super().__init__()
        self.src_embed = nn.Embedding(n_vocab, d_model)
        self.generator = nn.Linear(d_model, n_vocab)
        layers = []
        for _ in range(n_layers):
            attention = RelativeConvolutionalAttention(
                heads,
                d_model,
                positions,
                kernel_size,
                dropout,
                convolution=convolution,
                positional=positional,
                sees_memory=sees_memory,
            )
            layers.append(Layer(attention, d_model, d_ff, dropout))
        self.transformer = RelativeTransformer(layers, d_model)

    def forward(self, ids: Tensor, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the next token at every place.

        Args:
            ids: (L, B).
            memory: (n_layers, M, B, D) of earlier segments; None for none.

        Returns:
            (L, B, n_vocab), and (n_layers, L, B, D) to remember, detached.
        """
        x, got = self.transformer(self.src_embed(ids), memory)
        return self.generator(x), got


def remember(old: Tensor | None, new: Tensor, length: int) -> Tensor:
    """The memory of the next segment: the last `length` rows of old (..., M, B, D) and new."""
    joined = new if old is None else torch.cat([old, new], -3)
    return joined[..., max(0, joined.shape[-3] - length) :, :, :]


class ConvolvedAttention(nn.Module):
    """Attention operator between a host's projections: convolutions, then relative logits."""

    def __init__(
        self, method: RCMHA, host: Host, shape: tuple[int, int], rng: torch.Generator
    ) -> None:
        super().__init__()
        heads, width = shape
        self.positions: Positions = method.positions
        self.relative = method.relative
        self.filters: nn.ModuleList | None = None
        if method.convolution:
            self.filters = nn.ModuleList(Filter(width, method.kernel_size) for _ in range(3))
            for one in self.filters.modules():
                if isinstance(one, nn.Conv1d):
                    _initialise(one, method.init, rng)
        if self.relative:
            self.query_pos_bias = nn.Parameter(torch.zeros(heads, width))
            sizes = _reaches(method, host)
            tables = (nn.Parameter(torch.zeros(2 * p, heads, width)) for p in sizes)
            self.key_pos_embeddings = nn.ParameterList(tables)
            biases = (nn.Parameter(torch.zeros(2 * p, heads)) for p in sizes)
            self.key_pos_bias = nn.ParameterList(biases)

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
        count = q.shape[2]
        if count != record.layout.count or record.size is not None:
            raise TokensError(
                f"rcmha needs the tokens in their original places, but this block has {count} "
                f"where {record.layout.count} were expected; fit it without a method that "
                "reduces tokens, or in the blocks before one"
            )
        prefix = record.layout.prefix
        if self.filters is not None:
            q, k, v = (
                self._convolved(one, x, prefix, record.valid)
                for one, x in zip(self.filters, (q, k, v), strict=True)
            )
        if not self.relative:
            return attend(q, k, v, scale=scale, bias=bias)
        added = self._logits(q, prefix, record.layout.grid)
        return attend(q, k, v, scale=scale, extra=self.query_pos_bias, positions=added, bias=bias)

    def _convolved(self, one: nn.Module, x: Tensor, prefix: int, valid: Tensor | None) -> Tensor:
        if valid is not None:
            x = x * valid[:, None, :, None]  # padding is as good as the end
        return torch.cat([x[:, :, :prefix], one(x[:, :, prefix:], causal=False)], 2)

    def _logits(self, q: Tensor, prefix: int, grid: tuple[int, int] | None) -> Tensor:
        tables, biases = self.key_pos_embeddings, self.key_pos_bias
        if self.positions == "sequence":
            return relative.logits(q, tables[0], q.shape[2], biases[0])
        if grid is None:
            raise TokensError(
                f"rcmha with positions='grid' got {q.shape[2]} tokens, which are not those of the "
                "host's own image size; call it with such images, or use positions='sequence'"
            )
        both = (biases[0], biases[1])
        inside = relative.grid_logits(q[:, :, prefix:], tables[0], tables[1], grid, both)
        return F.pad(inside, (prefix, 0, prefix, 0))  # the prefix has no place on the grid


def _reaches(method: RCMHA, host: Host) -> tuple[int, ...]:
    """P of each table."""
    if method.positions == "sequence":
        if method.reach is None and host.grid is None:
            raise FitError(
                f"rcmha does not know how many tokens this {host.family} has; give the reach of "
                "its table, for example reach=512"
            )
        grid = host.grid or (0, 0)
        return (method.reach or host.prefix + grid[0] * grid[1],)
    if host.grid is None:
        raise FitError(
            f"rcmha with positions='grid' needs the patches on a known grid, and this "
            f"{host.family} has none; use positions='sequence'"
        )
    return tuple(method.reach or side for side in host.grid)


def _initialise(conv: nn.Conv1d, init: str, rng: torch.Generator) -> None:
    """The official random start, or a filter that changes nothing."""
    size = conv.kernel_size[0]
    weight, bias = torch.zeros_like(conv.weight), torch.zeros_like(_present(conv.bias))
    if init == "official":
        limit = size**-0.5
        weight.uniform_(-limit, limit, generator=rng)
        bias.uniform_(-limit, limit, generator=rng)
    else:
        weight[:, :, (size - 1) // 2] = 1
    conv.load_state_dict({"weight": weight, "bias": bias})


@dataclass(frozen=True)
class RCMHA(Method):
    """Convolved queries, keys and values with relative positions, in encoders.

    Attributes:
        convolution: off leaves q, k and v as they are.
        relative: off leaves out everything about positions.
        kernel_size: of the convolutions over the patches, symmetric; prefix tokens are left alone.
        positions: one table over the sequence, prefix included, or one over the rows and one over
            the columns of the grid (ours).
        reach: P, largest distance with a row of its own; by default that of the host's own
            number of tokens, or of its grid.
        init: begin as the host itself, or with random filters as the official code does.
        seed: of these.
    """

    convolution: bool = True
    relative: bool = True
    kernel_size: int = 3
    positions: Positions = "sequence"
    reach: int | None = None
    init: Literal["identity", "official"] = "identity"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.kernel_size < 1:
            raise SettingsError(f"kernel_size is {self.kernel_size}; expected at least 1")
        if self.reach is not None and self.reach < 1:
            raise SettingsError(f"reach is {self.reach}; expected at least 1")
        if not (self.convolution or self.relative):
            raise SettingsError(
                "convolution and relative are both off, which leaves the host's own attention; "
                "switch one of them on"
            )

    def fit(self, host: Host) -> list[Fill]:
        rng = torch.Generator().manual_seed(self.seed)
        fills = []
        for i, view in enumerate(host.views):
            shape = head_shape(view)
            if shape is None or host.follows:
                raise FitError(
                    f"rcmha needs plain projections to q, k and v and positions outside of the "
                    f"attention; block {i} of this {host.family} has others"
                )
            fills.append(Fill(attention=ConvolvedAttention(self, host, shape, rng)))
        if self.init == "official" and self.convolution:
            _log.warning("rcmha begins with random convolutions: train the model before use")
        return fills

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{}, {"relative": False, "init": "official"}, {"init": "official"}]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {}


OFFERS = (
    Offer("operator", "relative-convolutional-attention", RelativeConvolutionalAttention),
    Offer("pipeline", "relative-language-model", RelativeLanguageModel),
)
