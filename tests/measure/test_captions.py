"""Captions with and without corrections: what is fitted, what is left behind, what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from tests.common.cases import anatomy
from tests.measure import captioner
from tests.zoo.test_decoders import IMAGE, inputs, llava, own, qwen_vl, seeing
from transom.errors import DataError, FitError, SettingsError, TokensError
from transom.hosts.hf_decoder import without_pictures
from transom.measure.captions import Prompt, corrected, hallucination
from transom.measure.chair import compare
from transom.measure.mentions import Truth, Vocabulary
from transom.papers.lens.vhr import VHR

KINDS = [f"thing{chr(97 + i)}" for i in range(8)]


def decode(ids: Tensor) -> str:
    """A tokenizer of eight objects."""
    return " and ".join(KINDS[int(i) % 8] for i in ids if 3 <= i < 50) or "nothing"


def prompts(count: int = 3) -> list[Prompt]:
    found = []
    for i in range(count):
        given = {name: value[:1].clone() for name, value in inputs("llava").items()}
        given["attention_mask"] = torch.ones_like(given["attention_mask"])
        generator = torch.Generator().manual_seed(i)
        given["pixel_values"] = torch.randn(1, 3, 12, 12, generator=generator)
        found.append(Prompt(i, given))
    return found


def truth(count: int = 3) -> Truth:
    return Truth({i: frozenset(KINDS[: 2 + i]) for i in range(count)}, Vocabulary(KINDS))


def test_corrections_and_their_composition_are_reported_and_taken_out(tmp_path: Path) -> None:
    model = llava()
    plain = model(**prompts()[0].given).logits  # its own hooks come with the first call
    before = anatomy(model)
    seen = []
    together = {
        "vhr": [("vhr", {"alpha": 12.0})],
        "all": [
            ("vhr", {"alpha": 12.0}),
            ("var", {"tau": 1.0, "rho": 0.0, "total": 0.0, "keep": 0.1, "first": 0}),
            ("imbalanced-attention", {"first": 0, "alpha": 0.9}),
        ],
    }
    found = hallucination(
        model, prompts(), truth(), together, decode=decode, max_new_tokens=8,
        watch=lambda *now: seen.append(now),
    )  # fmt: skip
    assert list(found.scores) == ["plain", "vhr", "all"]
    assert len({json.dumps(list(c.values())) for c in found.captions.values()}) == 3
    assert seen[-1] == ("all", 3, 3) and len(seen) == 9
    for row in found.rows():
        # a rate never comes alone
        assert {"instance", "sentence", "recall", "length", "repeated"} <= row.keys()
        assert row["captions"] == 3 and row["length"] > 0
    assert own(anatomy(model)) == own(before)
    assert torch.equal(model(**prompts()[0].given).logits, plain)
    saved = json.loads(found.save(tmp_path / "found.json").read_text())
    assert saved["captions"]["all"][2]["image_id"] == 2
    assert saved["against_plain"]["all"]["verdict"] == "unclear"  # three images


def test_names_compose_with_a_plus() -> None:
    model, given = llava(), prompts()[0].given
    with corrected(model, given, ["vhr", "imbalanced-attention"]) as methods:
        assert [m.slug for m in methods] == ["vhr", "imbalanced-attention"]
        assert any(methods[0].settings()["heads"])
        assert methods[1].settings()["local"] or methods[1].settings()["summary"]
        assert len(transom.fittings(model)) == 2
    assert not transom.fittings(model)
    found = hallucination(model, prompts(), truth(), ["vhr+var"], decode=decode, max_new_tokens=3)
    assert list(found.against_plain) == ["vhr+var"]


def test_nothing_is_left_behind_after_an_error() -> None:
    model, given = llava(), prompts()[0].given
    model(**given)
    before = anatomy(model)
    with pytest.raises(RuntimeError), corrected(model, given, ["vhr", "var"]):
        raise RuntimeError
    assert own(anatomy(model)) == own(before)
    with pytest.raises(FitError, match="taken"), corrected(model, given, ["vhr", VHR()]):
        pass
    assert own(anatomy(model)) == own(before)


@pytest.mark.parametrize("name", ["llava", "qwen2-vl"])
def test_prompts_without_their_pictures(name: str) -> None:
    model, given = (llava() if name == "llava" else qwen_vl("2")), seeing(name)
    blind = without_pictures(model, given)
    ids = given["input_ids"]
    assert not (blind["input_ids"] == IMAGE).any()
    for row, short in zip(ids, blind["input_ids"], strict=True):
        assert short.tolist() == [i for i in row.tolist() if i != IMAGE]
    assert "pixel_values" not in blind
    assert model(**blind).logits.shape[1] == blind["input_ids"].shape[1]
    with pytest.raises(TokensError, match="same number"):
        without_pictures(model, blind)


def test_what_is_asked_wrongly() -> None:
    model = llava()
    settings: dict[str, Any] = {"decode": decode, "max_new_tokens": 2}
    with pytest.raises(SettingsError, match="'evit' corrects no decoder"):
        hallucination(model, prompts(), truth(), ["evit"], **settings)
    with pytest.raises(SettingsError, match="another name"):
        hallucination(model, prompts(), truth(), {"plain": ["vhr"]}, **settings)
    with pytest.raises(DataError, match="not in the annotations"):
        hallucination(model, prompts(), truth(2), **settings)
    with pytest.raises(DataError, match="0 prompts"):
        hallucination(model, [], truth(), **settings)
    with pytest.raises(DataError, match="one prompt an"):
        hallucination(model, [*prompts(), *prompts()], truth(), **settings)


@pytest.mark.slow
def test_a_trained_captioner_and_what_its_report_tells_apart() -> None:
    """Object hallucination by a prior, on a model that was trained to have one.

    Better training is better; the same text cut off is only shorter; and a correction under which
    the model says less is not praised for that.
    """
    model = captioner.train(captioner.build(), 400, company=0.95, seed=1)
    made = captioner.scenes(100, 0.0, torch.Generator().manual_seed(7))
    asked, truth = captioner.questions(made)
    settings: dict[str, Any] = {"decode": captioner.decode, "max_new_tokens": 20}
    found = hallucination(model, asked, truth, {"vhr": [("vhr", {"alpha": 3.0})]}, **settings)
    plain, before = found.scores["plain"], found.captions["plain"]
    assert plain.instance is not None and plain.recall is not None
    assert plain.instance > 0.15 and plain.recall > 0.6  # it invents, and it sees

    short = hallucination(model, asked, truth, {}, **{**settings, "max_new_tokens": 5})
    cut = compare(before, short.captions["plain"], truth)
    assert cut.after.instance is not None and cut.after.instance < plain.instance
    assert cut.after.sentence < plain.sentence - 0.1
    assert cut.differences["distinct at equal length"].value == 0
    assert cut.verdict in ("shorter", "unclear")

    # fewer captions with an invention, but fewer objects seen too: CHAIR_s alone would praise it
    reinforced = found.against_plain["vhr"]
    assert reinforced.after.recall is not None
    assert reinforced.after.sentence < plain.sentence
    assert reinforced.after.recall < plain.recall
    assert reinforced.verdict != "better"

    captioner.train(model, 200, company=0.0, seed=2, lr=2e-3)
    after = hallucination(model, asked, truth, {}, **settings)
    learned = compare(before, after.captions["plain"], truth)
    assert learned.verdict == "better", learned.why
