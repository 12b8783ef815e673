"""VAR: attention that a few useless image tokens swallow goes to the other image tokens.

In models that see, some image tokens draw attention from every word although they carry nothing.
Their features are extreme in the same few channels as those of the first token. With x (B, N, D)
as it enters a layer and a = softmax(q kᵀ / sqrt(d)) (B, H, N, keys):

    phi_j = max over sink channels |x_jd| / rms(x_j)          sinks S = {j: phi_j > tau}
    a row is chosen if  sum of a over image tokens  >= total
                   and  its part on image tokens that are no sinks  >= rho
    a_j <- keep a_j                                            j in S
    a_j <- a_j + (1 - keep) sum_S a · a_j / sum of a over image tokens that are no sinks

Rows keep their sum. While a prompt is read only queries behind the image change; sinks are found
then and hold for the rest of the generation. Training-free. It needs the attention matrix.

Source: Kang et al., See What You Are Told: Visual Attention Sink in Large Multimodal Models, ICLR
2025; official code seilk/VisAttnSink@98e62d6 (Apache-2.0). Checked against it: sinks, chosen rows
and attention, for a prompt and for one further query. Not checked: LLaVA-1.5 and its figures.

`rho` is the paper's (part of image attention that is *not* on sinks; the official code bounds the
other part by 1 - rho), `keep` is the official code's p. The last layer stays as it is, as in the
paper; the official code changes it by accident. Every prompt of a batch has its own sinks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

import transom
from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.instrumented import Instrumented
from transom.registry import Method, Offer, Takes
from transom.slots import Ask, Fill

# Sink channels that were published, by the width of the decoder.
KNOWN: dict[int, tuple[int, ...]] = {4096: (1415, 2533), 5120: (2100, 4743), 3584: (458, 2570)}


def sink_values(x: Tensor, channels: Sequence[int]) -> Tensor:
    """How extreme each token is: max over the channels of |x| over its root mean square.

    Args:
        x: (B, N, D) as it enters a layer.
        channels: where sinks show.

    Returns:
        (B, N).
    """
    rms = (x.square().mean(-1) + 1e-6).sqrt()
    return x[..., list(channels)].abs().amax(-1) / rms


class Redistributed(NamedTuple):
    """What became of the attention.

    attention: (B, H, N, keys) afterwards.
    chosen: (B, H, N) bool, rows that look at the image and not at its sinks, changed or not.
    """

    attention: Tensor
    chosen: Tensor


def redistribute(
    a: Tensor,
    sinks: Tensor,
    visual: Tensor,
    rows: Tensor,
    *,
    rho: float = 0.5,
    total: float = 0.2,
    keep: float = 0.6,
) -> Redistributed:
    """Move attention from sinks to image tokens that are none.

    Args:
        a: (B, H, N, keys) attention probabilities.
        sinks: (B, keys) bool.
        visual: (B, keys) bool.
        rows: (B or 1, N) bool, queries that may change.
        rho: least part of the image attention that is not on sinks.
        total: least attention on the image.
        keep: part of their attention that sinks keep.

    Returns:
        See :class:`Redistributed`.
    """
    image, sink = visual[:, None, None].to(a.dtype), sinks[:, None, None].to(a.dtype)
    swallowed = (a * image * sink).sum(-1)
    looked = (a * image).sum(-1)
    part = swallowed / ((a + 1e-6) * image).sum(-1)
    # there has to be a sink that pays and a token that gets it
    some = ((sinks & visual).any(1) & (visual & ~sinks).any(1))[:, None, None]
    chosen = (part <= 1 - rho) & (looked >= total) & some
    budget = (1 - keep) * (a * sink).sum(-1, keepdim=True)
    free = a * image * (1 - sink)
    moved = a * (1 - (1 - keep) * sink) + budget * free / free.sum(-1, keepdim=True).clamp(
        min=1e-30
    )
    changes = (chosen & rows[:, None])[..., None]
    return Redistributed(torch.where(changes, moved, a), chosen)


@dataclass(frozen=True)
class Redistribute:
    """Correction of the probabilities of one layer."""

    method: VAR
    channels: tuple[int, ...]

    def applies(self, ask: Ask | None) -> bool:
        """Where a prompt has an image; an error where it had one that left before."""
        if ask is None or ask.visual is None or ask.stream is None:
            return False
        if ask.record is not None:
            ask.record.images("var")
        return bool(ask.visual.any())

    def __call__(self, x: Tensor, ask: Ask | None) -> Tensor:
        """(B, H, N, keys), redistributed; sinks are found in the prompt and remembered."""
        assert ask is not None and ask.visual is not None and ask.stream is not None
        assert ask.memory is not None
        visual, count = ask.visual, x.shape[2]
        rows = torch.ones(len(x), count, dtype=torch.bool, device=x.device)
        if not ask.decoding:
            ask.memory["sinks"] = sink_values(ask.stream, self.channels) > self.method.tau
            places = torch.arange(count, device=x.device)
            rows = places > torch.where(visual, places, -1).amax(1, keepdim=True)
        sinks = ask.memory["sinks"]
        more = visual.shape[1] - sinks.shape[1]
        sinks = torch.cat([sinks, sinks.new_zeros(len(sinks), more)], 1)
        m = self.method
        return redistribute(x, sinks, visual, rows, rho=m.rho, total=m.total, keep=m.keep).attention


@dataclass(frozen=True)
class VAR(Method):
    """Visual attention redistribution.

    Attributes:
        channels: where sinks show; None takes the published ones for the width of the decoder.
            `sink_channels` finds them for any other.
        tau: how extreme a sink is.
        rho: least part of the image attention that is not on sinks. The paper takes 0.8 for general
            questions, 0.5 against hallucination, 0.9 where vision decides.
        total: least attention on the image for a row to be chosen.
        keep: part of their attention that sinks keep; 1 changes nothing.
        first: layer to begin with.
    """

    channels: tuple[int, ...] | None = None
    tau: float = 20.0
    rho: float = 0.5
    total: float = 0.2
    keep: float = 0.6
    first: int = 2
    takes: ClassVar[Takes] = "decoder"

    def __post_init__(self) -> None:
        for name in ("rho", "total", "keep"):
            if not 0 <= getattr(self, name) <= 1:
                raise SettingsError(f"{name} is {getattr(self, name)!r}; expected from 0 to 1")
        if self.tau <= 0 or self.first < 0:
            raise SettingsError(
                f"tau is {self.tau!r} and first is {self.first!r}; expected tau above 0 and the "
                "number of a layer"
            )

    def fit(self, host: Host) -> list[Fill]:
        channels = KNOWN.get(host.width) if self.channels is None else self.channels
        if not channels:
            raise FitError(
                f"for a decoder of width {host.width} no sink channels are known; find them with "
                "transom.papers.lens.var.sink_channels(model, **inputs) and pass channels=..."
            )
        if max(channels) >= host.width:
            raise SettingsError(
                f"channels names {max(channels)}, but this decoder has {host.width} channels"
            )
        operator = Instrumented(probabilities=Redistribute(self, channels))
        chosen = range(self.first, host.depth - 1)
        return [Fill(attention=operator if i in chosen else None) for i in range(host.depth)]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [
            {"channels": (0, 1), "first": 0, "tau": 0.7, "rho": 0.0, "total": 0.0, "keep": keep}
            for keep in (0.9, 0.6, 0.3)
        ]

    @classmethod
    def for_prompt(cls, model: nn.Module, given: Mapping[str, Any], **settings: Any) -> VAR:
        known = transom.hosts.find(model, True).width in KNOWN
        if settings.get("channels") is None and not known:
            settings = {**settings, "channels": sink_channels(model, **given)}
        return cls(**settings)


@torch.no_grad()
def sink_channels(model: nn.Module, count: int = 2, **given: Any) -> tuple[int, ...]:
    """Channels in which the first token is extreme in most layers: where sinks will show.

    Args:
        model: with a decoder.
        count: channels to return.
        **given: a prompt, arguments of the model.

    Returns:
        Channels, the most extreme first.
    """
    with transom.capture(model, "blocks.*.residual.pre", decoder=True) as seen:
        model(**given)
    layers = [x[:, 0] for x in seen.values()][2:-1] or [x[:, 0] for x in seen.values()]
    extreme = torch.stack([(x / x.square().mean(-1, keepdim=True).sqrt()).abs() for x in layers])
    return tuple(extreme.mean(1).median(0).values.topk(count).indices.tolist())


OFFERS = (Offer("lens", "sink-channels", sink_channels), Offer("lens", "sink-values", sink_values))
