"""BLIP and BLIP-2: fewer tokens in the vision tower, and what looks at them goes on working."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import anatomy
from tests.zoo.hf_builders import BLIP_TEXT, QUERIES, blip_2, joint
from tests.zoo.hf_inputs import images, prompt, questions, text, told_images
from tests.zoo.hf_zoo import FAMILIES
from transom.errors import TokensError

BLIP: dict[str, Any] = {
    "parts": {"vision_config": "BlipVisionConfig", "text_config": BLIP_TEXT},
    "image_text_hidden_size": 16,
}
SPEAKING = {
    "captions": (partial(joint, "BlipForConditionalGeneration", "BlipConfig", **BLIP), questions),
    "answers": (partial(joint, "BlipForQuestionAnswering", "BlipConfig", **BLIP), questions),
    "blip-2": (blip_2, partial(prompt, QUERIES)),
}
LOOKS = {"captions": "text_decoder", "answers": "text_encoder", "blip-2": "qformer"}
"""The part of each that looks at the image first."""
METHODS = {"tome": {"r": 3}, "random": {"keep_rate": 0.6}, "crossget": {"r": 3}}


def generate(model: Any, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    # the length is fixed, so that different words show
    given = {name: value.clone() for name, value in inputs.items()}  # BLIP writes into the prompt
    return model.generate(**given, max_new_tokens=6, min_new_tokens=6, **options)


def looked_at(model: nn.Module, part: str, run: Any) -> list[int]:
    """Numbers of image tokens that the layers of a part look at in one call."""
    seen: list[int] = []
    handles = [
        module.register_forward_pre_hook(
            lambda _, __, kwargs: seen.append(kwargs["encoder_hidden_states"].shape[1]),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if name.startswith(part) and name.endswith("crossattention")
    ]
    run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", SPEAKING)
def test_generation(kind: str, method: str) -> None:
    """As without a method when nothing is removed; and it works, and differs, when something is."""
    build, made = SPEAKING[kind]
    model, inputs = build(), made(3, 0)
    before = anatomy(model)
    plain = generate(model, inputs)
    drawn = partial(generate, model, inputs, do_sample=True)
    torch.manual_seed(0)
    sampled = drawn()
    transom.apply(model, method, **(transom.registry.methods()[method].neutral() or {}))
    assert torch.equal(generate(model, inputs), plain)
    torch.manual_seed(0)
    assert torch.equal(drawn(), sampled)
    transom.adjust(model, **METHODS[method])
    for restore in ("end", "never"):
        transom.remove(model)
        transom.apply(model, method, restore=restore, **METHODS[method])
        with transom.trace(model) as trace:
            words = generate(model, inputs)
        assert trace.lengths[-1] < 17
        assert words.shape == plain.shape
        drawn()
    transom.remove(model)
    assert anatomy(model) == before
    assert torch.equal(generate(model, inputs), plain)


@pytest.mark.parametrize("kind", SPEAKING)
def test_how_many_image_tokens_are_looked_at_is_the_users_choice(kind: str) -> None:
    """All of them, restored, or as many as are left; the mask of the image follows its tokens."""
    build, made = SPEAKING[kind]
    model, inputs = build(), made(2, 0)
    run = partial(generate, model, inputs)
    assert set(looked_at(model, LOOKS[kind], run)) == {17}
    outputs = []
    for restore, expected in ((None, 17), ("end", 17), ("never", 17 - 3 * 3)):
        transom.apply(model, "tome", r=3, restore=restore)
        assert set(looked_at(model, LOOKS[kind], run)) == {expected}
        options = {"labels": inputs["input_ids"]} if kind == "answers" else {}
        with torch.no_grad():
            outputs.append(model(**inputs, **options))
        transom.remove(model)
    # copies are looked at as often as they stand for tokens, so the two choices differ
    key = "loss" if kind == "answers" else "logits"
    assert torch.equal(outputs[0][key], outputs[1][key])
    assert not torch.allclose(outputs[1][key], outputs[2][key], atol=1e-4)


@pytest.mark.parametrize("kind", SPEAKING)
def test_batch_mates_do_not_matter(kind: str) -> None:
    build, made = SPEAKING[kind]
    model, inputs = build(), made(3, 0)
    transom.apply(model, "tome", r=3, restore="never")
    together = generate(model, inputs)
    for item in range(3):
        alone = generate(model, {name: x[item : item + 1] for name, x in inputs.items()})
        assert torch.equal(together[item : item + 1], alone)


def test_packed_projections_are_handed_out() -> None:
    """One linear layer to q, k and v is read as three."""
    from transom import hosts

    for family in ("BLIP vision", "BLIP-2 vision"):
        model: Any = FAMILIES[family].build()
        found = hosts.find(model).views[0].projections()
        attention = model.encoder.layers[0].self_attn
        assert found is not None and found.heads == 4
        x = torch.randn(2, 5, 32)
        packed = attention.qkv(x)
        split = [nn.functional.linear(x, *part) for part in (found.q, found.k, found.v)]
        torch.testing.assert_close(torch.cat(split, -1), packed)


class TestTextEncoder:
    """BLIP's text encoder, which looks at an image in every layer."""

    def model(self) -> nn.Module:
        return FAMILIES["BLIP text encoder"].build()

    @pytest.mark.parametrize("method", METHODS)
    def test_padding_does_not_matter(self, method: str) -> None:
        model, batch = self.model(), told_images(4)
        transom.apply(model, method, **METHODS[method])
        with torch.no_grad():
            together = model(**batch).last_hidden_state
            for item, length in enumerate(batch["attention_mask"].sum(1).tolist()):
                one = {name: x[item : item + 1] for name, x in batch.items()}
                one = {n: x if "encoder" in n else x[:, :length] for n, x in one.items()}
                alone = model(**one).last_hidden_state
                torch.testing.assert_close(
                    together[item : item + 1, :length], alone, atol=1e-5, rtol=1e-5
                )

    def test_the_image_matters_and_its_mask_is_taken_along(self) -> None:
        """A mask made for all words goes on with fewer of them."""
        model, batch = self.model(), told_images(2)
        mask = torch.ones(2, 7, dtype=torch.long)
        mask[1, 4:] = 0
        transom.apply(model, "tome", r=3)
        with torch.no_grad():
            with transom.trace(model) as trace:
                out = model(**batch, encoder_attention_mask=mask).last_hidden_state
            other = {**batch, "encoder_hidden_states": batch["encoder_hidden_states"].flip(0)}
            assert not torch.allclose(model(**other).last_hidden_state, out, atol=1e-3)
        assert trace.lengths == [11, 8, 5]

    def test_without_an_image(self) -> None:
        model, batch = self.model(), text(2)
        plain = model(**batch).last_hidden_state
        transom.apply(model, "tome", r=0)
        torch.testing.assert_close(model(**batch).last_hidden_state, plain)

    def test_word_by_word_is_refused(self) -> None:
        """The text decoder is the same class, called another way."""
        model: Any = joint("BlipForConditionalGeneration", "BlipConfig", **BLIP)
        transom.apply(model.text_decoder.bert, "tome", r=2)
        with pytest.raises(TokensError, match="vision tower"):
            generate(model, images(2))
        with pytest.raises(TokensError, match="differs between queries"):
            model.text_decoder(text(2)["input_ids"], encoder_hidden_states=torch.randn(2, 7, 32))
