"""TransNeXt: tables of any size, reach of one block, prefix tokens of a host."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor

import transom
from tests.common.hosts import HOSTS, call, images
from transom.errors import SettingsError, TokensError
from transom.papers.attention.transnext import AggregatedAttention, TransNeXt, TransNeXtBlock
from transom.papers.attention.transnext.geometry import geometry, stage_sizes
from transom.papers.attention.transnext.method import Aggregate
from transom.slots import Ask
from transom.tokens import Layout, Record

SMALL: dict[str, Any] = {
    "img_size": 64,
    "embed_dims": (8, 16, 24, 32),
    "num_heads": (1, 2, 3, 4),
    "depths": (1, 1, 2, 1),
    "mlp_ratios": (3, 3, 2, 2),
    "num_classes": 5,
}


def small(**changes: Any) -> TransNeXt:
    torch.manual_seed(0)
    model = TransNeXt(**{**SMALL, **changes}).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize(
    ("grid", "pooled", "pretrained"),
    [((6, 8), (3, 4), (6, 8)), ((7, 5), (2, 3), (6, 6)), ((4, 4), (4, 4), (9, 9))],
)
def test_tables_are_those_of_every_pair(grid: Any, pooled: Any, pretrained: Any) -> None:
    """Coordinates of queries minus means of pooled positions, with a sign and a logarithm."""
    tables = geometry(grid, pooled, pretrained, 3)
    axes = []
    for length, count, trained in zip(grid, pooled, pretrained, strict=True):
        query = torch.arange(length, dtype=torch.float64)
        key = F.adaptive_avg_pool1d(query[None], count)[0]
        far = (query[:, None] - key) / (trained - 1) * 8
        axes.append(far.sign() * (far.abs() + 1).log2() / 3)
    rows, columns = axes
    shape = (*grid, *pooled)
    pairs = torch.stack(
        [rows[:, None, :, None].expand(shape), columns[None, :, None, :].expand(shape)], -1
    )
    found = tables.coords[tables.pair]
    torch.testing.assert_close(found, pairs.reshape(-1, 2).float())
    assert len(tables.coords) == len(tables.coords.unique(dim=0)) <= len(tables.pair)
    assert tables.inside is not None
    counts = tables.inside.sum(-1)
    assert counts[0, 0] == counts[-1, -1] == 4
    assert counts[1:-1, 1:-1].eq(9).all()


def test_one_block_sees_the_whole_image_and_most_of_it_coarsely() -> None:
    module = AggregatedAttention(16, 2).double()
    x = torch.randn(1, 64, 16, dtype=torch.float64, requires_grad=True)
    tables = geometry((8, 8), (2, 2), (8, 8), 3)
    (slope,) = torch.autograd.grad(module(x, (8, 8), tables)[0, 27].square().sum(), x)
    strength = slope[0].norm(dim=-1).view(8, 8)
    assert (strength > 0).all()
    near = strength[2:5, 2:5]
    outside = strength.clone()
    outside[2:5, 2:5] = 0
    assert near.mean() > 5 * outside.sum() / 55


@pytest.mark.parametrize("size", [32, 96, (64, 96), (70, 50)])
@torch.no_grad()
def test_other_image_sizes(size: Any) -> None:
    """Tables made in the call are those that set_input_size keeps, on the trained scale."""
    h, w = (size, size) if isinstance(size, int) else size
    model, x = small(sr_ratios=(4, 2, 2, 1)), torch.randn(1, 3, h, w)
    out = model(x)
    assert out.isfinite().all()
    model.set_input_size(size)
    assert torch.equal(model(x), out)
    built = small(sr_ratios=(4, 2, 2, 1), img_size=size, pretrain_size=64)
    assert torch.equal(built(x), out)
    _, maps = model.forward_intermediates(x)
    assert [tuple(m.shape[2:]) for m in maps] == stage_sizes((h, w), 4, 4)
    other = small(sr_ratios=(4, 2, 2, 1), img_size=size)
    assert torch.equal(other(x), out) == ((h, w) == (64, 64))


@torch.no_grad()
def test_the_linear_mode_has_a_fixed_number_of_far_keys() -> None:
    model = small(fixed_pool_size=2)
    for size in (64, 128):
        tables: Any = [m for m in model.modules() if type(m).__name__ == "Tables"]
        grids = stage_sizes((size, size), 4, 4)
        made = [t(grid, torch.device("cpu")) for t, grid in zip(tables, grids, strict=True)]
        assert [g.pooled for g in made] == [(2, 2), (2, 2), (2, 2), grids[3]]
        assert model(torch.randn(1, 3, size, size)).shape == (1, 5)


def test_an_image_that_leaves_nothing_to_pool() -> None:
    with pytest.raises(SettingsError, match="leaves no keys"):
        small()(torch.randn(1, 3, 24, 24))
    with pytest.raises(SettingsError, match="4 values"):
        small(depths=(1, 1))
    with pytest.raises(SettingsError, match="heads"):
        small(num_heads=(3, 2, 3, 4))


def test_coordinates_stay_precise_in_half_precision() -> None:
    model: Any = small()
    before = model.tables1.coords.clone()
    model.bfloat16()
    assert torch.equal(model.tables1.coords, before)
    assert model(torch.randn(1, 3, 64, 64).bfloat16()).dtype == torch.bfloat16
    assert not any("tables" in name for name in model.state_dict())


def test_the_coordinate_network_has_no_weight_decay() -> None:
    free = {name.rpartition("attn.")[2] for name in small().no_weight_decay()}
    assert free == {
        *("query_embedding", "temperature", "relative_pos_bias_local"),
        *("cpb_fc1.weight", "cpb_fc1.bias", "cpb_fc2.weight", "cpb_fc2.bias"),
    }


def test_the_first_stage_of_features_alone() -> None:
    model = timm.create_model("transnext_micro", features_only=True, out_indices=(0, 1))
    assert not any("block3" in name for name, _ in model.named_parameters())
    assert model.feature_info.channels() == [48, 96]


def ask(prefix: int, grid: tuple[int, int], bias: Tensor | None = None) -> Ask:
    return Ask(bias, record=Record(Layout(prefix, grid, prefix + grid[0] * grid[1])))


@torch.no_grad()
def test_without_prefix_a_host_gets_the_plain_attention() -> None:
    model = transom.apply(HOSTS["timm-average"](), TransNeXtBlock("attention"))
    mixer = transom.fittings(model)[0].fills[0].mixer
    assert isinstance(mixer, Aggregate)
    h = torch.randn(2, 16, 32)
    expected = mixer.attention(h, (4, 4), geometry((4, 4), (2, 2), (4, 4), 3))
    torch.testing.assert_close(mixer(h, ask(0, (4, 4))), expected)


def test_patches_and_prefix_see_each_other() -> None:
    model = transom.apply(HOSTS["timm-registers"](), TransNeXtBlock("attention"))
    mixer = transom.fittings(model)[0].fills[1].mixer
    assert isinstance(mixer, Aggregate)
    h = torch.randn(1, 21, 32, requires_grad=True)
    y = mixer(h, ask(5, (4, 4)))
    for query in (0, 20):
        (slope,) = torch.autograd.grad(y[0, query].square().sum(), h, retain_graph=True)
        assert (slope[0].norm(dim=-1) > 0).all()
    with pytest.raises(TokensError, match="padding"):
        mixer(h, ask(5, (4, 4), torch.zeros(1, 1, 1, 21)))


@pytest.mark.parametrize("parts", ["both", "attention", "ffn"])
@torch.no_grad()
def test_parts_of_a_block(parts: Any) -> None:
    model, x = HOSTS["hf-vit"](), images("hf-vit")
    plain = call(model, x)
    transom.apply(model, "transnext", parts=parts)
    filled = {"both": {"attention", "ffn"}}.get(parts, {parts})
    assert all(fill.slots() == filled for fill in transom.fittings(model)[0].fills)
    assert not torch.equal(call(model, x)[0], plain[0])
    transom.remove(model)
    assert torch.equal(call(model, x)[0], plain[0])


def test_a_convolution_of_one_position() -> None:
    model = transom.apply(HOSTS["timm-class"](), TransNeXtBlock("ffn"))
    ffn: Any = transom.fittings(model)[0].fills[0].ffn
    h = torch.randn(1, 17, 32)
    alone = ffn(h, Record(Layout(1, (4, 4), 17)))[:, :1]
    torch.testing.assert_close(alone, ffn.glu(h[:, :1], (1, 1)))


@pytest.mark.parametrize("settings", [{"window": 2}, {"sr_ratio": 0}, {"mlp_ratio": 0.5}])
def test_what_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="expected"):
        TransNeXtBlock(**settings)
