"""The anchored tokenizer and the circular positions in a host."""

from __future__ import annotations

from torch import Tensor, nn

from transom.errors import TokensError
from transom.front import Embed
from transom.papers.attention.shift_equivariance.polyphase import anchor
from transom.papers.attention.shift_equivariance.vit import CircularPosition


class AnchoredTokenizer(nn.Module):
    """The host's patch embedding of the anchored image, and a norm if wanted.

    Args:
        width: D.
        norm: whether a LayerNorm (eps 1e-5) follows, as in the paper.
    """

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-5) if norm else nn.Identity()

    def forward(self, pixels: Tensor, embed: Embed, patch: tuple[int, int]) -> Tensor:
        """Pixels (B, C, H, W) -> patches as the host lays them out."""
        if pixels.dim() != 4:
            raise TokensError(
                f"anchoring got pixels of shape {tuple(pixels.shape)}; expected (B, C, H, W)"
            )
        return self.norm(embed(anchor(pixels, patch)))


def circular_position(width: int, zero: bool) -> CircularPosition:
    """Positions that begin as nothing, or with the weights that a convolution begins with."""
    made = CircularPosition(width)
    if zero:
        for parameter in made.parameters():
            nn.init.zeros_(parameter)
    return made
