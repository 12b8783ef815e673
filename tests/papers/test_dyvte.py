"""DyVTE on decoders that see: exits are exact, each prompt decides for itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from tests.zoo.test_decoders import IMAGE, SEEING, inputs, language, words
from transom.errors import SettingsError
from transom.papers.tokens.dyvte import (
    DyVTE,
    Router,
    exit_layers,
    exits,
    router_loss,
    routers,
    text_state,
)


def logits(model: Any, given: dict[str, Tensor], **options: Any) -> Tensor:
    return model(**given, **options).logits[:, -1]


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_leaving_equals_hiding(name: str) -> None:
    """Taking the image out behind a layer gives what masking its keys behind that layer gives."""
    model, given = SEEING[name](), inputs(name)
    plain = logits(model, given)
    outs = []
    for hide in (False, True):
        transom.apply(model, DyVTE(exit_layer=1, hide=hide))
        outs.append(logits(model, given))
        text = model.generate(**given, max_new_tokens=4, do_sample=False)
        outs.append(text)
        transom.remove(model)
    torch.testing.assert_close(outs[0], outs[2], atol=1e-5, rtol=1e-5)
    assert torch.equal(outs[1], outs[3])
    assert (outs[0] - plain).abs().max() > 1e-4


@torch.no_grad()
def test_cache_is_shorter_behind_the_exit() -> None:
    model, given = SEEING["llava"](), inputs("llava")
    transom.apply(model, DyVTE(exit_layer=1))
    cache = model(**given, use_cache=True).past_key_values
    assert [cache.get_seq_length(i) for i in range(4)] == [20, 20, 11, 11]


class Decided(Router):
    """A router that says yes for the prompts it is told."""

    def __init__(self, yes: list[bool]) -> None:
        super().__init__(32, 4)
        self.yes = torch.tensor(yes)

    def forward(self, f: Tensor) -> Tensor:
        return torch.stack([1 - self.yes.float(), self.yes.float()], -1)


@torch.no_grad()
def test_each_prompt_of_a_batch_decides_for_itself() -> None:
    model, given = SEEING["llava"](), inputs("llava")
    alone = []
    for layer in (0, 2):
        transom.apply(model, DyVTE(exit_layer=layer))
        alone.append(logits(model, given))
        transom.remove(model)
    transom.apply(model, DyVTE(width=4))
    fills = transom.fittings(model)[0].fills
    for fill, yes in zip(fills, ([True, False], [True, False], [True, True]), strict=False):
        assert fill.after is not None
        fill.after.router = Decided(yes)
    images = given["input_ids"] == IMAGE
    with transom.trace(model) as trace:
        got = logits(model, given)
    assert exit_layers(trace, images) == [0, 2]
    torch.testing.assert_close(got[0], alone[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(got[1], alone[1][1], atol=1e-5, rtol=1e-5)
    assert trace.lengths == [20, 20, 11, 11]


@torch.no_grad()
def test_exits_of_many_prompts_are_counted() -> None:
    model, given = SEEING["llava"](), inputs("llava")
    transom.apply(model, DyVTE(width=4))
    assert len(routers(model)) == 3
    fills = transom.fittings(model)[0].fills
    for fill, yes in zip(fills, ([True, False], [True, False], [True, False]), strict=False):
        assert fill.after is not None
        fill.after.router = Decided(yes)
    found = exits(model, [given, given])
    assert found.layers == (0, None, 0, None) and found.depth == 4
    assert found.counts == {0: 2, None: 2} and found.mean == (1 + 4) / 2
    with pytest.raises(SettingsError, match="no prompt holds an image"):
        exits(model, [words()])


@torch.no_grad()
def test_no_image_no_exit() -> None:
    model, given = SEEING["llava"](), words()
    plain = model(**given).logits
    transom.apply(model, DyVTE(width=8))
    with transom.trace(model) as trace:
        got = model(**given).logits
    assert trace.lengths == [14] * 4
    real = given["attention_mask"].bool()
    torch.testing.assert_close(got[real], plain[real], atol=1e-5, rtol=1e-5)


def test_an_image_at_the_end_of_the_prompt_stays() -> None:
    """No text lies behind it, so the mean is NaN and no router may fire on it."""
    visual = torch.tensor([[False, True, True]])
    f = text_state(torch.randn(1, 3, 4), visual)
    assert f[:, :4].isnan().all()
    gate = Router(4, 8)(f)
    assert not (gate[:, 1] > gate[:, 0]).any()


def test_several_images_are_one_to_the_text_behind_them() -> None:
    h = torch.randn(1, 8, 4)
    visual = torch.tensor([[False, True, False, True, False, False, False, False]])
    f = text_state(h, visual)
    torch.testing.assert_close(f, torch.cat([h[:, 4:7].mean(1), h[:, 7]], -1))


def test_routers_learn_where_answers_agree() -> None:
    """A planted rule: the sign of one channel says whether the image is still needed."""
    torch.manual_seed(0)
    router = Router(8, 16)
    steps = torch.optim.Adam(router.parameters(), 1e-2)
    state = torch.randn(256, 16)
    needed = state[:, 3] > 0
    full = torch.randn(256, 5, 11)
    without = torch.where(needed[:, None, None], torch.randn(256, 5, 11), full)
    labels = full.argmax(-1).roll(1, 1)
    labels[:, 0] = -100
    for _ in range(150):
        steps.zero_grad()
        found = router_loss(router(state), full, without, labels)
        found.loss.backward()
        steps.step()
    assert torch.equal(found.labels, (~needed).long())
    gate = router(state)
    assert ((gate[:, 1] > gate[:, 0]) == ~needed).float().mean() > 0.97


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"exit_layer": -1}, "number of a layer"), ({"width": 0}, "hidden channel"),
     ({"exit_layer": 3}, "expected 0 to 2")],
)  # fmt: skip
def test_bad_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        transom.apply(language("Llama"), "dyvte", **settings)


def test_routers_are_saved_and_loaded(tmp_path: Any) -> None:
    model, given = SEEING["llava"](), inputs("llava")
    transom.apply(model, DyVTE(width=8))
    with torch.no_grad():
        expected = logits(model, given)
    transom.save(model, tmp_path / "routers.safetensors")
    transom.remove(model)
    transom.load(model, tmp_path / "routers.safetensors")
    with torch.no_grad():
        torch.testing.assert_close(logits(model, given), expected)
