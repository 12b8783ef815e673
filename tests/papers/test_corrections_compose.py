"""VAR, VHR and imbalanced attention share one attention: any of them, in any order, reversibly."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import transom
from tests.common.cases import anatomy
from tests.zoo.test_decoders import SEEING, WriteOut, inputs, language, llava, own
from transom.errors import FitError
from transom.hosts import Host
from transom.instrumented import Instrumented
from transom.papers.lens.imbalanced_attention import Emphasise, ImbalancedAttention, amplified
from transom.papers.lens.var import VAR, Redistribute, redistribute, sink_values
from transom.papers.lens.vhr import VHR, Reinforce
from transom.registry import Method
from transom.slots import Ask, Fill

METHODS: dict[str, Method] = {
    "vhr": VHR(heads=((0,), (1, 2), (3,), (0, 1)), alpha=2.0),
    "var": VAR(channels=(0, 1), tau=1.0, rho=0.0, total=0.0, keep=0.3, first=0),
    "imbalanced-attention": ImbalancedAttention(local=(0, 3), summary=(2,), first=0),
}
ORDERS = list(itertools.permutations(METHODS))


def fit(model: torch.nn.Module, slugs: tuple[str, ...]) -> None:
    for slug in slugs:
        transom.apply(model, METHODS[slug], check=False)


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_all_together_in_any_order_and_back(name: str) -> None:
    model, given = SEEING[name](), inputs(name)
    plain = model(**given).logits
    before = anatomy(model)
    alone = {}
    for slug in METHODS:
        fit(model, (slug,))
        alone[slug] = model(**given).logits
        transom.remove(model, slug)
    first = None
    for order in ORDERS:
        fit(model, order)
        assert [f.slug for f in transom.fittings(model)] == list(order)
        together = model(**given).logits
        first = together if first is None else first
        assert torch.equal(together, first)
        for slug in METHODS:  # each one counts, none covers another
            assert not torch.allclose(together[:, -1], alone[slug][:, -1])
        transom.remove(model, order[1])
        transom.remove(model, order[0])
        assert torch.equal(model(**given).logits, alone[order[2]])
        transom.remove(model, order[2])
        assert own(anatomy(model)) == own(before)
        assert torch.equal(model(**given).logits, plain)


@torch.no_grad()
def test_two_of_three_differ_from_each_alone_and_generation_goes_on() -> None:
    model, given = llava(), inputs("llava")
    plain = model.generate(**given, max_new_tokens=6, do_sample=False)
    for pair in itertools.combinations(METHODS, 2):
        fit(model, pair)
        settings: Any = {"max_new_tokens": 6, "do_sample": False, "output_logits": True}
        text = model.generate(**given, **settings, return_dict_in_generate=True)
        # the first step is the prompt pass, so the prompt read alone has to say the same
        torch.testing.assert_close(model(**given).logits[:, -1], text.logits[0])
        transom.remove(model)
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), plain)


def test_the_stages_are_the_formulas_one_after_another() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 7, 8, generator=generator).double() for _ in range(3))
    stream = torch.randn(2, 7, 16, generator=generator).double()
    visual = torch.zeros(2, 7, dtype=torch.bool)
    visual[:, 1:5] = True
    bias = torch.zeros(7, 7).double().masked_fill(torch.ones(7, 7).triu(1).bool(), -torch.inf)
    var = VAR(channels=(3, 5), tau=1.2, rho=0.0, total=0.0, keep=0.4)
    emphasis = Emphasise(ImbalancedAttention(local=(0,), summary=(3,), alpha=0.7, beta=0.4))
    operator = Instrumented(
        last=emphasis,
        probabilities=Redistribute(var, (3, 5)),
        heads=Reinforce((0, 2), 3.0),
    )
    ask = Ask(visual=visual, stream=stream, memory={})
    got = operator(q, k, v, bias=bias[None, None], scale=0.3, ask=ask)

    logits = (q @ k.mT) * 0.3 + bias
    rises = torch.tensor([0.0, 0.7, 0.0, 0.0, 0.4, 0.0, 0.0]).double()[None]
    a = amplified(logits, rises).softmax(-1)
    sinks = sink_values(stream, (3, 5)) > 1.2
    assert (sinks & visual).any(1).all()
    behind = (torch.arange(7) > 4)[None]
    a = redistribute(a, sinks, visual, behind, rho=0.0, total=0.0, keep=0.4).attention
    out = a @ v
    out[:, [0, 2]] *= 3.0
    torch.testing.assert_close(got, out)


@dataclass(frozen=True)
class Louder(Method):
    """A second correction of what heads say."""

    slug: ClassVar[str] = "louder"
    takes = "decoder"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(attention=Instrumented(heads=Reinforce((0,), 2.0)))] * host.depth


@pytest.mark.parametrize("second", [Louder(), WriteOut()], ids=["same stage", "whole attention"])
@torch.no_grad()
def test_what_cannot_be_shared_is_refused(second: Method) -> None:
    model, given = llava(), inputs("llava")
    transom.apply(model, METHODS["vhr"])
    fitted: Tensor = model(**given).logits
    with pytest.raises(FitError, match="'attention' of block 0 is taken by vhr"):
        transom.apply(model, second)
    assert torch.equal(model(**given).logits, fitted)
    transom.remove(model)
    transom.apply(model, second)
    with pytest.raises(FitError, match="is taken by"):
        transom.apply(model, METHODS["vhr"])


@torch.no_grad()
def test_a_decoder_without_images_is_only_reinforced() -> None:
    model = language("Llama")
    given = inputs("llama")
    transom.apply(model, METHODS["vhr"])
    reinforced = model(**given).logits
    fit(model, ("var", "imbalanced-attention"))
    assert torch.equal(model(**given).logits, reinforced)
