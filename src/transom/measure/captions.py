"""Captions of a model that sees, as it is and under corrections, with what they invent and say.

Corrections that look at the prompt first (which heads, which patches) do so for every prompt, on
the model as it was; then all of a composition are fitted, the caption is generated, and they are
taken out again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import transom
from transom import registry
from transom.errors import DataError, SettingsError
from transom.measure.chair import Chair, Comparison, compare, score
from transom.measure.mentions import Truth
from transom.registry import Method

PLAIN = "plain"
Correction = str | Method | tuple[str, Mapping[str, Any]]
Watch = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Prompt:
    """One image with what is asked about it.

    Attributes:
        image: its id in the annotations.
        given: arguments of the model for this prompt alone: `input_ids` (1, N), the pixels, …
    """

    image: int | str
    given: Mapping[str, Any]


@dataclass(frozen=True)
class Hallucination:
    """What captions invent and say, with and without corrections.

    Attributes:
        captions: by name of the correction, then by image; "plain" without any.
        scores: of each.
        against_plain: every correction beside the plain model.
    """

    captions: Mapping[str, Mapping[int | str, str]]
    scores: Mapping[str, Chair]
    against_plain: Mapping[str, Comparison]

    def rows(self) -> list[dict[str, Any]]:
        """One row a correction: CHAIR, recall, length, repetition, verdict."""
        return [
            {
                "correction": name,
                **asdict(found),
                "verdict": self.against_plain[name].verdict if name != PLAIN else None,
                "why": self.against_plain[name].why if name != PLAIN else None,
            }
            for name, found in self.scores.items()
        ]

    def save(self, path: str | Path) -> Path:
        """Write rows, intervals and captions as JSON."""
        path = Path(path)
        content = {
            "rows": self.rows(),
            "against_plain": {name: asdict(c) for name, c in self.against_plain.items()},
            "captions": {
                name: [{"image_id": image, "caption": text} for image, text in texts.items()]
                for name, texts in self.captions.items()
            },
        }
        path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path


@torch.no_grad()
def caption(
    model: nn.Module, given: Mapping[str, Any], decode: Callable[[Tensor], str], **generation: Any
) -> str:
    """What a model says about one prompt, without the prompt.

    Args:
        model: that generates.
        given: its arguments, one prompt.
        decode: token ids (n,) -> text, special tokens left out, e.g.
            ``lambda ids: processor.decode(ids, skip_special_tokens=True)``.
        **generation: for `model.generate`; greedy by default.
    """
    generate: Any = model.generate
    said = generate(**given, **{"do_sample": False, **generation})
    return decode(said[0, given["input_ids"].shape[1] :]).strip()


@contextmanager
def corrected(
    model: nn.Module, given: Mapping[str, Any], corrections: Sequence[Correction]
) -> Iterator[list[Method]]:
    """Corrections for one prompt, fitted together for the length of a `with` block.

    Args:
        model: that sees, with nothing fitted to its decoder.
        given: the prompt, arguments of the model.
        corrections: slugs, slugs with settings, or methods as they are.

    Yields:
        The methods as they were fitted.

    Raises:
        SettingsError: a correction is not for decoders.
        FitError: two of them want the same place.
    """
    methods = [_for_prompt(model, given, correction) for correction in corrections]
    fitted: list[str] = []
    try:
        for method in methods:
            transom.apply(model, method, check=False)
            fitted.append(method.slug)
        yield methods
    finally:
        for slug in fitted:
            transom.remove(model, slug)


def _for_prompt(model: nn.Module, given: Mapping[str, Any], correction: Correction) -> Method:
    if isinstance(correction, Method):
        return correction
    slug, settings = (correction, {}) if isinstance(correction, str) else correction
    known = registry.methods()
    if slug not in known or known[slug].takes != "decoder":
        decoders = [s for s, method in known.items() if method.takes == "decoder"]
        raise SettingsError(f"{slug!r} corrects no decoder; those that fit one are {decoders}")
    return known[slug].for_prompt(model, given, **settings)


def hallucination(
    model: nn.Module,
    prompts: Sequence[Prompt],
    truth: Truth,
    corrections: Mapping[str, Sequence[Correction]] | Sequence[str] = (
        "vhr",
        "var",
        "imbalanced-attention",
    ),
    *,
    decode: Callable[[Tensor], str],
    watch: Watch | None = None,
    **generation: Any,
) -> Hallucination:
    """Generate captions with and without corrections, and report what they invent and say.

    Args:
        model: that sees, with nothing fitted to its decoder; it is left as it was.
        prompts: one an image.
        truth: of the images, from :func:`transom.measure.mentions.read_truth`.
        corrections: names such as "vhr" or "vhr+var" (both at once), or by any name a list of
            slugs, slugs with settings, or methods.
        decode: token ids (n,) -> text.
        watch: called with the name of the correction, the number of finished captions and of all.
        **generation: for `model.generate`, such as `max_new_tokens`.

    Returns:
        Scores and captions of the plain model and of each correction.

    Raises:
        DataError: there are no prompts, an image has two, or it is not in the annotations.
        SettingsError: a correction is unknown, or no correction of decoders.
    """
    if not isinstance(corrections, Mapping):
        corrections = {name: name.split("+") for name in corrections}
    if PLAIN in corrections:
        raise SettingsError(f"{PLAIN!r} names the model without corrections; take another name")
    images = [prompt.image for prompt in prompts]
    if not images or len(set(images)) < len(images):
        raise DataError(
            f"got {len(images)} prompts of {len(set(images))} images; expected one prompt an "
            "image, and at least one"
        )
    strange = [image for image in images if image not in truth.objects]
    if strange:  # hours of generation should not end with this
        raise DataError(f"image {strange[0]!r} is not in {truth.source}")
    captions: dict[str, dict[int | str, str]] = {}
    for name, together in {PLAIN: (), **corrections}.items():
        captions[name] = {}
        for i, prompt in enumerate(prompts):
            with corrected(model, prompt.given, together):
                said = caption(model, prompt.given, decode, **generation)
            captions[name][prompt.image] = said
            if watch is not None:
                watch(name, i + 1, len(prompts))
    return Hallucination(
        captions,
        {name: score(said, truth) for name, said in captions.items()},
        {
            name: compare(captions[PLAIN], said, truth)
            for name, said in captions.items()
            if name != PLAIN
        },
    )
