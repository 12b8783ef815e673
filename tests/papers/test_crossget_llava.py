"""CrossGET on LLaVA: a guest in the vision tower, a replaced token in the language model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import transom
from tests.common.cases import anatomy
from tests.common.hosts import tensors
from tests.papers.crossget_models import clip, learn
from tests.zoo.hf_zoo import FAMILIES
from transom.errors import FitError, HostError, SettingsError
from transom.papers.tokens.crossget import aligning_llava, fit_llava


class TestReceived:
    """Importance for LLaVA: how much attention a token receives."""

    def test_it_is_written_out(self) -> None:
        from transom.papers.tokens.crossget.method import MergeGuided
        from transom.slots import Ask

        q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
        ask = Ask(q=q, k=k, scale=8**-0.5, guests=1)
        step = MergeGuided(2, "cross", True, received=True)
        got = step.importance(ask.key[:, :8], ask, 8, None)
        seen = (q @ k.mT * 8**-0.5).softmax(-1).mean(1)
        for item in range(2):
            for token in range(8):
                mean = sum(float(seen[item, other, token]) for other in range(8)) / 8
                want = mean + float(seen[item, 8, token])
                assert abs(float(got[item, token]) - want) < 1e-6

    @pytest.mark.parametrize("cross", [False, True])
    def test_the_vision_tower_of_llava(self, cross: bool) -> None:
        family = FAMILIES["LLaVA"]
        model, given = family.build(), family.inputs(2, 0)
        plain = tensors(model(**given))
        transom.apply(model, "crossget", r=3, importance="received", cross=cross)
        with torch.no_grad(), transom.trace(model) as trace:
            got = tensors(model(**given))
        assert trace.lengths[-1] == 17 - 9
        assert [t.shape for t in got] == [t.shape for t in plain]
        one = tensors(model(**{name: x[1:] for name, x in given.items()}))
        torch.testing.assert_close(got[0][1:], one[0], atol=1e-5, rtol=1e-5)
        transom.remove(model)
        assert torch.equal(tensors(model(**given))[0], plain[0])


class TestLanguage:
    """LLaVA: a guest in the vision tower, a replaced first token in the language model."""

    def test_generation_and_back(self) -> None:
        family = FAMILIES["LLaVA"]
        model: Any = family.build()
        given = family.inputs(2, 0)
        plain = model.generate(**given, max_new_tokens=5, min_new_tokens=5)
        logits, before = model(**given).logits, anatomy(model)  # with hooks of the library
        fit_llava(model, 3)
        got = model.generate(**given, max_new_tokens=5, min_new_tokens=5)
        assert got.shape == plain.shape
        transom.remove(model, "crossget")  # what is left replaces the first token by itself
        torch.testing.assert_close(model(**given).logits, logits, atol=1e-5, rtol=1e-5)
        learn(model)
        assert not torch.allclose(model(**given).logits, logits, atol=1e-2)
        transom.remove(model)
        assert torch.equal(model.generate(**given, max_new_tokens=5, min_new_tokens=5), plain)
        assert anatomy(model) == before

    def test_only_the_prompt_is_changed(self) -> None:
        """Word by word behind a prompt gives what one long prompt gives."""
        family = FAMILIES["LLaVA"]
        model, given = family.build(), family.inputs(1, 0)
        fit_llava(model, 3)
        learn(model)
        with torch.no_grad():
            whole = model(**given).logits[:, -1]
            head = {**given, "input_ids": given["input_ids"][:, :-1]}
            cache = model(**head, use_cache=True).past_key_values
            last = model(input_ids=given["input_ids"][:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(last[:, 0], whole, atol=1e-4, rtol=1e-4)

    def test_the_loss_trains_cross_tokens_of_both_parts(self) -> None:
        family = FAMILIES["LLaVA"]
        model, given = family.build(), family.inputs(2, 0)
        fit_llava(model, 3).train()
        with aligning_llava(model) as alignment:
            model(**given)
        image, text = alignment.crosses()
        assert image.shape == text.shape == (3, 2, 32)
        alignment.loss().backward()
        found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert found == {n for n, _ in model.named_parameters() if ".crossget" in n}
        assert len(found) == 6

    def test_bad_input(self) -> None:
        with pytest.raises(HostError, match="multi_modal_projector"):
            fit_llava(clip())
        model = FAMILIES["LLaVA"].build()
        with pytest.raises(FitError, match="fit_llava"), aligning_llava(model):
            pass
        with pytest.raises(SettingsError):
            fit_llava(model, -1)
        assert not transom.fittings(model)
