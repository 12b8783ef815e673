"""CHAIR: objects in captions that are not in their images, never without recall and length.

For captions c of images with objects T_c, mentions M_c (each occurrence) and distinct D_c:

    CHAIR_i = sum |mentions of M_c that are not in T_c| / sum |M_c|
    CHAIR_s = part of the captions with at least one such mention
    recall  = sum |D_c ∩ T_c| / sum |T_c|            length = mean number of words

A caption that says little invents little, and one that repeats a safe word dilutes what it invents.
So every score carries recall, length and repetition, and `compare` judges two sets of captions of
the same images also at equal length, over distinct objects, with paired bootstrap intervals.

Source: Rohrbach et al., Object Hallucination in Image Captioning, EMNLP 2018. Mentions are found as
in :mod:`transom.measure.mentions`; the measure's own code has some further rules for COCO, such as
a "bow tie" being a tie, which a file of synonyms can state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from transom.errors import DataError
from transom.measure.mentions import Captions, Truth, words


@dataclass(frozen=True)
class Chair:
    """How much captions invent, and how much they say.

    Attributes:
        captions: their number.
        instance: CHAIR_i; None when nothing was mentioned.
        sentence: CHAIR_s.
        distinct: CHAIR_i with repeated objects of a caption counted once; None likewise.
        recall: part of the objects that is mentioned; None when the images have none.
        length: mean number of words.
        objects: mean number of distinct objects mentioned.
        repeated: part of the mentions that repeat an object of the same caption; None likewise.
        empty: captions without a word.
    """

    captions: int
    instance: float | None
    sentence: float
    distinct: float | None
    recall: float | None
    length: float
    objects: float
    repeated: float | None
    empty: int


@dataclass(frozen=True)
class Difference:
    """After minus before, with the middle 95 % of a paired bootstrap over images."""

    value: float
    low: float
    high: float

    @property
    def falls(self) -> bool:
        return self.high < 0

    @property
    def rises(self) -> bool:
        return self.low > 0


FEWEST = 20  # images below which a bootstrap over them says little

# counts of a caption, in this order
MENTIONS, INVENTED, DISTINCT, DISTINCT_INVENTED, RECALLED, THERE, LENGTH, HAS_INVENTED = range(8)


def counts(captions: Captions, truth: Truth) -> np.ndarray:
    """What the measures are made of, (captions, 8) in the order of the constants above.

    Raises:
        DataError: an image is not among those of the truth.
    """
    strange = [image for image in captions if image not in truth.objects]
    if strange:
        known = list(truth.objects)
        raise DataError(
            f"{len(strange)} of {len(captions)} captions are of images that {truth.source} does "
            f"not have, for example {strange[0]!r}; it has {len(known)}, for example {known[0]!r}"
        )
    rows = []
    for image, text in captions.items():
        there, said = truth.objects[image], truth.vocabulary.mentions(text)
        invented, distinct = [s for s in said if s not in there], set(said)
        rows.append(
            [
                len(said),
                len(invented),
                len(distinct),
                len(distinct - there),
                len(distinct & there),
                len(there),
                len(text.split()),
                bool(invented),
            ]
        )
    return np.array(rows, dtype=np.int64).reshape(-1, 8)


def score(captions: Captions, truth: Truth) -> Chair:
    """CHAIR of captions, with recall and length.

    Args:
        captions: by image id.
        truth: of the images.

    Raises:
        DataError: there are no captions, all are empty, or an image is unknown.
    """
    if not captions:
        raise DataError("there are no captions to score")
    if not any(words(text) for text in captions.values()):
        raise DataError(
            f"all {len(captions)} captions are empty, so nothing can be said about what they "
            "invent; look at how they were generated and decoded"
        )
    table = counts(captions, truth)
    s = table.sum(0)
    return Chair(
        captions=len(table),
        instance=_part(s[INVENTED], s[MENTIONS]),
        sentence=float(s[HAS_INVENTED] / len(table)),
        distinct=_part(s[DISTINCT_INVENTED], s[DISTINCT]),
        recall=_part(s[RECALLED], s[THERE]),
        length=float(s[LENGTH] / len(table)),
        objects=float(s[DISTINCT] / len(table)),
        repeated=_part(s[MENTIONS] - s[DISTINCT], s[MENTIONS]),
        empty=int((table[:, LENGTH] == 0).sum()),
    )


def _part(some: Any, of: Any) -> float | None:
    return float(some / of) if of else None


@dataclass(frozen=True)
class Comparison:
    """Two sets of captions of the same images.

    Attributes:
        before, after: their scores.
        before_cut, after_cut: both cut to the shorter caption of each image.
        differences: of "distinct", "sentence", "recall", "length", and of "distinct at equal
            length".
        verdict: "better", "trade", "shorter", "unclear" or "worse".
        why: the verdict in a sentence.
    """

    before: Chair
    after: Chair
    before_cut: Chair
    after_cut: Chair
    differences: Mapping[str, Difference]
    verdict: str
    why: str


def compare(
    before: Captions, after: Captions, truth: Truth, *, draws: int = 2000, seed: int = 0
) -> Comparison:
    """Whether captions invent less without saying less.

    Better: distinct CHAIR_i falls, also at equal length, and recall does not fall. A fall that is
    gone at equal length is that of shorter text; one that comes with less recall is a trade. Below
    20 images everything is unclear.

    Args:
        before: by image id.
        after: of the same images.
        truth: of the images.
        draws: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: the images differ, or either set cannot be scored.
    """
    odd = before.keys() ^ after.keys()
    if odd:
        raise DataError(
            f"{len(odd)} images have a caption in one set and none in the other, for example "
            f"{next(iter(odd))!r}; expected the same images"
        )
    after = {image: after[image] for image in before}
    first, second = score(before, truth), score(after, truth)
    cut: tuple[dict[int | str, str], dict[int | str, str]] = {}, {}
    for image in before:
        texts = before[image].split(), after[image].split()
        shorter = min(map(len, texts))
        for kept, text in zip(cut, texts, strict=True):
            kept[image] = " ".join(text[:shorter])
    if not any(words(text) for text in cut[0].values()):
        raise DataError(
            "in every image one of the two captions is empty, so nothing can be compared"
        )
    tables = [counts(c, truth) for c in (before, after)]
    equal = [counts(c, truth) for c in cut]
    n = len(before)
    weights = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)
    differences = {
        "distinct": _difference(tables, weights, DISTINCT_INVENTED, DISTINCT),
        "sentence": _difference(tables, weights, HAS_INVENTED, None),
        "recall": _difference(tables, weights, RECALLED, THERE),
        "length": _difference(tables, weights, LENGTH, None),
        "distinct at equal length": _difference(equal, weights, DISTINCT_INVENTED, DISTINCT),
    }
    verdict, why = _verdict(differences, n)
    return Comparison(
        first, second, score(cut[0], truth), score(cut[1], truth), differences, verdict, why
    )


def _difference(
    tables: Sequence[np.ndarray], weights: np.ndarray, above: int, below: int | None
) -> Difference:
    def rates(drawn: np.ndarray) -> list[np.ndarray]:
        with np.errstate(invalid="ignore"):
            return [
                (drawn @ t[:, above])
                / (drawn.sum(-1) if below is None else (drawn @ t[:, below]).astype(float))
                for t in tables
            ]

    first, second = rates(np.ones((1, len(tables[0])), dtype=np.int64))
    drawn = rates(weights)
    spread = drawn[1] - drawn[0]
    if not np.isfinite(spread).any():
        return Difference(math.nan, math.nan, math.nan)
    low, high = np.nanpercentile(spread, [2.5, 97.5])
    return Difference(float(second[0] - first[0]), float(low), float(high))


def _verdict(found: Mapping[str, Difference], images: int) -> tuple[str, str]:
    distinct, recall = found["distinct"], found["recall"]
    if images < FEWEST:
        return "unclear", f"{images} images are too few for a verdict; it takes {FEWEST}"
    if distinct.rises:
        return "worse", "more of what is said is invented"
    if not distinct.falls:
        return "unclear", "no difference in inventions beyond chance over these images"
    if not found["distinct at equal length"].falls:
        return "shorter", (
            "fewer inventions, but not when both captions of an image are cut to the same length: "
            "the text is only shorter"
        )
    if recall.falls:
        return "trade", (
            f"fewer inventions, but recall falls by {-recall.value:.1%}: less of what is there is "
            "said"
        )
    return "better", "fewer inventions, also at equal length, and recall does not fall"
