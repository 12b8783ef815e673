"""The language model over segments: pre-norm layers, each with a memory of its earlier input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.papers.attention.rcmha.layer import RelativeConvolutionalAttention


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
