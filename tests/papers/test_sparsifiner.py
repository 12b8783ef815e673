"""Sparsifiner: both paths, what the predictor learns, and the phases of its training."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import transom
from tests.common.hosts import hf, images, timm_vit
from transom import registry
from transom.errors import SettingsError, TokensError
from transom.measure.cost import MIB, peak_memory_mib
from transom.papers.attention.sparsifiner import LONG, PredictedAttention
from transom.papers.attention.sparsifiner.predictor import (
    Budget,
    MaskPredictor,
    attend,
    gathered,
    masked,
    predicted,
)

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 3e-2}


@given(
    shape=st.tuples(*(st.integers(1, 3),) * 2, st.integers(1, 9), st.integers(2, 20)),
    width=st.sampled_from([4, 8]),
    part=st.floats(0.05, 1),
    dtype=st.sampled_from(list(TOLERANCE)),
    biased=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_gathered_is_masked(
    shape: tuple[int, int, int, int],
    width: int,
    part: float,
    dtype: torch.dtype,
    biased: bool,
    seed: int,
) -> None:
    """The copies give what the mask gives, forward and backward, however many rows at a time."""
    batch, heads, rows, count = shape
    rng = torch.Generator().manual_seed(seed)
    base = [torch.randn(batch, heads, n, width, generator=rng) for n in (rows, count, count)]
    keys = max(1, round(part * count))
    places = torch.rand(batch, heads, rows, count, generator=rng).topk(keys, -1).indices
    mask = torch.zeros(batch, heads, rows, count, dtype=torch.bool).scatter(-1, places, True)
    bias = torch.randn(1, heads, rows, count, generator=rng).to(dtype) if biased else None
    got: list[Any] = []
    expected: list[Any] = []
    for out, room in ((expected, None), (got, 1 << 22), (got, 1)):
        q, k, v = (x.to(dtype).requires_grad_() for x in base)
        if room is None:
            y = masked(q, k, v, mask, 0.5, bias)
        else:
            y = gathered(q, k, v, places, 0.5, bias, room)
        y.float().square().sum().backward()
        out += [y.detach(), *(x.grad for x in (q, k, v))]
    tolerance = TOLERANCE[dtype]
    for a, b in zip(got, expected * 2, strict=True):
        scale = float(b.abs().max()) + 1
        torch.testing.assert_close(a / scale, b / scale, atol=tolerance, rtol=tolerance)


def test_a_query_without_keys_gets_nothing() -> None:
    q, k, v = torch.randn(3, 1, 1, 4, 8).unbind(0)
    mask = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    mask[:, :, 2] = False
    y = masked(q, k, v, mask, 1.0)
    assert (y[:, :, 2] == 0).all()
    assert (y[:, :, 1] != 0).all()


@pytest.mark.parametrize("path", ["masked", "gathered"])
@torch.no_grad()
def test_each_patch_sees_its_budget(path: str) -> None:
    """A key that no patch has chosen can change without any patch noticing."""
    torch.manual_seed(0)
    predictor = MaskPredictor(8, 20, 4, 2, budget=Budget(0.2, coef_topk=3)).eval()
    q, k = torch.randn(2, 1, 2, 20, 8).unbind(0)
    found = predictor(q, k)
    assert found.mask is not None
    assert (found.mask.sum(-1) == 4).all()
    assert found.coefficients.count_nonzero(-1).max() == 3
    live = torch.ones(1, 20, dtype=torch.bool)
    live[:, 5:] = False
    few = predictor(q, k, live).mask
    assert few is not None
    assert (few.sum(-1) == 4).all()
    assert not few[..., 5:].any()


@pytest.mark.parametrize("path", ["masked", "gathered", "auto"])
@pytest.mark.parametrize("prefix", [0, 1, 2])
@torch.no_grad()
def test_a_few_queries_at_a_time_are_all_of_them(path: str, prefix: int) -> None:
    torch.manual_seed(0)
    predictor = MaskPredictor(8, 50, 4, 2, budget=Budget(0.2, coef_topk=3)).double().eval()
    q, k, v = torch.randn(3, 2, 3, 50, 8, dtype=torch.float64).unbind(0)
    for bias in (None, torch.randn(2, 1, 50, 50).double(), torch.randn(1, 3, 1, 50).double()):
        given: Any = {"scale": 0.3, "bias": bias, "prefix": prefix, "path": path}
        expected = attend(q, k, v, predictor(q, k, None, prefix), **given)
        got = predicted(predictor, q, k, v, rows=7, **given)
        torch.testing.assert_close(got, expected)


@torch.no_grad()
def test_long_inputs_never_hold_all_pairs() -> None:
    count = LONG + 500
    operator = PredictedAttention(MaskPredictor(8, count), "auto").eval()
    record: Any = SimpleNamespace(layout=SimpleNamespace(prefix=1), valid=None)
    q, k, v = torch.randn(3, 1, 1, count, 8).unbind(0)
    run = partial(operator, q, k, v, bias=None, scale=0.3, record=record)
    few = peak_memory_mib(run, torch.device("cpu"))
    every = peak_memory_mib(partial(_at_once, operator, q, k, v), torch.device("cpu"))
    assert few < 0.4 * every
    assert every > 2 * 4 * count**2 / MIB  # more than a number for each pair of one head
    torch.testing.assert_close(run(), _at_once(operator, q, k, v), atol=1e-5, rtol=1e-5)


def _at_once(operator: PredictedAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return attend(q, k, v, operator.predictor(q, k, mask=False), scale=0.3)


def sharp() -> Any:
    """A ViT whose attention is sharp enough that some connections matter more than others."""
    model: Any = timm_vit(img_size=64, depth=2)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.qkv.weight[:64].mul_(3.0)
        model.pos_embed.mul_(5.0)
    return model


def test_the_predictor_learns_where_attention_is() -> None:
    """After 250 steps of phase 1 the chosen quarter of keys is better than chance, and than near.

    Noise through random weights has attention of full rank, which a low rank can follow a part of
    the way only.
    """
    torch.manual_seed(0)
    model = sharp()
    x = torch.randn(8, 3, 64, 64)
    plain = model.eval()(x[:4]).detach()
    transom.apply(model, "sparsifiner", reduce_n=3, reduce_c=1, coef_topk=None, basis_threshold=0.0)
    before = overlap(model, x[4:])
    with torch.no_grad():
        poor = (model.eval()(x[:4]) - plain).norm()
    new = [p for n, p in model.named_parameters() if "transom" in n]
    optimizer = torch.optim.Adam(new, 1e-2)
    method = transom.fittings(model)[0].method
    training = method.training(phase1=1.0, cls_distill=0.0, token_distill=0.0)
    for step in range(250):
        training.at_step(model, step, 250)
        model.train()
        loss = training.extra_loss(model, model(torch.randn(8, 3, 64, 64)))
        assert loss is not None
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    training.at_step(model, 250, 250)
    model.eval()
    after, near = overlap(model, x[4:]), local_overlap(model, x[4:])
    assert before < 0.3
    assert near < 0.3
    assert after > 0.37
    with torch.no_grad():
        assert (model(x[:4]) - plain).norm() < 0.9 * poor


def true_attention(model: Any, x: Tensor) -> list[Tensor]:
    bare = transom.remove(copy.deepcopy(model)).eval()
    with torch.no_grad(), transom.capture(bare, "blocks.*.attention.probabilities") as seen:
        bare(x)
    return [a[:, :, 1:] for a in seen.values()]


def overlap(model: Any, x: Tensor) -> float:
    """Part of the truly strongest quarter of keys that is chosen, in the first block."""
    seen: list[Any] = []
    predictors = [m for m in model.modules() if isinstance(m, MaskPredictor)]
    handle = predictors[0].register_forward_hook(lambda m, args, found: seen.append(found))
    with torch.no_grad():
        model.eval()(x)
    handle.remove()
    best = true_attention(model, x)[0].topk(17, -1).indices
    chosen = torch.zeros_like(seen[0].approx, dtype=torch.bool).scatter(-1, seen[0].places, True)
    return float(chosen.gather(-1, best).float().mean())


def local_overlap(model: Any, x: Tensor) -> float:
    """The same for the class token and the 16 nearest patches."""
    place = torch.stack(torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij"), -1)
    flat = place.flatten(0, 1).float()
    near = F.pad(torch.cdist(flat, flat), (1, 0), value=-1.0).topk(17, largest=False).indices
    chosen = torch.zeros(64, 65, dtype=torch.bool).scatter(-1, near, True)
    best = true_attention(model, x)[0].topk(17, -1).indices
    return float(chosen.expand(*best.shape[:2], -1, -1).gather(-1, best).float().mean())


@pytest.mark.parametrize("host", ["timm", "hf"])
def test_phases_begin_and_end(host: str, tmp_path: Path) -> None:
    model = timm_vit() if host == "timm" else hf("ViTForImageClassification", "ViTConfig")
    weights = tmp_path / "plain.safetensors"
    save_file(model.state_dict(), weights)
    x = images("timm-class")
    transom.apply(model, "sparsifiner", reduce_n=2)
    hooks = [len(m._forward_hooks) for m in model.modules()]
    method = transom.fittings(model)[0].method
    training = method.training(phase1=0.5, teacher=str(weights))
    losses = []
    for step in range(4):
        training.at_step(model, step, 4)
        out = model.train()(x)
        out = out if isinstance(out, Tensor) else out.logits
        loss = training.extra_loss(model, out)
        assert loss is not None
        loss.backward()
        losses.append(loss.item())
        reached = [p.grad for n, p in model.named_parameters() if n.endswith("proj_back_n")]
        assert all((g is not None and g.abs().sum() > 0) == (step < 2) for g in reached)
        model.zero_grad()
    # phase 1 leaves the host as it is, so only the reconstruction is left to pay for
    assert losses[0] == losses[1] > 0
    assert losses[2] != losses[0]
    training.at_step(model, 4, 4)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks
    assert training.extra_loss(model, out) is None


def test_a_resumed_run_needs_its_teacher() -> None:
    model = transom.apply(timm_vit(), "sparsifiner")
    method = transom.fittings(model)[0].method
    with pytest.raises(SettingsError, match="teacher"):
        method.training().at_step(model, 3, 10)
    with pytest.raises(SettingsError, match="no 'phase'"):
        method.training(phase=0.5)


@pytest.mark.parametrize(
    "given",
    [
        {"keep_rate": 0.0},
        {"coef_topk": 0},
        {"reduce_n": 0},
        {"path": "gathered", "score": "threshold"},
    ],
)
def test_settings_that_make_no_sense(given: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        registry.build("sparsifiner", given)


def test_other_sizes_are_refused() -> None:
    model = transom.apply(timm_vit(dynamic_img_size=True), "sparsifiner")
    with pytest.raises(TokensError, match="17 tokens"):
        model(torch.randn(1, 3, 48, 48))
