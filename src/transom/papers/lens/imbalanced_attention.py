"""Imbalanced attention: the next word looks harder at image tokens that inform.

In deep layers of models that see, hardly any attention goes to the image. Before the softmax, in
the row of the last query alone and in every head:

    z_j <- z_j + alpha |z_j|      j among local tokens T
    z_j <- z_j + beta  |z_j|      j among summary tokens U

T: the quarter of the patches to which the class token of the vision encoder attends most in its
first block. U: as many patches as there are upper outliers (above Q3 + 1.5 IQR) of the class
token's attention in its last block but one. T gives up what is in U. Training-free. It needs the
logits of the last row.

Source: Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language
Model, 2025; official code hasanar1f/llava-hallunication-fix@c5ee7da (also as PAINT). Checked
against it: selection, attention and its gradients. Not checked: LLaVA-1.5 and its figures.

What the abstract calls head-specific modulation is not in the official code and has no published
formula; all heads get the same. The spatial stream of the official code ranks row sums of a
softmax, which are all one, and is left out. The effect depends on the sign and scale of the
logits, and the figures of the paper show fewer hallucinated objects together with lower recall:
report both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import transom
from transom.errors import SettingsError, TokensError
from transom.hosts.base import Host
from transom.instrumented import Instrumented
from transom.registry import Method, Offer, Takes
from transom.slots import Ask, Fill


class Informed(NamedTuple):
    """Patches, counted from 0: `local` stand out by themselves, `summary` collect the image."""

    local: tuple[int, ...]
    summary: tuple[int, ...]


def select(first: Tensor, late: Tensor, ratio: float = 0.25) -> Informed:
    """Which patches inform.

    Args:
        first: (n,) attention of the class token to each patch in the first block of the vision
            encoder, summed over heads.
        late: (n,) the same in its last block but one.
        ratio: part of the patches that count as local.

    Returns:
        Sorted patches; summary patches are not local.
    """
    count = len(first)
    local = first.topk(int(count * ratio)).indices.tolist()
    q1, q3 = torch.quantile(late, late.new_tensor([0.25, 0.75])).tolist()
    outliers = int((late > q3 + 1.5 * (q3 - q1)).sum())
    summary = late.topk(outliers).indices.tolist()
    return Informed(tuple(sorted(set(local) - set(summary))), tuple(sorted(summary)))


def amplified(logits: Tensor, rises: Tensor) -> Tensor:
    """Raise the logits of the last query by a part of their size.

    Args:
        logits: (B, H, N, keys).
        rises: (B or 1, keys), alpha, beta or 0 for each key.

    Returns:
        (B, H, N, keys).
    """
    last = logits[:, :, -1:]
    return torch.cat([logits[:, :, :-1], last + rises[:, None, None] * last.abs()], 2)


@dataclass(frozen=True)
class Emphasise:
    """Correction of the last query's logits in one layer."""

    method: ImbalancedAttention

    def applies(self, ask: Ask | None) -> bool:
        """Where a prompt has an image; an error where it had one that left before."""
        if ask is None or ask.visual is None:
            return False
        if ask.record is not None:
            ask.record.images("imbalanced-attention")
        return bool(ask.visual.any())

    def __call__(self, x: Tensor, ask: Ask | None) -> Tensor:
        """(B, H, 1, keys) with the logits of emphasised tokens raised."""
        assert ask is not None and ask.visual is not None
        return amplified(x, self._rises(ask.visual, x.dtype))

    def _rises(self, visual: Tensor, dtype: torch.dtype) -> Tensor:
        m = self.method
        rises = torch.zeros_like(visual, dtype=dtype)
        place = visual.long().cumsum(1) - 1  # which patch a visual token is
        for patches, rise in ((m.local, m.alpha), (m.summary, m.beta)):
            if patches and max(patches) >= int(visual.sum(1).min()):
                raise TokensError(
                    f"patch {max(patches)} is to be emphasised, but a prompt of this batch has "
                    f"{int(visual.sum(1).min())} image tokens"
                )
            chosen = torch.isin(place, torch.tensor(patches, device=place.device)) & visual
            rises = torch.where(chosen, rise, rises)
        return rises


@dataclass(frozen=True)
class ImbalancedAttention(Method):
    """Emphasis on informing image tokens.

    Attributes:
        local, summary: patches to emphasise, counted from 0; :func:`informed` finds them for an
            image.
        alpha: rise of local patches; 0 changes nothing.
        beta: rise of summary patches.
        first: layer to begin with.
    """

    local: tuple[int, ...] = ()
    summary: tuple[int, ...] = ()
    alpha: float = 0.7
    beta: float = 0.4
    first: int = 2
    takes: ClassVar[Takes] = "decoder"

    def __post_init__(self) -> None:
        for name in ("local", "summary"):
            patches = getattr(self, name)
            if any(p < 0 for p in patches):
                raise SettingsError(f"{name} is {patches!r}; expected patches counted from 0")
        if set(self.local) & set(self.summary):
            raise SettingsError(
                f"{sorted(set(self.local) & set(self.summary))} are in local and in summary; a "
                "patch is one of both"
            )
        if self.alpha < 0 or self.beta < 0 or self.first < 0:
            raise SettingsError(
                f"alpha, beta and first are {self.alpha}, {self.beta}, {self.first}; expected "
                "numbers of at least 0"
            )

    def fit(self, host: Host) -> list[Fill]:
        operator = Instrumented(last=Emphasise(self))
        return [Fill(attention=operator if i >= self.first else None) for i in range(host.depth)]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"local": (0, 2), "summary": (1,), "alpha": a, "first": 0} for a in (0.3, 0.5, 0.7)]

    @classmethod
    def for_prompt(
        cls, model: nn.Module, given: Mapping[str, Any], **settings: Any
    ) -> ImbalancedAttention:
        if not {"local", "summary"} & settings.keys():
            found = informed(model, given["pixel_values"])
            if len(found) != 1:
                raise TokensError(
                    f"this prompt has {len(found)} images; which patches inform is found for one"
                )
            settings = {**settings, **found[0]._asdict()}
        return cls(**settings)


@torch.no_grad()
def informed(model: nn.Module, pixels: Tensor, ratio: float = 0.25, **given: Any) -> list[Informed]:
    """Which patches of each image inform, by the model's own vision encoder.

    Args:
        model: that sees; its vision encoder has a class token.
        pixels: (B, 3, h, w) as the encoder takes them.
        ratio: part of the patches that count as local.
        **given: further arguments of the vision encoder.

    Returns:
        One set an image.
    """
    names = [f"blocks.{i}.attention.probabilities" for i in (0, -2)]
    encoder = transom.hosts.find(model)
    if not encoder.class_token:
        raise TokensError(
            f"the vision encoder {encoder.family} has no class token, by whose attention patches "
            "are chosen"
        )
    with transom.capture(model, *names, decoder=False) as seen:
        encoder.root(pixels, **given)
    maps = [a[:, :, 0, encoder.prefix :].sum(1) for a in seen.values()]
    return [select(first, late, ratio) for first, late in zip(maps[0], maps[-1], strict=True)]


OFFERS = (Offer("lens", "informed-tokens", informed),)
