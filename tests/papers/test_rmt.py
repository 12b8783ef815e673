"""RMT: what only Manhattan self-attention and its network need."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import transom
from tests.common.cases import close
from tests.common.hosts import HOSTS, call, images, randomised
from transom.convert import convert
from transom.errors import FitError, SettingsError, TokensError
from transom.papers.attention.rmt import ManhattanDecay, VisRetNet
from transom.papers.attention.rmt.attention import (
    MaSA,
    RelPos,
    axis_mask,
    decays,
    decomposed,
    full,
    grid_mask,
)
from transom.papers.attention.rmt.backbone import exchanged, mixing_box
from transom.papers.attention.rmt.method import Decay
from transom.tokens import Layout, Record

GRID = (3, 5)


def maps(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def small(**changes: Any) -> VisRetNet:
    settings: dict[str, Any] = {
        "embed_dims": (8, 16, 16, 32),
        "depths": (1, 2, 2, 1),
        "num_heads": (2, 2, 2, 4),
        "projection": 24,
        "num_classes": 5,
    }
    torch.manual_seed(0)
    return VisRetNet(**{**settings, **changes})


def test_heads_decay_slower_one_after_the_other() -> None:
    decay = decays(4, 2, 4)
    expected = torch.tensor([1 - 0.5 ** (2 + k) for k in range(4)])
    torch.testing.assert_close(decay.exp(), expected)


def test_without_queries_attention_is_a_kernel_of_the_manhattan_distance() -> None:
    """exp(-|distance|) smoothing by hand, head by head; and it separates into both axes."""
    height, width = GRID
    decay = decays(3, 2, 4).double()
    v = maps(2, height, width, 3, 4)
    nothing = torch.zeros_like(v)
    got = full(nothing, nothing, v, grid_mask(decay, height, width))
    for head in range(3):
        gamma = decay[head].exp().item()
        for row in range(height):
            for column in range(width):
                kernel = torch.tensor(
                    [
                        [gamma ** (abs(row - r) + abs(column - c)) for c in range(width)]
                        for r in range(height)
                    ],
                    dtype=torch.float64,
                )
                kernel = kernel / kernel.sum()
                expected = torch.einsum("hw,bhwd->bd", kernel, v[:, :, :, head])
                torch.testing.assert_close(got[:, row, column, head], expected)
    apart = decomposed(nothing, nothing, v, axis_mask(decay, height), axis_mask(decay, width))
    torch.testing.assert_close(apart, got)


def test_fused_forms_are_the_written_out_ones() -> None:
    height, width = GRID
    decay = decays(3, 1, 5).double()
    q, k, v = (maps(2, height, width, 3, 4, seed=seed) for seed in range(3))
    rows = torch.einsum("bhwnd,bhxnd->bnhwx", q, k) / 2 + axis_mask(decay, width)[:, None]
    between = torch.einsum("bnhwx,bhxnd->bhwnd", rows.softmax(-1), v)
    columns = torch.einsum("bhwnd,bywnd->bnwhy", q, k) / 2 + axis_mask(decay, height)[:, None]
    expected = torch.einsum("bnwhy,bywnd->bhwnd", columns.softmax(-1), between)
    got = decomposed(q, k, v, axis_mask(decay, height), axis_mask(decay, width))
    torch.testing.assert_close(got, expected)

    logits = torch.einsum("bhwnd,byxnd->bnhwyx", q, k).flatten(-2) / 2
    distance = torch.tensor(
        [
            [abs(i // width - j // width) + abs(i % width - j % width) for j in range(15)]
            for i in range(15)
        ]
    )
    weights = (logits.flatten(2, 3) + decay[:, None, None] * distance).softmax(-1)
    expected = torch.einsum("bnij,bjnd->bind", weights, v.flatten(1, 2)).unflatten(1, GRID)
    torch.testing.assert_close(full(q, k, v, grid_mask(decay, height, width)), expected)


def test_decomposed_attention_costs_rows_and_columns() -> None:
    side = 28
    flops = {}
    for form in ("full", "decomposed"):
        with torch.device("meta"):
            masa, relpos = MaSA(32, 4), RelPos(32, 4, 2, 4)
            tables = relpos(side, side, form)
            with FlopCounterMode(display=False) as counter:
                masa(torch.empty(1, side, side, 32), tables)
        flops[form] = counter.get_flop_counts()["Global"]
    products = {form: flops[form][torch.ops.aten.bmm] for form in flops}
    assert products["full"] == 2 * 2 * side**4 * 32
    assert products["decomposed"] == 2 * 2 * side**2 * (2 * side) * 32


def test_tables_stay_exact_in_half_precision() -> None:
    relpos = RelPos(32, 2, 2, 4)
    exact = relpos(56, 56, "decomposed")
    cast = relpos.bfloat16()(56, 56, "decomposed")
    for a, b in zip(exact, cast, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert RelPos(32, 2, 2, 4).double().angle.dtype == torch.float64


def test_widths_that_cannot_be_turned_are_refused() -> None:
    with pytest.raises(SettingsError, match="pairs of channels"):
        RelPos(12, 4, 2, 4)
    with pytest.raises(SettingsError, match="one a stage"):
        small(depths=(1, 1))
    with pytest.raises(SettingsError, match="global_pool"):
        small(global_pool="max")


@pytest.mark.parametrize("size", [(96, 160), (75, 101)])
@torch.no_grad()
def test_other_image_sizes(size: tuple[int, int]) -> None:
    model = small().eval()
    final, found = model.forward_intermediates(torch.randn(2, 3, *size))
    assert final.shape == (2, *(-(-side // 32) for side in size), 32)
    for i, features in enumerate(found):
        assert features.shape[2:] == tuple(-(-side // (4 * 2**i)) for side in size)
    assert model(torch.randn(2, 3, *size)).isfinite().all()


@torch.no_grad()
def test_fewer_features_are_the_same_features() -> None:
    whole, short = small().eval(), small().eval()
    assert short.prune_intermediate_layers([0, 1]) == [0, 1]
    assert sum(p.numel() for p in short.parameters()) < sum(p.numel() for p in whole.parameters())
    x = torch.randn(1, 3, 64, 64)
    expected = whole.forward_intermediates(x, [0, 1], intermediates_only=True)
    got = short.forward_intermediates(x, [0, 1], output_fmt="NHWC", intermediates_only=True)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a.permute(0, 3, 1, 2), b)
    assert short(x).shape == (1, 8, 8, 16), "features without a classifier, unpooled"
    with pytest.raises(SettingsError, match="NCHW"):
        whole.forward_intermediates(x, output_fmt="NLC")


def test_token_labelling() -> None:
    model, x = small(token_label=True), torch.randn(4, 3, 64, 64)
    logits, positions, box = model.train()(x)
    assert logits.shape == (4, 5)
    assert positions.shape == (4, 4, 5)
    assert len(box) == 4
    (logits.sum() + positions.sum()).backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        model.eval()
        features = model.forward_features(x)
        plain = model.head(model.forward_head(features, pre_logits=True))
        best = model.aux_head(features).flatten(1, 2).max(1).values
        torch.testing.assert_close(model(x), plain + 0.5 * best)
        model.reset_classifier(3)
        assert model(x).shape == (4, 3)
        model.reset_classifier(0)
        assert model.train()(x).shape == (4, 24)


def test_exchanged_tokens_come_back() -> None:
    x = maps(3, 8, 8, 2)
    mixed = exchanged(x, (1, 0, 3, 4), 2)
    assert torch.equal(mixed[0, 2:6, :8], x[2, 2:6, :8])
    assert torch.equal(mixed[:, :2], x[:, :2])
    assert torch.equal(mixed[:, 6:], x[:, 6:])
    assert torch.equal(exchanged(mixed, (1, 0, 3, 4), 2), x)
    torch.manual_seed(0)
    boxes = [mixing_box(7, 9) for _ in range(200)]
    for top, left, bottom, right in boxes:
        assert 0 <= top <= bottom <= 7
        assert 0 <= left <= right <= 9
    assert len(set(boxes)) > 50


def test_official_checkpoints_convert_to_the_model_they_are_of(tmp_path: Any) -> None:
    source, target = tmp_path / "rmt.pth", tmp_path / "rmt.safetensors"
    state = timm.create_model("rmt_small_token_label").state_dict()
    torch.save({"model": state}, source)
    assert convert("rmt", source, target) == ("rmt_small_token_label", len(state))


def operator(form: Any, prefix: int, **changes: Any) -> tuple[Tensor, list[Tensor]]:
    """Output of the operator on 2 images of the grid with 3 heads, and its q, k, v."""
    count = prefix + GRID[0] * GRID[1]
    qkv = [maps(2, 3, count, 4, seed=seed) for seed in range(3)]
    record = Record(Layout(prefix, GRID, count))
    settings: dict[str, Any] = {"bias": None, "scale": 0.3, "record": record, **changes}
    return Decay(2.0, 4.0, form)(*qkv, **settings), qkv


def places(prefix: int) -> list[tuple[int, int] | None]:
    cells = [(r, c) for r in range(GRID[0]) for c in range(GRID[1])]
    return [None] * prefix + cells


def written_out(qkv: list[Tensor], prefix: int, bias: Tensor, form: str) -> Tensor:
    """The operator token by token."""
    q, k, v = qkv
    decay, where = decays(3, 2, 4).double(), places(prefix)

    def one(i: int, seen: list[int], values: Tensor) -> Tensor:
        logits = (q[:, :, i, None] * k[:, :, seen]).sum(-1) * 0.3 + bias[:, :, i, seen]
        here = where[i]
        for at, j in enumerate(seen):
            there = where[j]
            if here is not None and there is not None:
                logits[:, :, at] += decay * (abs(here[0] - there[0]) + abs(here[1] - there[1]))
        return (logits.softmax(-1)[..., None] * values[:, :, seen]).sum(2)

    def swept(axis: int, values: Tensor) -> Tensor:
        out = values.clone()
        for i, here in enumerate(where):
            if here is not None:
                near = [j for j, t in enumerate(where) if t is None or t[axis] == here[axis]]
                out[:, :, i] = one(i, near, values)
        return out

    everything = list(range(len(where)))
    if form == "full":
        return torch.stack([one(i, everything, v) for i in everything], 2)
    out = swept(1, swept(0, v))
    for i in range(prefix):
        out[:, :, i] = one(i, everything, v)
    return out


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("form", ["full", "decomposed"])
@pytest.mark.parametrize("kind", ["none", "keys", "pairs"])
def test_operator_token_by_token(form: str, prefix: int, kind: str) -> None:
    count = prefix + GRID[0] * GRID[1]
    shape = {"none": (), "keys": (2, 1, 1, count), "pairs": (1, 3, count, count)}[kind]
    bias = maps(*shape, seed=7) if shape else None
    got, qkv = operator(form, prefix, bias=bias)
    dense = torch.zeros(2, 3, count, count, dtype=torch.float64)
    torch.testing.assert_close(
        got, written_out(qkv, prefix, dense if bias is None else dense + bias, form)
    )


def test_reduced_tokens_are_refused() -> None:
    with pytest.raises(TokensError, match="grid"):
        operator("full", 1, record=Record(Layout(1, GRID, 20)))


def test_later_heads_look_further() -> None:
    got, _ = operator("full", 0)
    assert got.isfinite().all()
    mask = grid_mask(decays(4, 2, 4), 7, 7).softmax(-1)
    distance = -grid_mask(torch.tensor([-1.0]), 7, 7)
    reach = (mask * distance).sum(-1).mean(-1)
    assert (reach.diff() > 0).all()


@pytest.mark.parametrize("form", ["full", "decomposed"])
@torch.no_grad()
def test_windows_have_a_grid_of_their_own(form: Any) -> None:
    model = timm.create_model(
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        num_classes=3,
    )
    model, x = randomised(model), torch.randn(2, 3, 64, 64)
    plain = model(x)
    transom.apply(model, "rmt", initial_value=1000.0)
    close([model(x)], [plain], 1e-5)
    transom.remove(model)
    transom.apply(model, "rmt", form=form)
    assert (model(x) - plain).abs().max() > 1e-3
    transom.remove(model)
    assert torch.equal(model(x), plain)


def test_texts_are_refused() -> None:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=32,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
    )
    with pytest.raises(FitError, match="grid"):
        transom.apply(BertModel(config), "rmt")


@torch.no_grad()
def test_the_full_form_exports() -> None:
    """The common tests export the decomposed one."""
    model = transom.apply(HOSTS["timm-registers"](), "rmt")
    x = images("timm-registers")
    program = torch.export.export(model, (x,)).module()
    close([program(x)], call(model, x), 1e-5)


@pytest.mark.parametrize(
    ("settings", "says"),
    [({"initial_value": 0.0}, "above 0"), ({"heads_range": -1.0}, "at least 0")],
)
def test_settings_out_of_range(settings: dict[str, float], says: str) -> None:
    with pytest.raises(SettingsError, match=says):
        ManhattanDecay(**settings)


@torch.no_grad()
def test_paths_drop_in_training() -> None:
    model: nn.Module = small(drop_path_rate=0.5).train()
    x = torch.randn(2, 3, 64, 64)
    torch.manual_seed(1)
    one = model(x)
    torch.manual_seed(2)
    assert not torch.equal(model(x), one)
