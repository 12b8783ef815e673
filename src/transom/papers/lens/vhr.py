"""VHR: heads whose output depends on the image speak louder.

With A_li (d,) the output of head i of layer l at the last position, before the output projection:

    VHD_li = || A_li(with image) - A_li(image removed) ||
    heads whose VHD and whose norm without image both exceed mean + std of their layer count as 0
    chosen: VHD_li > median of the layer
    A_li <- alpha A_li     for chosen heads, at all positions

Chosen once from the prompt, kept for the whole generation. Training-free; one further pass over
the prompt without its image. As a lens, VHD works for any decoder and any part of a prompt.

Source: He et al., Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence,
ACL 2025. The official code (jinghan1he/VHR) could not be read; this follows the paper. Checked
against a third-party port (lmms-eval@9627c11b): divergence, median split, projected outputs. Not
checked: the outlier rule has no golden case, and no CHAIR figure was reproduced.

Open in the text, and chosen here: population standard deviation, the lower of two middle values as
median, strictly above. All layers are measured first; `one_by_one` measures a layer after those
before it were reinforced, as the paper is understood, at one pair of passes a layer. A report has
to show recall and length beside hallucinations: at alpha = 4 text breaks and both fall together.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import transom
from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.hosts.hf_decoder import without_pictures
from transom.instrumented import Instrumented
from transom.registry import Method, Offer, Takes
from transom.slots import Ask, Fill

Heads = tuple[tuple[int, ...], ...]


class Divergence(NamedTuple):
    """vhd: (L, H) divergence; chosen: (L, H) bool, heads to reinforce."""

    vhd: Tensor
    chosen: Tensor


def divergence(seeing: Tensor, blind: Tensor, outliers: bool = True) -> Divergence:
    """Which heads depend on the image.

    Args:
        seeing: (L, H, d) outputs of the heads at the last position, with the image.
        blind: (L, H, d) without it.
        outliers: whether heads that surge when the image disappears count as 0.

    Returns:
        See :class:`Divergence`.
    """
    vhd = (seeing - blind).norm(dim=-1)
    split = vhd
    if outliers:
        alone = blind.square().sum(-1)
        surges = torch.ones_like(vhd, dtype=torch.bool)
        for value in (vhd, alone):
            limit = value.mean(-1, keepdim=True) + value.std(-1, correction=0, keepdim=True)
            surges = surges & (value > limit)
        split = vhd.masked_fill(surges, 0.0)
    return Divergence(vhd, split > split.median(-1, keepdim=True).values)


def token_divergence(vhd: Tensor, k: int = 4) -> Tensor:
    """T-VHD of a word: the sum over layers of the k largest divergences of its heads (L, H)."""
    return vhd.topk(min(k, vhd.shape[-1]), dim=-1).values.sum()


@dataclass(frozen=True)
class Reinforce:
    """Correction of what the heads of one layer say."""

    chosen: tuple[int, ...]
    alpha: float

    def applies(self, ask: Ask | None) -> bool:
        """In every call, with or without an image."""
        return True

    def __call__(self, x: Tensor, ask: Ask | None = None) -> Tensor:
        """(B, H, N, d) with the chosen heads times alpha."""
        factor = x.new_ones(x.shape[1])
        factor[list(self.chosen)] = self.alpha
        return x * factor[:, None, None]


@dataclass(frozen=True)
class VHR(Method):
    """Vision-aware head reinforcement.

    Attributes:
        heads: to reinforce, for each layer; :func:`sensitive_heads` finds them for a prompt.
        alpha: factor; 1 changes nothing.
    """

    heads: Heads = ()
    alpha: float = 2.0
    takes: ClassVar[Takes] = "decoder"

    def __post_init__(self) -> None:
        if self.alpha < 0:
            raise SettingsError(f"alpha is {self.alpha!r}; expected a factor of at least 0")
        if any(h < 0 for heads in self.heads for h in heads):
            raise SettingsError(f"heads is {self.heads!r}; expected heads counted from 0")

    def fit(self, host: Host) -> list[Fill]:
        if len(self.heads) > host.depth:
            raise SettingsError(
                f"heads lists {len(self.heads)} layers, but this decoder has {host.depth}"
            )
        config: Any = host.root.config
        count = config.num_attention_heads
        rest = [()] * (host.depth - len(self.heads))
        fills = []
        for i, heads in enumerate((*self.heads, *rest)):
            if heads and max(heads) >= count:
                raise SettingsError(
                    f"heads names head {max(heads)} of layer {i}, which has {count}"
                )
            speak = Instrumented(heads=Reinforce(heads, self.alpha)) if heads else None
            fills.append(Fill(attention=speak))
        return fills

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"heads": ((0,),) * depth, "alpha": alpha} for alpha in (1.5, 2.0, 3.0)]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"heads": ((0,),), "alpha": 1.0}

    @classmethod
    def for_prompt(cls, model: nn.Module, given: Mapping[str, Any], **settings: Any) -> VHR:
        if "heads" not in settings:
            blind = without_pictures(model, given)
            settings = {**settings, "heads": sensitive_heads(model, given, blind)}
        return cls(**settings)


def released_layers(depth: int) -> list[int]:
    """The layers of the paper for LLaVA-1.5 (32 layers), in the same places of another depth."""
    return sorted({min(1, depth - 1), *range(round(depth * 18 / 32), depth)})


@torch.no_grad()
def sensitive_heads(
    model: nn.Module,
    seeing: Mapping[str, Any],
    blind: Mapping[str, Any],
    *,
    layers: list[int] | None = None,
    outliers: bool = True,
    one_by_one: bool = False,
    alpha: float = 2.0,
) -> Heads:
    """Heads to reinforce for one prompt.

    Args:
        model: with a decoder, to which no method is fitted.
        seeing: arguments of the model with the image.
        blind: the same prompt without it.
        layers: to choose heads in; None takes :func:`released_layers`.
        outliers: see :func:`divergence`.
        one_by_one: measure each layer after the earlier ones were reinforced.
        alpha: of the reinforcement, for that.

    Returns:
        Heads of each layer, for :class:`VHR`.
    """
    depth = transom.hosts.find(model, True).depth
    wanted = released_layers(depth) if layers is None else sorted(layers)
    if not wanted or wanted[-1] >= depth or wanted[0] < 0:
        raise SettingsError(f"layers is {layers!r}, but this decoder has layers 0 to {depth - 1}")
    found: list[tuple[int, ...]] = [()] * depth
    for group in [[i] for i in wanted] if one_by_one else [wanted]:
        earlier = tuple(found)
        if any(earlier):
            transom.apply(model, VHR(earlier, alpha), check=False)
        try:
            outs = [_last_heads(model, group, given) for given in (seeing, blind)]
        finally:
            if any(earlier):
                transom.remove(model, VHR.slug)
        chosen = divergence(outs[0], outs[1], outliers).chosen
        for i, heads in zip(group, chosen, strict=True):
            found[i] = tuple(heads.nonzero()[:, 0].tolist())
    return tuple(found)


def _last_heads(model: nn.Module, layers: list[int], given: Mapping[str, Any]) -> Tensor:
    """(L, H, d) outputs of the heads at the last position of the first prompt."""
    names = [f"blocks.{i}.attention.head_output" for i in layers]
    with transom.capture(model, *names, decoder=True, check=False) as seen:
        model(**given)
    return torch.stack([seen[name][0, :, -1] for name in names])


OFFERS = (
    Offer("lens", "vision-aware-head-divergence", divergence),
    Offer("lens", "sensitive-heads", sensitive_heads),
)
