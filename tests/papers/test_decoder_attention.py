"""VAR, VHR and imbalanced attention on decoders that see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from tests.zoo.test_decoders import IMAGE, inputs, language, llava, words
from transom.errors import FitError, SettingsError, TokensError
from transom.papers.lens.imbalanced_attention import (
    ImbalancedAttention,
    amplified,
    informed,
    select,
)
from transom.papers.lens.var import VAR, redistribute, sink_channels, sink_values
from transom.papers.lens.vhr import VHR, divergence, released_layers, sensitive_heads


def random_rows(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(2, 3, 5, 12, generator=generator).softmax(-1)
    sinks = torch.zeros(2, 12, dtype=torch.bool)
    sinks[:, 0] = sinks[0, 4] = sinks[1, 6] = True
    visual = torch.zeros(2, 12, dtype=torch.bool)
    visual[:, 3:9] = True
    return a, sinks, visual, torch.ones(1, 5, dtype=torch.bool)


def test_rows_keep_their_sum_and_sinks_pay() -> None:
    a, sinks, visual, rows = random_rows()
    got, chosen = redistribute(a, sinks, visual, rows, rho=0.7, total=0.3, keep=0.6)
    assert chosen.any() and not chosen.all()
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 3, 5))
    assert torch.equal(got[~chosen], a[~chosen])
    pays = sinks[:, None, None].expand_as(a) & chosen[..., None]
    torch.testing.assert_close(got[pays], 0.6 * a[pays])
    free = visual & ~sinks
    for b in range(2):
        grown = (got / a)[b, :, :, free[b]][chosen[b]]
        torch.testing.assert_close(grown, grown[:, :1].expand_as(grown))
        assert (grown > 1).all()
    words_ = (~visual & ~sinks)[:, None, None].expand_as(a)
    torch.testing.assert_close(got[words_], a[words_])


def test_keeping_all_changes_nothing_and_no_visual_sink_chooses_nothing() -> None:
    a, sinks, visual, rows = random_rows()
    torch.testing.assert_close(redistribute(a, sinks, visual, rows, rho=0, keep=1).attention, a)
    sinks = sinks & ~visual
    assert not redistribute(a, sinks, visual, rows, rho=0, total=0).chosen.any()


def test_rho_means_what_the_paper_says() -> None:
    """More than 90 percent of the image attention on a sink: no row may be chosen at rho = 0.2."""
    a = torch.full((1, 1, 1, 6), 0.01)
    a[..., 2] = 0.95
    sinks = torch.tensor([[False, False, True, False, False, False]])
    visual = torch.tensor([[False, False, True, True, True, False]])
    rows = torch.ones(1, 1, dtype=torch.bool)
    assert not redistribute(a, sinks, visual, rows, rho=0.2).chosen.any()
    assert redistribute(a, sinks, visual, rows, rho=0.01).chosen.all()


def test_planted_sinks_are_found() -> None:
    x = torch.randn(2, 9, 64)
    x[0, 4, 11] = -60
    x[1, 2, 40] = 60
    found = (sink_values(x, (11, 40)) > 5).nonzero().tolist()
    assert found == [[0, 4], [1, 2]]


@torch.no_grad()
def test_sink_channels_of_a_model() -> None:
    model, given = llava(), inputs("llava")
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    model.model.language_model.embed_tokens.weight[given["input_ids"][0, 0], 21] = 40
    assert sink_channels(model, 1, **given) == (21,)


@torch.no_grad()
def test_var_reads_and_goes_on_alike() -> None:
    """Sinks found in the prompt hold in later steps: the same as reading the longer text again."""
    model, given = llava(), inputs("llava")
    plain = model(**given).logits[:, -1]
    method = VAR(channels=(0, 1), tau=1.0, rho=0.0, total=0.0, keep=0.2, first=0)
    transom.apply(model, method)
    assert not torch.allclose(model(**given).logits[:, -1], plain)
    text = model.generate(**given, max_new_tokens=3, do_sample=False, output_logits=True,
                          return_dict_in_generate=True)  # fmt: skip
    count = given["input_ids"].shape[1]
    # a text token that becomes a sink later would pay in a new prompt, so only the first step
    longer = {**given, "input_ids": text.sequences[:, :count]}
    torch.testing.assert_close(model(**longer).logits[:, -1], text.logits[0])


@torch.no_grad()
def test_without_an_image_nothing_changes() -> None:
    given = words()
    real = given["attention_mask"].bool()
    for method in (
        VAR(channels=(0,), tau=0.1, rho=0, total=0, first=0),
        ImbalancedAttention(local=(0, 1), first=0),
    ):
        model = llava()
        plain = model(**given).logits[real]
        transom.apply(model, method)
        torch.testing.assert_close(model(**given).logits[real], plain)


def test_unknown_widths_need_channels() -> None:
    with pytest.raises(FitError, match="sink_channels"):
        transom.apply(language("Llama"), "var")
    with pytest.raises(SettingsError, match="32 channels"):
        transom.apply(language("Llama"), "var", channels=(50,))
    with pytest.raises(SettingsError, match="from 0 to 1"):
        VAR(rho=1.5)


def test_selection_of_planted_patches() -> None:
    first, late = torch.rand(16), 0.01 * torch.rand(16)
    first[[2, 5, 7, 11]] += 5
    late[[5, 9]] += 3
    found = select(first, late, 0.25)
    assert found == ((2, 7, 11), (5, 9))


def test_only_the_last_row_rises() -> None:
    logits = torch.randn(1, 2, 3, 4)
    got = amplified(logits, torch.tensor([[0.0, 0.7, 0.4, 0.0]]))
    assert torch.equal(got[:, :, :2], logits[:, :, :2])
    assert torch.equal(got[:, :, 2, [0, 3]], logits[:, :, 2, [0, 3]])
    assert (got[:, :, 2, 1] > logits[:, :, 2, 1]).all()
    torch.testing.assert_close(got[:, :, 2, 2], logits[:, :, 2, 2] + 0.4 * logits[:, :, 2, 2].abs())


@torch.no_grad()
def test_emphasis_on_a_model() -> None:
    model, given = llava(), inputs("llava")
    plain = model(**given).logits
    sets = informed(model, given["pixel_values"])
    assert len(sets) == 2 and sets[0].local and sets != [sets[0]] * 2
    transom.apply(model, ImbalancedAttention(local=(0, 4), summary=(2,), first=3))
    got = model(**given).logits
    assert torch.equal(got[0, :-1], plain[0, :-1])  # the last layer feeds no other position
    assert not torch.allclose(got[:, -1], plain[:, -1])
    transom.remove(model)
    transom.apply(model, ImbalancedAttention(local=(30,)))
    with pytest.raises(TokensError, match="patch 30"):
        model(**given)


def test_bad_emphasis() -> None:
    with pytest.raises(SettingsError, match="one of both"):
        ImbalancedAttention(local=(1, 2), summary=(2,))


def test_heads_that_ignore_the_image_do_not_diverge() -> None:
    seeing = torch.randn(3, 8, 6)
    blind = seeing.clone()
    blind[:, :3] += 1.0
    found = divergence(seeing, blind, outliers=False)
    assert found.vhd[:, 3:].abs().max() == 0
    assert found.chosen[:, :3].all() and not found.chosen[:, 3:].any()


def test_outliers_count_as_nothing() -> None:
    seeing, blind = torch.zeros(1, 8, 4), torch.zeros(1, 8, 4)
    seeing[0, :4] = 1.0
    blind[0, 7] = 30.0  # surges when the image goes
    assert divergence(seeing, blind, outliers=False).chosen[0, 7]
    assert not divergence(seeing, blind).chosen[0, 7]


@torch.no_grad()
def test_reinforced_heads() -> None:
    model, given = llava(), inputs("llava")
    one = {k: v[:1] for k, v in given.items()}
    image = one["input_ids"][0] == IMAGE
    blind = {k: one[k][:, ~image] for k in ("input_ids", "attention_mask")}
    heads = sensitive_heads(model, one, blind, layers=[0, 2, 3])
    assert heads[1] == () and all(0 < len(heads[i]) <= 2 for i in (0, 2, 3))
    plain = model(**one).logits
    transom.apply(model, VHR(heads, alpha=1.0))
    torch.testing.assert_close(model(**one).logits, plain)
    transom.remove(model)
    transom.apply(model, VHR(heads))
    assert not torch.allclose(model(**one).logits, plain)
    transom.remove(model)
    turned = sensitive_heads(model, one, blind, layers=[0, 2, 3], one_by_one=True)
    assert turned[0] == heads[0]
    assert not transom.fittings(model)


def test_layers_of_the_paper() -> None:
    assert released_layers(32) == [1, *range(18, 32)]


@pytest.mark.parametrize(
    ("settings", "word"),
    [({"heads": ((9,),)}, "which has 4"), ({"heads": ((0,),) * 9}, "has 4"),
     ({"alpha": -1.0}, "at least 0")],
)  # fmt: skip
def test_bad_heads(settings: dict[str, Any], word: str) -> None:
    with pytest.raises(SettingsError, match=word):
        transom.apply(language("Llama"), VHR(**settings))
