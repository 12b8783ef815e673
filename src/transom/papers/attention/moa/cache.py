"""Keys and values of heads that keep different numbers of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch
from torch import Tensor

from transom.errors import SettingsError
from transom.ops import attention


@dataclass(frozen=True)
class Group:
    """Neighbouring heads with equal caches.

    Attributes:
        heads: from the first to behind the last.
        size: tokens each keeps.
        sink: of these, the first tokens, which stay for ever.
        start: of the first head in the tensor of all heads.
    """

    heads: slice
    size: int
    sink: int
    start: int

    @property
    def count(self) -> int:
        """Number of heads."""
        return int(self.heads.stop - self.heads.start)

    def slots(self, places: Tensor) -> Tensor:
        """Where the tokens at these places of a text are written: the sink, then a circle."""
        around = self.sink + (places - self.sink) % (self.size - self.sink)
        return torch.where(places < self.sink, places, around)


class RaggedCache:
    """One layer: k and v are (B, Σ sizes, d), head after head.

    Heads keep their sink and a circle of the latest other tokens. Padding is not stored.

    Attributes:
        k, v: (B, Σ sizes, d).
        length: (B,) int64, tokens written so far, padding left out.
        groups: of the heads.

    Args:
        sizes: tokens each head keeps.
        sinks: of these, the first ones, which stay for ever.
        like: (B, ..., d), for number, width, type and device.
    """

    def __init__(self, sizes: Sequence[int], sinks: Sequence[int], like: Tensor) -> None:
        if len(sizes) != len(sinks) or any(
            not 0 <= sink < size for size, sink in zip(sizes, sinks, strict=True)
        ):
            raise SettingsError(
                f"caches of {list(sizes)} tokens with sinks of {list(sinks)}; expected a sink for "
                "each head that leaves room for at least one more token"
            )
        self.sizes, self.sinks = tuple(sizes), tuple(sinks)
        self.groups: list[Group] = []
        first = start = 0
        for (size, sink), heads in groupby(zip(sizes, sinks, strict=True)):
            count = len(list(heads))
            self.groups.append(Group(slice(first, first + count), size, sink, start))
            first, start = first + count, start + count * size
        self.k = like.new_zeros(like.shape[0], start, like.shape[-1])
        self.v = torch.zeros_like(self.k)
        self.length = torch.zeros(like.shape[0], dtype=torch.int64, device=like.device)
        self.full = False  # whether every slot of every text is in use

    @property
    def offsets(self) -> list[int]:
        """Where each head begins, and where the last one ends."""
        return [0, *accumulate(self.sizes)]

    @property
    def valid(self) -> Tensor:
        """(B, H) int64: slots in use."""
        return torch.minimum(self.length[:, None], self.length.new_tensor(self.sizes))

    @property
    def next_slot(self) -> Tensor:
        """(B, H) int64: where the next token will be written, in k and v."""
        found = [
            (group.slots(self.length)[:, None] + group.start + group.size * i)
            for group in self.groups
            for i in range(group.count)
        ]
        return torch.cat(found, 1)

    def rows(self, x: Tensor, group: Group) -> Tensor:
        """The heads of a group in k or v, (B, h, size, d), without a copy."""
        some = x[:, group.start : group.start + group.count * group.size]
        return some.unflatten(1, (group.count, group.size))

    def write(self, k: Tensor, v: Tensor, real: Tensor | None = None) -> None:
        """Add tokens that follow those written so far.

        Args:
            k, v: (B, H, n, d).
            real: (B, n) bool, False for padding, which is skipped; None without any.
        """
        count = k.shape[2]
        if real is None:
            places = self.length[:, None] + torch.arange(count, device=k.device)  # (B, n)
            last = self.length + count
        else:
            places = self.length[:, None] + real.cumsum(-1) - 1
            last = self.length + real.sum(-1)
        for group in self.groups:
            latest = places >= (last[:, None] - (group.size - group.sink))
            stays = (places < group.sink) | latest
            if real is not None:
                stays = stays & real
            slots = group.slots(places)
            if count == 1 and real is None:
                self._put(group, slots, k, v)
            else:
                text, token = stays.nonzero(as_tuple=True)
                slot = slots[text, token]
                for into, x in ((self.k, k), (self.v, v)):
                    some = x[:, group.heads].transpose(1, 2)[text, token]  # (n, h, d)
                    self.rows(into, group).transpose(1, 2)[text, slot] = some
        self.length = last
        self.full = self.full or bool((last >= max(self.sizes)).all())

    def _put(self, group: Group, slots: Tensor, k: Tensor, v: Tensor) -> None:
        text = torch.arange(len(slots), device=k.device)
        for into, x in ((self.k, k), (self.v, v)):
            self.rows(into, group).transpose(1, 2)[text, slots[:, 0]] = x[:, group.heads, 0]

    def attend(self, q: Tensor, scale: float) -> Tensor:
        """Each query over everything in the cache of its head.

        Args:
            q: (B, H g, 1, d); g neighbouring queries share a head of the cache.
            scale: of the logits.

        Returns:
            (B, H g, 1, d).
        """
        shared = q.shape[1] // len(self.sizes)
        grouped = q.unflatten(1, (-1, shared))[..., 0, :]  # (B, H, g, d)
        out = []
        for group in self.groups:
            bias = None
            if not self.full:
                used = torch.arange(group.size, device=q.device) < self.length[:, None]
                bias = torch.zeros(used.shape, dtype=q.dtype, device=q.device)
                bias = bias.masked_fill(~used, torch.finfo(q.dtype).min)[:, None, None]
            k, v = self.rows(self.k, group), self.rows(self.v, group)
            out.append(attention.attend(grouped[:, group.heads], k, v, bias, scale=scale))
        return torch.cat(out, 1).flatten(1, 2)[:, :, None]

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values."""
        return 2 * self.k.numel() * self.k.element_size()

    def select(self, index: Tensor) -> None:
        """Go on with the texts at index (n,), which may repeat."""
        self.k, self.v = self.k.index_select(0, index), self.v.index_select(0, index)
        self.length = self.length.index_select(0, index)
