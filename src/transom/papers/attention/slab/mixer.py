"""Simplified linear attention in place of a host's own."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transom.errors import FitError
from transom.papers.attention.slab.attention import depthwise, linear_attention, local
from transom.projections import Affine, Projections
from transom.slots import Ask


class HostLinearAttention(nn.Module):
    """Linear attention that begins with the projections of the host.

    Attributes:
        qkv, proj: linear maps.
        dwc: depth-wise convolution of the values of the patches, shared by the heads; it begins at
            0, so that nothing about a fitted host is random.
        positional_encoding: (1, N, C), added to the keys; prefix tokens have rows as well.
    """

    def __init__(
        self, given: Projections, prefix: int, grid: tuple[int, int], kernel_size: int
    ) -> None:
        """Build it.

        Args:
            given: the host's projections.
            prefix: tokens in front of the patches.
            grid: (h, w) of the patches.
            kernel_size: of the convolution.

        Raises:
            FitError: queries, keys and values have not the same width.
        """
        super().__init__()
        width = given.q[0].shape[0]
        if given.k[0].shape[0] != width or given.v[0].shape[0] != width:
            raise FitError(
                "slab makes attention linear whose queries, keys and values are equally wide; here "
                f"they have {width}, {given.k[0].shape[0]} and {given.v[0].shape[0]} channels; "
                "linear=False fits the norms alone"
            )
        self.num_heads = given.heads
        self.qkv = _linear(*_joined(given))
        self.proj = _linear(*given.out)
        self.dwc = depthwise(width // given.heads, kernel_size)
        nn.init.zeros_(self.dwc.weight)
        assert self.dwc.bias is not None
        nn.init.zeros_(self.dwc.bias)
        table = torch.zeros(1, prefix + grid[0] * grid[1], width)
        self.positional_encoding = nn.Parameter(table)

    def forward(self, h: Tensor, ask: Ask) -> Tensor:
        """Mixed tokens.

        Args:
            h: (B, N, D), normed.
            ask: `ask.bias` is added to the logits in softmax attention, so here its exponential
                weighs the features of each key: sizes count, padding does not.

        Returns:
            (B, N, D).

        Raises:
            TokensError: the tokens are not the patches of the host's own grid.
        """
        assert ask.record is not None
        prefix = ask.record.as_map(h)[0].shape[1]
        grid = ask.record.layout.grid
        assert grid is not None
        q, k, v = self.qkv(h).chunk(3, -1)
        k = k + self.positional_encoding
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        q, k = q.relu(), k.relu()
        if ask.bias is not None:
            k = k * ask.bias.exp().mT
        y = linear_attention(q, k, v).to(h.dtype)
        near = local(v[:, :, prefix:], grid, self.dwc).to(h.dtype)
        y = torch.cat([y[:, :, :prefix], y[:, :, prefix:] + near], 2)
        return self.proj(y.transpose(1, 2).flatten(2))


def _joined(given: Projections) -> Affine:
    """Queries, keys and values in one map; a bias that is missing is 0 if another is not."""
    parts = (given.q, given.k, given.v)
    weight = torch.cat([w for w, _ in parts])
    if all(bias is None for _, bias in parts):
        return weight, None
    return weight, torch.cat([w.new_zeros(len(w)) if b is None else b for w, b in parts])


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    return linear
