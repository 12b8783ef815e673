"""DPN on decoders that see: pooling inside a prompt, different strides in one batch, routing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import transom
from tests.zoo.test_decoders import IMAGE, inputs, language, llava, words
from transom.errors import SettingsError, TokensError
from transom.papers.tokens.dpn import DPN, Router, draw, pool, routing_loss

ONE: dict[str, Any] = {"layers": (1,), "strides": (((1, 1), (3, 3)),)}


@pytest.mark.parametrize("size", [(6, 6), (5, 7), (9, 4)])
@pytest.mark.parametrize("stride", [(1, 1), (2, 2), (3, 2)])
@pytest.mark.parametrize("function", ["max", "average"])
def test_pooling_is_that_of_torch(size: Any, stride: Any, function: str) -> None:
    v = torch.randn(size[0] * size[1], 5)
    got = pool(v, size, stride, function)
    grid = v.T.reshape(1, 5, *size)
    layer = F.max_pool2d if function == "max" else F.avg_pool2d
    expected = layer(grid, stride)
    assert got.size == tuple(expected.shape[2:])
    torch.testing.assert_close(got.x, expected.flatten(2)[0].T)


class Decided(Router):
    """A router that picks what it is told, surely."""

    def __init__(self, picks: list[int]) -> None:
        super().__init__(32, 2)
        self.picks = torch.tensor(picks)

    def forward(self, c: Tensor) -> Tensor:
        return F.one_hot(self.picks, 2) * 1e4


def decided(model: Any, picks: list[int]) -> None:
    transom.apply(model, DPN(**ONE))
    step = transom.fittings(model)[0].fills[1].after
    assert step is not None
    step.router = Decided(picks)


def two_prompts() -> dict[str, Tensor]:
    """A batch without padding."""
    given = inputs("llava")
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    given["input_ids"][1, :3] = torch.tensor([7, 8, 9])
    return given


@torch.no_grad()
def test_different_strides_in_one_batch() -> None:
    """Each prompt goes on as if it were alone, while reading and while generating."""
    model, given = llava(), two_prompts()
    alone = []
    for b, pick in enumerate((1, 0)):
        decided(model, [pick])
        one = {k: v[b : b + 1] for k, v in given.items()}
        alone.append(
            (model(**one).logits[:, -1], model.generate(**one, max_new_tokens=5, do_sample=False))
        )
        transom.remove(model)
    decided(model, [1, 0])
    with transom.trace(model) as trace:
        out = model(**given)
    assert trace.lengths == [20] * 4
    text = model.generate(**given, max_new_tokens=5, do_sample=False)
    for b, (last, words_) in enumerate(alone):
        torch.testing.assert_close(out.logits[b : b + 1, -1], last, atol=1e-4, rtol=1e-4)
        assert torch.equal(text[b, : words_.shape[1]], words_[0])


@torch.no_grad()
def test_tokens_and_cache_shrink_together() -> None:
    model, given = llava(), two_prompts()
    transom.apply(model, DPN(layers=(1,), strides=(((3, 3),),), adaptive=False))
    with transom.trace(model) as trace:
        cache = model(**given, use_cache=True).past_key_values
    assert trace.lengths == [20, 12, 12, 12]
    assert [cache.get_seq_length(i) for i in range(4)] == [20, 20, 12, 12]
    record = trace.tokens[1]
    assert record.visual is not None and record.visual.sum(1).tolist() == [1, 1]
    assert record.index is not None
    image = given["input_ids"][0] == IMAGE
    assert record.index[0, image].tolist() == [5] * 9  # all flowed into the one that is left


@torch.no_grad()
def test_small_images_and_prompts_without_one_are_left_alone() -> None:
    model = llava()
    transom.apply(model, DPN(layers=(1,), strides=(((4, 4),),), adaptive=False))
    for given in (inputs("llava"), words()):
        with transom.trace(model) as trace:
            model(**given)
        assert len(set(trace.lengths)) == 1


def test_a_prompt_without_the_router_word_is_refused() -> None:
    model = llava()
    transom.apply(model, DPN(**ONE, router_token=55))
    with pytest.raises(TokensError, match="has no word 55"):
        model(**inputs("llava"))
    given = inputs("llava")
    given["input_ids"][:, 17] = 55
    assert model(**given).logits.isfinite().all()


def test_a_map_that_is_no_square_needs_its_grid() -> None:
    model, given = llava(), inputs("llava")
    transom.apply(model, DPN(**ONE, image_grid=(2, 5)))
    with pytest.raises(TokensError, match="make no map"):
        model(**given)
    transom.remove(model)
    transom.apply(model, DPN(layers=(1,), strides=(((1, 3),),), adaptive=False, image_grid=(3, 3)))
    with transom.trace(model) as trace:
        model(**given)
    assert trace.lengths[1] == 14


def test_draws_leave_enough_tokens() -> None:
    probs = torch.tensor([[0.01, 0.01, 0.98]] * 200)
    strides = [(1, 1), (2, 2), (4, 4)]
    found = draw(probs, strides, [(10, 10)] * 200)
    assert set(found.tolist()) == {0, 1}  # 4 x 4 would leave 4 tokens
    assert set(draw(probs, strides, [(4, 4)] * 200).tolist()) == {0}
    assert draw(probs, strides, [(24, 24)] * 200).bincount()[2] > 150


def test_the_loss_pushes_routers_towards_stronger_pooling() -> None:
    torch.manual_seed(0)
    router = Router(16, 3)
    optimizer = torch.optim.Adam(router.parameters(), 1e-2)
    c = torch.randn(64, 16)
    before = after = 0.0
    for step in range(60):
        probs = (router(c)).softmax(-1)
        loss = routing_loss([probs])
        before = before if step else float(loss.detach())
        after = float(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert after < 0.5 * before
    assert router(c).argmax(-1).float().mean() > 1.5


def test_the_routing_loss_of_a_fitted_model_reaches_its_routers() -> None:
    model, given = llava().requires_grad_(False), two_prompts()
    method = DPN(layers=(1,), strides=(((1, 1), (3, 3)),))
    torch.manual_seed(0)
    transom.apply(model, method)
    (router,) = (m for m in model.modules() if isinstance(m, Router))
    router.requires_grad_(True)
    with torch.no_grad():  # the second stride wins
        router.predictor.weight[1] = 5 * router.mlp1(torch.randn(8, 32)).mean(0)
    training = method.training(coefficient=0.5, margin=1.0)
    assert training.at_step(model, 0, 1) == {}
    model.train()
    out = model(**given).logits
    loss = training.extra_loss(model, out)
    assert loss is not None and 0 <= loss <= 0.5
    assert training.extra_loss(model, out) is None, "one loss a pass"
    model(**given)
    model.eval()
    training.at_step(model, 1, 1)
    model(**given)
    assert training.extra_loss(model, out) is None, "nothing is noted after training"
    for wrong in ({"margin": -1.0}, {"coefficient": -0.1}, {"speed": 1}):
        with pytest.raises(SettingsError, match="dpn's training has"):
            method.training(**wrong)


@torch.no_grad()
def test_tables_of_positions_are_made_once_a_length() -> None:
    model, given = llava(), two_prompts()
    transom.apply(model, DPN(layers=(1,), strides=(((3, 3),),), adaptive=False))
    calls: list[int] = []
    rotary = model.model.language_model.rotary_emb
    hook = rotary.register_forward_hook(lambda module, given, out: calls.append(out[0].shape[1]))
    cache = model(**given, use_cache=True).past_key_values
    assert calls == [20, 12], "one for the host, one for the three layers behind the pooling"
    calls.clear()
    word = given["input_ids"][:, -1:]
    model(input_ids=word, past_key_values=cache, use_cache=True)
    assert len(calls) == 2, "the host's for the long caches, one for both of the short ones"
    hook.remove()


@pytest.mark.parametrize(
    ("settings", "word"),
    [
        ({"layers": (3, 1), "strides": (((1, 1),),) * 2}, "rising"),
        ({"layers": (1,)}, "3 entries for 1"),
        ({"strides": (((0, 2),),)}, "at least 1"),
        ({"pooling": "median"}, "'max' or 'average'"),
        ({"layers": (7,), "strides": (((2, 2),),)}, "layers 0 to 3"),
    ],
)
def test_bad_settings(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        transom.apply(language("Llama"), "dpn", **settings)
