"""Costs: what is counted, how time is sampled, what memory is."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from transom.errors import SettingsError
from transom.measure.cost import Timing, gflops, interleaved, peak_memory_mib


def test_linear_layers_count_a_multiply_add_as_two() -> None:
    layer, x = nn.Linear(64, 32), torch.randn(10, 64)
    assert gflops(lambda: layer(x)) * 1e9 == 2 * 10 * 64 * 32


@pytest.mark.parametrize("mask", [None, (2, 1, 1, 50), (2, 3, 50, 50)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_attention_is_counted_with_and_without_a_mask(
    mask: tuple[int, ...] | None, dtype: torch.dtype
) -> None:
    q = torch.randn(2, 3, 50, 16, dtype=dtype)
    bias = None if mask is None else torch.zeros(mask, dtype=dtype)
    counted = gflops(lambda: scaled_dot_product_attention(q, q, q, attn_mask=bias)) * 1e9
    assert counted == 2 * (2 * 2 * 3 * 50 * 50 * 16)


def test_samples_of_a_round_are_taken_in_rotating_order() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = interleaved(runs, rounds=3, warmup=0)
    assert "".join(order) == "abcbcacab"
    assert [len(t.samples) for t in timings.values()] == [3, 3, 3]


def test_time_is_in_milliseconds_and_paired() -> None:
    runs = {"short": lambda: time.sleep(0.005), "long": lambda: time.sleep(0.02)}
    timings = interleaved(runs, rounds=5, warmup=1)
    assert timings["short"].median_ms >= 5
    assert timings["short"].low_ms <= timings["short"].median_ms <= timings["short"].high_ms
    # paired ratios survive a machine that is busy with something else
    assert timings["long"].over(timings["short"])[1] > 1.5


def test_no_gradients_are_recorded_while_timing() -> None:
    modes: list[bool] = []
    interleaved({"": lambda: modes.append(torch.is_inference_mode_enabled())}, rounds=1, warmup=0)
    assert modes == [True]


def test_quartiles_of_few_samples() -> None:
    assert Timing.of((3.0,)) == Timing(3.0, 3.0, 3.0, (3.0,))
    timing = Timing.of((5.0, 1.0, 3.0, 2.0, 4.0))
    assert (timing.low_ms, timing.median_ms, timing.high_ms) == (2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"runs": {}}, "`runs` is empty"),
        ({"rounds": 0}, "rounds=0"),
        ({"warmup": -1}, "warmup=-1"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        interleaved(**{"runs": {"a": lambda: None}, **arguments})


def test_timings_of_different_lengths_are_not_paired() -> None:
    with pytest.raises(SettingsError, match="2 and 1 rounds"):
        Timing.of((1.0, 2.0)).over(Timing.of((1.0,)))


def test_peak_memory_on_the_cpu_is_exact() -> None:
    def run() -> torch.Tensor:
        a = torch.empty(256, 1024)  # 1 MiB
        b = torch.empty(512, 1024)  # 2 MiB
        c = torch.empty(1024, 1024)  # 4 MiB
        del b
        d = torch.empty(256, 1024)  # 1 MiB into the place of b
        return a + c[:256] + d

    assert peak_memory_mib(run) == 8.0  # a, c, d and the two sums


def test_memory_held_before_the_call_does_not_count() -> None:
    held = torch.ones(1024, 1024)
    assert peak_memory_mib(lambda: held.add_(1)) < 0.01
    assert peak_memory_mib(lambda: held + 1) == pytest.approx(4.0, abs=0.01)


def test_measuring_memory_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    peak_memory_mib(lambda: torch.ones(10))
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_memory_on_an_unknown_device_is_refused() -> None:
    with pytest.raises(SettingsError, match="meta"):
        peak_memory_mib(lambda: None, "meta")


@pytest.mark.gpu
def test_cuda_time_and_memory() -> None:
    x = torch.randn(1024, 1024, device="cuda")
    timings = interleaved({"a": lambda: x @ x, "b": lambda: x + x}, rounds=5, device="cuda")
    assert 0 < timings["b"].median_ms < 100
    assert peak_memory_mib(lambda: x + x, "cuda") == pytest.approx(4.0, abs=2.1)
