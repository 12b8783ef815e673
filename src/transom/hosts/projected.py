"""The projections of a host's attention as modules of our own, for mixers that begin from them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transom.errors import FitError
from transom.projections import Affine, Projections
from transom.slots import BlockView


class Projected(nn.Module):
    """To queries, keys and values, and back.

    Args:
        given: what the host projects with; it is copied.

    Attributes:
        heads: number of them.
    """

    def __init__(self, given: Projections) -> None:
        super().__init__()
        self.heads = given.heads
        self.q, self.k, self.v = (_linear(one) for one in (given.q, given.k, given.v))
        self.out = _linear(given.out)

    def split(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, d) of normed tokens (B, N, D)."""
        q, k, v = (
            linear(h).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear in (self.q, self.k, self.v)
        )
        return q, k, v

    def join(self, y: Tensor) -> Tensor:
        """Tokens (B, N, D) of heads (B, H, N, d)."""
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


def _linear(given: Affine) -> nn.Linear:
    weight, bias = given
    made = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    made = made.to_empty(device=weight.device).to(weight.dtype)
    with torch.no_grad():
        made.weight.copy_(weight)
        if bias is not None:
            made.bias.copy_(bias)
    return made


def expect(view: BlockView, slug: str, instead: str) -> Projections:
    """The projections of a block.

    Args:
        view: the block.
        slug: of the method that begins from them.
        instead: what to do where there are none.

    Raises:
        FitError: the attention has not three plain linear ones.
    """
    given = view.projections()
    if given is None:
        raise FitError(
            f"{slug} begins from the host's projections, but the attention of this host has not "
            f"three plain linear ones; {instead}"
        )
    return given
