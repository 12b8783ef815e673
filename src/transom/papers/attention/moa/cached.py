"""A layer of the cache of transformers that keeps a ragged cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from transom.errors import TokensError
from transom.papers.attention.moa.cache import RaggedCache


class RaggedLayer(CacheLayerMixin):
    """Takes the place of a layer of a DynamicCache once the prompt is read.

    What transformers hands over is only laid ready; :meth:`attend`, which the fitted method calls
    right after, writes it and attends. Plain attention gets keys of no width from here, so that it
    fails instead of silently missing what is in the cache.

    Attributes:
        ragged: the cache, its heads ordered so that equal sizes are neighbours.
        seen: tokens that came so far, padding included.
        keys, values: (B, Σ sizes, d), head after head.
    """

    is_compileable = False
    is_sliding = False
    is_initialized = True

    def __init__(self, ragged: RaggedCache, order: Sequence[int], seen: int) -> None:
        self.ragged, self.order, self.seen = ragged, list(order), seen
        self.inverse = sorted(range(len(self.order)), key=self.order.__getitem__)
        self.fresh: tuple[Tensor, Tensor] | None = None
        self.keys, self.values = ragged.k, ragged.v

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing is left to do: the prompt is in."""

    def reset(self) -> NoReturn:
        """Refused: sizes belong to one prompt."""
        raise TokensError("a cache with windows is made for one prompt; begin with a new cache")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Lay the next keys and values (B, heads, n, d) ready."""
        if self.fresh is not None:
            raise TokensError(
                "this cache was filled with MoA fitted, but nothing reads its windows now; begin "
                "with a new cache"
            )
        self.fresh = (key_states, value_states)
        self.seen += key_states.shape[2]
        return key_states[..., :0], value_states[..., :0]

    def attend(self, q: Tensor, scale: float, real: Tensor | None) -> Tensor:
        """Each new token is written and then attends to what its heads have kept.

        Args:
            q: (B, H, n, d).
            scale: of the logits.
            real: (B, n) bool, False for padding; None without any.

        Returns:
            (B, H, n, d).
        """
        if self.fresh is None:
            raise TokensError("no new keys came into this cache; its layer was called twice")
        heads = len(self.order)
        k, v = (_ordered(_spread(x, heads), self.order) for x in self.fresh)
        self.fresh = None
        grouped = _ordered(q.unflatten(1, (heads, -1)), self.order).flatten(1, 2)
        out = []
        for i in range(q.shape[2]):
            some = slice(i, i + 1)
            self.ragged.write(k[:, :, some], v[:, :, some], None if real is None else real[:, some])
            out.append(self.ragged.attend(grouped[:, :, some], scale))
        y = out[0] if len(out) == 1 else torch.cat(out, 2)
        return _ordered(y.unflatten(1, (heads, -1)), self.inverse).flatten(1, 2)

    def get_seq_length(self, *args: object) -> int:
        """Tokens that came so far."""
        return self.seen

    def get_mask_sizes(self, query: int | Tensor) -> tuple[int, int]:
        """Length and offset of the keys a mask is made for."""
        return self.seen + (query if isinstance(query, int) else query.shape[0]), 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    get_max_cache_shape = get_max_length

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Go on with other beams."""
        self.ragged.select(beam_idx.to(self.ragged.k.device))
        self.keys, self.values = self.ragged.k, self.ragged.v

    batch_select_indices = reorder_cache

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every text so many times."""
        texts = torch.arange(len(self.ragged.k), device=self.ragged.k.device)
        self.reorder_cache(texts.repeat_interleave(repeats))

    def crop(self, *args: object) -> NoReturn:
        """Refused: what a window has overwritten cannot come back."""
        raise TokensError(
            "tokens cannot be taken back out of a cache with windows, as assisted generation does; "
            "remove MoA, or generate without an assistant"
        )


def _spread(x: Tensor, heads: int) -> Tensor:
    """(B, h, ...) with each head so often that there are `heads`."""
    times = heads // x.shape[1]
    return x if times == 1 else x.repeat_interleave(times, 1)


def _ordered(x: Tensor, order: Sequence[int]) -> Tensor:
    return x if list(order) == sorted(order) else x[:, list(order)]
