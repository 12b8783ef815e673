"""SLAB: its networks beside those of timm, the schedule of its norm, its attention on hosts."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.models.swin_transformer import SwinTransformer
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import transom
from tests.common.hosts import HOSTS, images
from transom.errors import FitError, SettingsError, TokensError
from transom.papers.attention.slab import convert
from transom.papers.attention.slab.attention import SimplifiedLinearAttention, linear_attention
from transom.papers.attention.slab.norm import PRepBN, RepBN
from transom.papers.attention.slab.swin import SlabSwin

SMALL: dict[str, Callable[..., Any]] = {
    "deit": partial(timm.create_model, "slab_deit_t", embed_dim=24, depth=2),
    "swin": partial(
        timm.create_model, "slab_swin_t", embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4)
    ),
    "pvt": partial(
        timm.create_model,
        "slab_pvt_t",
        embed_dims=(8, 16, 16, 32),
        depths=(1, 1, 1, 1),
        num_heads=(1, 2, 2, 4),
        mlp_ratios=(2, 2, 2, 2),
    ),
    "cswin": partial(timm.create_model, "slab_cswin_t", embed_dim=8, depths=(1, 1, 2, 1)),
}
each = pytest.mark.parametrize("family", SMALL)


def network(family: str, size: int | tuple[int, int] = 64, **settings: Any) -> Any:
    """A small network in evaluation mode, no parameter of which is what it begins as."""
    torch.manual_seed(0)
    model = SMALL[family](img_size=size, num_classes=5, drop_path_rate=0.0, **settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm1d):
                norm.running_mean.normal_(0, 0.3)
                norm.running_var.uniform_(0.5, 2)
    return model


def settled(model: Any, x: Tensor) -> Any:
    """The network with the statistics of a batch, so that its features are of ordinary size."""
    for norm in model.modules():
        if isinstance(norm, PRepBN):
            norm.iter.zero_()
            norm.norm2.alpha.fill_(0.1)
            norm.norm2.bn.momentum = 1.0
    model.train()(x)
    return model.eval()


def pixels(*size: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_swin_is_the_swin_of_timm() -> None:
    """With LayerNorm and softmax windows, shifted ones included."""
    shape: dict[str, Any] = {"embed_dim": 8, "depths": (2, 2, 2), "num_heads": (1, 2, 4)}
    torch.manual_seed(0)
    theirs: Any = SwinTransformer(img_size=64, window_size=4, num_classes=5, **shape).eval()
    ours = SlabSwin(
        img_size=64,
        num_classes=5,
        attn_type="SSS",
        softmax_window=4,
        norm_layer=nn.LayerNorm,
        drop_path_rate=0.0,
        **shape,
    ).eval()
    state = {}
    for name, value in theirs.state_dict().items():
        stage, _, rest = name.removeprefix("layers.").partition(".")
        if rest.startswith("downsample"):  # timm merges at the door of a stage
            name = f"layers.{int(stage) - 1}.{rest}"
        state[name.replace("head.fc.", "head.")] = value
    # timm keeps masks and indices to itself
    result = ours.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(n.endswith(("attn_mask", "position_index")) for n in result.missing_keys)
    x = pixels(64, 64)
    torch.testing.assert_close(ours(x), theirs(x))
    assert any(stage.blocks[1].attn_mask is not None for stage in ours.layers)


@each
@torch.no_grad()
def test_folds_without_a_norm_left(family: str) -> None:
    model, x = network(family).double(), pixels(64, 64).double()
    folded = transom.fold(model)
    kinds = {type(module) for module in folded.modules()}
    assert not kinds & {PRepBN, RepBN, nn.LayerNorm, nn.BatchNorm1d, transom_scale()}
    torch.testing.assert_close(folded(x), model(x), rtol=1e-9, atol=1e-9)


def transom_scale() -> type[nn.Module]:
    from transom.fold import Scale

    return Scale


@each
@torch.no_grad()
def test_other_sizes_of_images(family: str) -> None:
    model, x = network(family), pixels(64, 64)
    expected = model(x)
    model.set_input_size((64, 64))
    assert torch.equal(model(x), expected)
    model.set_input_size((128, 64))
    wide = model(pixels(128, 64))
    assert wide.shape == (2, 5) and wide.isfinite().all()
    built = network(family, (128, 64))
    assert {n: p.shape for n, p in model.named_parameters()} == {
        n: p.shape for n, p in built.named_parameters()
    }
    built.load_state_dict(model.state_dict())
    torch.testing.assert_close(built(pixels(128, 64)), wide)


@each
def test_sizes_that_do_not_fit_are_refused(family: str) -> None:
    model = network(family)
    if family != "deit":
        with pytest.raises(SettingsError, match="multiple"):
            model.set_input_size((72, 64))
        return
    with pytest.raises(TokensError, match="set_input_size"):
        model.blocks[0].attn(torch.zeros(1, 17, 24))


@each
def test_checkpointing_repeats_a_training_step(family: str) -> None:
    model, x = network(family).double().train(), pixels(64, 64).double()
    other = copy.deepcopy(model)
    other.set_grad_checkpointing()
    for each_model in (model, other):
        each_model(x).square().sum().backward()
    for (name, a), b in zip(model.named_parameters(), other.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(b.grad, a.grad, msg=name)
    # statistics and counters have moved once in both
    for (name, a), b in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(b, a, msg=name)
    counters = [b for n, b in model.named_buffers() if n.endswith(".iter")]
    assert counters and all(int(b) == int(counters[0]) for b in counters)


@pytest.mark.slow
@each
@torch.no_grad()
def test_compiles_in_one_graph_and_exports(family: str, tmp_path: Any) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, x = settled(network(family), pixels(64, 64, count=8)), pixels(64, 64)
    expected = model(x)
    torch.testing.assert_close(
        torch.compile(model, fullgraph=True)(x), expected, atol=1e-4, rtol=1e-4
    )
    torch.onnx.export(model, (x,), tmp_path / "model.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), expected, atol=1e-4, rtol=1e-4)


def test_both_orders_of_linear_attention_agree() -> None:
    torch.manual_seed(0)
    q, k = torch.rand(2, 3, 40, 8).double(), torch.rand(2, 3, 30, 8).double()
    v = torch.randn(2, 3, 30, 8).double()
    plain = q @ k.mT
    plain = plain / (plain.sum(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(linear_attention(q, k, v), plain @ v)
    few = linear_attention(q[:, :, :3], k[:, :, :3], v[:, :, :3])  # here q kᵀ comes first
    product = q[:, :, :3] @ k[:, :, :3].mT
    torch.testing.assert_close(few, product @ v[:, :, :3] / (product.sum(-1, keepdim=True) + 1e-6))
    assert torch.equal(linear_attention(q * 0, k, v), torch.zeros_like(q))


def test_cost_grows_with_the_number_of_tokens() -> None:
    def cost(side: int) -> int:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            SimplifiedLinearAttention(32, (side, side), 4)(torch.empty(1, side * side, 32))
        return counter.get_total_flops()

    assert cost(28) == 4 * cost(14)
    assert cost(56) == 16 * cost(14)


def norm(**settings: Any) -> PRepBN:
    torch.manual_seed(0)
    made = PRepBN(nn.LayerNorm(6), RepBN(6), **settings).double()
    for parameter in made.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return made.train()


def test_the_schedule_slides_from_one_norm_to_the_other() -> None:
    made, x = norm(warm=1, total_step=4), torch.randn(3, 5, 6).double()
    layer, rep = made.norm1(x), copy.deepcopy(made.norm2)(x)
    for share in (1, 1, 0.75, 0.5, 0.25, 0, 0):  # the first is the warm-up
        torch.testing.assert_close(made(x), share * layer + (1 - share) * rep)
    assert int(made.iter) == 0 and int(made.warm) == 0
    assert int(made.norm2.bn.num_batches_tracked) == 6


def test_the_schedule_goes_on_where_it_was_saved() -> None:
    made, x = norm(warm=2, total_step=4), torch.randn(3, 5, 6).double()
    other = norm(warm=0, total_step=9)
    other.load_state_dict(made.state_dict())
    for _ in range(5):
        torch.testing.assert_close(other(x), made(x))


def test_counters_move_once_in_so_many_passes() -> None:
    made, x = norm(total_step=4, every=3), torch.randn(3, 5, 6).double()
    seen = []
    for _ in range(7):
        made(x)
        seen.append(int(made.iter))
    assert seen == [4, 4, 3, 3, 3, 2, 2]


def test_padding_counts_in_no_statistics() -> None:
    rep, x = norm().norm2, torch.randn(2, 4, 6).double()
    valid = torch.tensor([[True] * 4, [True, False, True, False]])
    alone = copy.deepcopy(rep)
    y, expected = rep(x, valid), alone(x[valid][None])[0]
    torch.testing.assert_close(y[valid], expected)
    torch.testing.assert_close(y[~valid], (1 + rep.alpha) * x[~valid])
    torch.testing.assert_close(rep.bn.running_var, alone.bn.running_var)


@torch.no_grad()
def test_a_host_in_training_begins_as_itself() -> None:
    model, x = HOSTS["timm-class"]().train(), images("timm-class")
    expected = model(x)
    transom.apply(model, "slab", linear=False)
    torch.testing.assert_close(model(x), expected)


@torch.no_grad()
def test_padding_of_a_host_is_not_looked_at() -> None:
    from transom.papers.attention.slab.mixer import HostLinearAttention
    from transom.projections import Projections
    from transom.slots import Ask
    from transom.tokens import Layout, Record

    torch.manual_seed(0)
    maps = [(torch.randn(8, 8), None) for _ in range(4)]
    mixer = HostLinearAttention(Projections(2, *maps), 1, (2, 2), 3)
    h, record = torch.randn(1, 5, 8), Record(Layout(1, (2, 2), 5))
    bias = torch.zeros(1, 1, 1, 5)
    bias[..., 3:] = -torch.inf
    other = h.clone()
    other[:, 3:] = 9
    a, b = (mixer(t, Ask(bias=bias, record=record)) for t in (h, other))
    torch.testing.assert_close(a[:, :3], b[:, :3])
    assert not torch.allclose(mixer(h, Ask(record=record))[:, :3], a[:, :3])


def test_a_training_too_short_for_the_schedule_is_told(caplog: pytest.LogCaptureFixture) -> None:
    model = transom.apply(HOSTS["timm-class"](), "slab", total_step=50, warm=10, every=2)
    method = transom.fittings(model)[0].method
    caplog.clear()
    method.training().at_step(model, 0, 120)
    assert not caplog.records
    method.training().at_step(model, 0, 100)
    assert "total_step of 40" in caplog.text


def test_hosts_without_norms_in_front_are_told_what_fits() -> None:
    with pytest.raises(FitError, match="norm=False"):
        transom.apply(HOSTS["timm-post-norm"](), "slab")
    transom.apply(HOSTS["timm-post-norm"](), "slab", norm=False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"linear": False, "norm": False},
        {"kernel_size": 4},
        {"total_step": 0},
        {"r0": 1.5},
        {"warm": -1},
        {"every": 0},
        {"eps": 0.0},
    ],
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        transom.apply(HOSTS["timm-class"](), "slab", **wrong)


def test_checkpoints_with_repbn_bare() -> None:
    model = network("deit")
    state = model.state_dict()
    bare = {
        name.replace(".norm2.alpha", ".alpha").replace(".norm2.bn.", ".bn."): value
        for name, value in state.items()
        if ".norm1.weight" not in name
        and ".norm1.bias" not in name
        and not name.endswith((".warm", ".iter", ".total_step"))
    }
    assert "blocks.0.norm2.alpha" in bare  # this is norm2 of the block
    converted = convert(bare)
    assert set(converted) == set(state)
    other = network("deit")
    other.load_state_dict(converted)
    x = pixels(64, 64)
    torch.testing.assert_close(other(x), model(x))
