"""MoA: windows and ragged caches in real decoders, influence by brute force, the search."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import transom
from tests.zoo.test_decoders import SEEING, TEXT, inputs, language, words
from transom.errors import CheckpointError, SettingsError, TokensError
from transom.ops import reference
from transom.papers.attention.moa import MoA, Plan, candidates, profile, search, shared
from transom.papers.attention.moa.cached import RaggedLayer
from transom.papers.attention.moa.influence import block_sums, influence
from transom.papers.attention.moa.search import pareto
from transom.papers.attention.moa.spans import Cut, Rule, density, layout, lost, rules
from transom.papers.attention.moa.window import window_mask, windowed
from transom.registry import Method
from transom.slots import Fill

SMALL: dict[str, Any] = {"block": 2, "sink": 2, "minimum": 4, "room": 0}


def plan_of(heads: int, layers: int = 4) -> Plan:
    """Rules that differ within and between layers, in no order."""
    several = [Rule(6, 0), Rule(0, 0.25), Rule(0, 1), Rule(4, 0.125)]
    return Plan.of([[several[(i + h) % 4] for h in range(heads)] for i in range(layers)])


def dense(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, scale: float, kept: Tensor) -> Tensor:
    return reference.attention(q, k, v, bias.masked_fill(~kept, -1e30), scale)


class Written:
    """MoA's rule written out as masks over the whole history."""

    def __init__(self, plan: Plan, layer: int, cut: Cut, prompt: int) -> None:
        self.plan, self.layer, self.cut, self.prompt = plan, layer, cut, prompt

    def kept(self, places: Tensor, heads: int) -> Tensor:
        """(B, H, n, n) bool for tokens at places (B, n) of their texts, of which the first
        `prompt` columns were the prompt."""
        found = []
        for rule in self.plan.rules(self.layer):
            size = self.cut.size(rule, self.prompt)
            sink = min(size, self.cut.sink)
            block = self.cut.block
            row, column = places[:, :, None], places[:, None, :]
            seen = (column // block < sink // block) | (
                column // block > row // block - (size - sink) // block
            )
            if self.prompt <= block:
                seen = torch.ones_like(seen)
            # behind the prompt: the sink and the latest tokens, one by one
            later = (column < sink) | (column > row - (size - sink))
            behind = torch.arange(places.shape[1]) >= self.prompt
            found.append(torch.where(behind[:, None], later, seen) & (column <= row))
        return torch.stack(found, 1).repeat_interleave(heads // len(found), 1)


@dataclass(frozen=True)
class WrittenMethod(Method):
    """MoA as masks, for a prompt of known length.

    Attributes:
        plan, cut, prompt: see :class:`Written`.
    """

    plan: Any = None
    cut: Any = None
    prompt: int = 0
    slug: ClassVar[str] = "moa-written"
    takes = "decoder"

    def fit(self, host: Any) -> list[Any]:
        return [Fill(attention=self.operator(i)) for i in range(host.depth)]

    def operator(self, layer: int) -> Any:
        rule = Written(self.plan, layer, self.cut, self.prompt)

        def attend(
            q: Tensor, k: Tensor, v: Tensor, *, bias: Any, scale: float, record: Any, ask: Any
        ) -> Tensor:
            real = bias[:, 0, -1] > -1e30
            places = torch.where(real, real.cumsum(-1) - 1, 0)
            return dense(q, k, v, bias, scale, rule.kept(places, q.shape[1]))

        return attend


@pytest.mark.parametrize("name", [*TEXT, "llava", "qwen2-vl"])
@pytest.mark.parametrize("heads", [2, 4])
@torch.no_grad()
def test_ragged_decoding_is_dense_attention_with_the_masks(name: str, heads: int) -> None:
    """Every step from the ragged cache equals a whole new pass with the masks written out.

    The second text is padded in front; heads of keys and heads of queries both can have rules.
    """
    model, given = (TEXT | SEEING)[name](), inputs(name)
    other = copy.deepcopy(model)
    plan, count = plan_of(heads), given["input_ids"].shape[1]
    plain = model(**given).logits[:, -1]
    transom.apply(model, MoA.of(plan, **SMALL))
    transom.apply(other, WrittenMethod(plan, Cut(**SMALL), count))
    text = model.generate(**given, max_new_tokens=9, do_sample=False, output_logits=True,
                          return_dict_in_generate=True, eos_token_id=None)  # fmt: skip
    assert not torch.allclose(text.logits[0], plain, atol=1e-3)
    sizes = set()
    for layer in text.past_key_values.layers:
        assert isinstance(layer, RaggedLayer)
        sizes |= set(layer.ragged.sizes)
        assert layer.keys.shape[1] == sum(layer.ragged.sizes)
    assert min(sizes) < count < max(sizes) + 2
    for step, expected in enumerate(text.logits):
        longer = {**given, "input_ids": text.sequences[:, : count + step]}
        mask = given["attention_mask"]
        longer["attention_mask"] = torch.cat([mask, mask.new_ones(2, step)], 1)
        if "mm_token_type_ids" in longer:
            longer["mm_token_type_ids"] = (longer["input_ids"] == 60).int()
        if name in TEXT:
            longer["position_ids"] = (longer["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        got = other(**longer, use_cache=False).logits[:, -1]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("heads", [2, 4])
@torch.no_grad()
def test_a_prompt_without_padding_goes_block_by_block(heads: int) -> None:
    model, plan = TEXT["llama"](), plan_of(heads)
    other, ids = copy.deepcopy(model), torch.randint(3, 50, (2, 30))
    plain = model(ids, use_cache=False).logits
    transom.apply(model, MoA.of(plan, **SMALL))
    transom.apply(other, WrittenMethod(plan, Cut(**SMALL), 30))
    got = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, other(ids, use_cache=False).logits, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, plain, atol=1e-3)


@torch.no_grad()
def test_a_wide_plan_is_the_plain_model() -> None:
    model, given = TEXT["qwen3"](), words()
    text = model.generate(**given, max_new_tokens=6, do_sample=False)
    transom.apply(model, "moa", **MoA.neutral())
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), text)


@torch.no_grad()
def test_beams_and_several_new_tokens() -> None:
    """Beams move the cache's texts; a second turn brings many tokens at once."""
    model, given = TEXT["llama"](), words(batch=1)
    transom.apply(model, MoA.of(plan_of(2), **SMALL))
    model.generate(**given, max_new_tokens=5, num_beams=3, do_sample=False)
    first = model(**given, use_cache=True).past_key_values
    second = copy.deepcopy(first)
    more = torch.tensor([[7, 9, 11, 13, 15]])
    whole = model(input_ids=more, past_key_values=first, use_cache=True).logits
    for i in range(5):
        step = model(input_ids=more[:, i : i + 1], past_key_values=second, use_cache=True).logits
        torch.testing.assert_close(step[:, 0], whole[:, i], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_the_cache_takes_what_the_plan_says() -> None:
    model = language("Llama", max_position_embeddings=512)
    ids = torch.randint(3, 50, (1, 256))
    dense_bytes = sum(
        x.numel() * x.element_size()
        for layer in model(ids, use_cache=True).past_key_values.layers
        for x in (layer.keys, layer.values)
    )
    cut = {"block": 8, "sink": 8, "minimum": 16, "room": 0}
    transom.apply(model, "moa", beta=0.25, **cut)
    layers = model(ids, use_cache=True).past_key_values.layers
    assert sum(layer.ragged.nbytes for layer in layers) * 4 == dense_bytes


@torch.no_grad()
def test_a_cache_goes_with_its_method() -> None:
    model, given = TEXT["llama"](), words(batch=1)
    plain = model(**given, use_cache=True).past_key_values
    transom.apply(model, MoA.of(plan_of(2), **SMALL))
    cache = model(**given, use_cache=True).past_key_values
    more = torch.tensor([[7]])
    with pytest.raises(TokensError, match="new cache"):
        model(input_ids=more, past_key_values=plain, use_cache=True)
    with pytest.raises(TokensError, match="taken back"):
        cache.layers[0].crop(-1)
    transom.remove(model)
    with pytest.raises(RuntimeError):
        model(input_ids=more, past_key_values=cache, use_cache=True)


@pytest.mark.parametrize(
    ("count", "block", "chunk"), [(24, 4, 1), (23, 4, 4), (9, 2, 3), (5, 8, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_windows_are_masks(count: int, block: int, chunk: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    base = torch.randn(3, 2, 4, count, 8)
    local, sinks = [1, 1, 3, 9], [1, 1, 0, 2]
    mask = window_mask(torch.arange(count), local, sinks, block)
    bias = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    results = []
    for plain in (True, False):
        q, k, v = (x.to(dtype).requires_grad_() for x in base)
        if plain:
            y = reference.attention(q, k, v, bias, 8**-0.5)
        else:
            y = windowed(q, k, v, local, sinks, block, chunk=chunk)
        y.float().square().sum().backward()
        results.append([y.detach(), *(x.grad for x in (q, k, v))])
    tolerance = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=tolerance * (1 + float(b.abs().max())), rtol=0)


def test_influence_is_what_removing_a_value_does() -> None:
    """Exact for a loss that is linear in the output of the attention."""
    torch.manual_seed(0)
    q, k, v, grad = torch.randn(4, 6, 8, dtype=torch.float64).unbind(0)
    effect = influence(q, k, v, grad)
    hidden = torch.ones(6, 6, dtype=torch.bool).triu(1)
    a = ((q @ k.mT) * 8**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    base = ((a @ v) * grad).sum()
    for i, j in product(range(1, 6), range(6)):
        if j <= i:
            without = a.clone()
            without[i, j] = 0
            without[i] /= without[i].sum()
            change = ((without @ v) * grad).sum() - base
            torch.testing.assert_close(effect[i, j], change, atol=1e-9, rtol=1e-9)
    assert (effect[hidden] == 0).all()
    assert block_sums(effect, 4).shape == (2, 2)
    torch.testing.assert_close(block_sums(effect, 4).sum(), effect.abs().sum())


def test_profile_is_influence_with_the_gradient_of_the_loss() -> None:
    """Against a first-order change made by hand: the head outputs' gradients by autograd."""
    model, given = TEXT["llama"](), words(batch=1)
    flags = [p.requires_grad_(i % 2 == 0).requires_grad for i, p in enumerate(model.parameters())]
    batch = {**given, "labels": given["input_ids"]}
    found = profile(model, [batch, batch], block=4)
    assert found.shape == (4, 4, 4, 4)
    assert (found.tril() == found).all()
    assert (found.diagonal(dim1=-2, dim2=-1) > 0).all()
    assert [p.requires_grad for p in model.parameters()] == flags
    assert not transom.fittings(model)
    torch.testing.assert_close(found, profile(model, [batch], block=4))
    assert shared(found, 2).shape == (4, 2, 4, 4)
    with pytest.raises(SettingsError, match="labels"):
        profile(model, [given])
    with pytest.raises(SettingsError, match="no batch"):
        profile(model, [])


def heads_that_look(far: list[list[bool]], count: int = 16) -> Tensor:
    """Importance of heads that need everything, or their neighbours alone."""
    distance = torch.arange(count)[:, None] - torch.arange(count)
    near = ((distance >= 0) & (distance < 2)).float()
    every = (distance >= 0).float() * 0.2
    return torch.stack([torch.stack([every if f else near for f in heads]) for heads in far])


def test_the_search_gives_spans_to_heads_that_need_them() -> None:
    far = [[True, False, False, False], [False, True, False, True]]
    importance = {64: heads_that_look(far)}
    space = rules([0, 8, 16], [0, 0.25, 0.5, 1], 64, 128, 16)
    plan = search(importance, space, budget=0.5, block=4)
    spans = [[rule.span(64) for rule in plan.rules(i)] for i in range(2)]
    for heads, wants in zip(spans, far, strict=True):
        assert all((span > 32) == want for span, want in zip(heads, wants, strict=True))
        assert len(set(heads)) <= 2
    assert used(plan, 64) <= 0.5
    uniform = Plan.uniform(2, 4, 0.0, 0.25)
    assert total_lost(importance[64], plan) < total_lost(importance[64], uniform)


def used(plan: Plan, length: int, block: int = 4) -> float:
    found = [layout(r, length, block) for i in range(plan.shape[0]) for r in plan.rules(i)]
    return float(density(torch.stack(found)).mean())


def total_lost(importance: Tensor, plan: Plan, block: int = 4) -> float:
    length = importance.shape[-1] * block
    return sum(
        float(lost(importance[i, h][None], layout(rule, length, block)[None]))
        for i in range(plan.shape[0])
        for h, rule in enumerate(plan.rules(i))
    )


@pytest.mark.parametrize("seed", range(6))
def test_the_search_is_near_the_best_of_all_plans(seed: int) -> None:
    """Two layers of two heads and few rules: every plan can be tried."""
    torch.manual_seed(seed)
    importance = {32: torch.rand(2, 2, 8, 8).pow(3).tril()}
    space = rules([0, 8], [0, 0.25, 0.5], 32, 64, 8)
    budget = 0.6
    plan = search(importance, space, budget=budget, block=4)
    assert used(plan, 32) <= budget + 1e-9
    best = min(
        total_lost(importance[32], candidate)
        for rows in product(product(space, repeat=2), repeat=2)
        for candidate in [Plan.of(rows)]
        if used(candidate, 32) <= budget + 1e-9
    )
    assert total_lost(importance[32], plan) <= 1.15 * best + 1e-9


def test_budgets_hold_at_every_length() -> None:
    torch.manual_seed(0)
    importance = {n: torch.rand(3, 4, n // 4, n // 4).tril() for n in (32, 64)}
    space = rules([0, 8, 16, 24], [0, 0.25, 0.5, 1], 64, 128, 16)
    for plan in pareto(importance, space, points=3, budget=0.4, lengths=[32, 64, 128], block=4):
        assert max(used(plan, n) for n in (32, 64, 128)) <= 0.4 + 1e-9
        assert all(len(set(plan.rules(i))) <= 2 for i in range(3))
    with pytest.raises(SettingsError, match="budget"):
        search(importance, space, budget=0.01, block=4)


def test_a_budget_of_its_own_for_each_length() -> None:
    torch.manual_seed(1)
    importance = {n: torch.rand(3, 4, n // 4, n // 4).tril() for n in (32, 64)}
    space = rules([0, 8, 16, 24], [0, 0.25, 0.5, 1], 64, 128, 16)
    both = search(importance, space, budget=0.4, block=4)
    same = search(importance, space, budget={32: 0.4, 64: 0.4}, block=4)
    assert both == same
    limits = {32: 0.75, 64: 0.4}
    more = search(importance, space, budget=limits, block=4)
    assert all(used(more, n) <= limit + 1e-9 for n, limit in limits.items())
    assert used(more, 32) > 0.4  # what the shorter length may use as well
    kept = {
        name: sum(total_lost(importance[n], plan) for n in importance)
        for name, plan in (("more", more), ("both", both))
    }
    assert kept["more"] < kept["both"]
    with pytest.raises(SettingsError, match="budget"):
        search(importance, space, budget={32: 0.5, 64: 1.5}, block=4)


def test_the_search_space_of_the_paper() -> None:
    found = candidates(8192, 16384, 2048)
    assert Rule(0.0, 0.5) in found
    assert Rule(-1024.0, 1.0) in found  # of the published plan for Vicuna-7B
    assert Rule(-2048.0, 1.0) not in found  # nothing is left of it at the shortest length
    assert Rule(1024.0, 1.0) not in found  # longer than the input
    assert all(r.span(16384) <= 16384 and r.span(2048) > 0 for r in found)


def test_plans_are_files(tmp_path: Path) -> None:
    plan, path = plan_of(4), tmp_path / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    model = transom.apply(language("Llama"), MoA.of(Plan.load(path), **SMALL))
    assert transom.fittings(model)[0].method == MoA.of(plan, **SMALL)
    for text in ("[]", '{"alphas": [[1]]}', '{"alphas": [[1]], "betas": [[1, 2]]}', "{"):
        path.write_text(text)
        with pytest.raises(CheckpointError, match="no plan"):
            Plan.load(path)
    with pytest.raises(CheckpointError, match="no file"):
        Plan.load(tmp_path / "other.json")


@pytest.mark.parametrize(
    "given",
    [
        {"alphas": ((1.0,),)},
        {"minimum": 64},
        {"block": 0},
        {"alphas": ((1.0,),), "betas": ((1.0, 2.0),)},
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        MoA(**given)


def test_a_plan_for_another_model_is_refused() -> None:
    with pytest.raises(SettingsError, match="4 layers of 3 heads"):
        transom.apply(language("Llama"), MoA.of(plan_of(3)))
