"""What a call costs: floating point operations, time and memory, measured and never estimated.

Units: GFLOPs with a multiply-add counted as two, milliseconds, MiB.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from transom.errors import SettingsError

Run = Callable[[], object]

MIB = 2**20
_ALLOCATION = "[memory]"  # the profiler's name for an allocation (bytes > 0) or a release (< 0)


def gflops(run: Run) -> float:
    """Floating point operations of one call, in GFLOPs (a multiply-add counts as two).

    Matrix products, convolutions and every kernel of scaled dot-product attention are counted;
    elementwise work, sorting and gathering are not.

    Args:
        run: The call to count; it runs once, without gradients.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


@dataclass(frozen=True)
class Timing:
    """Durations of one call.

    Attributes:
        median_ms: Median of the samples, ms.
        low_ms: Lower quartile, ms.
        high_ms: Upper quartile, ms.
        samples: Every duration in the order it was taken, ms. Sample i of every timing that
            `interleaved` returns comes from the same round, so timings can be compared in pairs.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: tuple[float, ...]) -> Timing:
        """Summarise durations in ms.

        Raises:
            SettingsError: If there is no sample.
        """
        low, median, high = quartiles(samples)
        return cls(median, low, high, samples)

    def over(self, other: Timing) -> tuple[float, float, float]:
        """Quartiles (lower, median, upper) of this time ÷ the other's, round by round.

        Two samples of one round were taken within moments of each other, so a machine that is
        slow for a while slows both, and their ratio is steadier than the ratio of two medians.

        Raises:
            SettingsError: If the two were not measured in the same number of rounds.
        """
        if len(self.samples) != len(other.samples):
            raise SettingsError(
                f"timings of {len(self.samples)} and {len(other.samples)} rounds cannot be paired; "
                "measure both in one call of `interleaved`"
            )
        return quartiles(tuple(a / b for a, b in zip(self.samples, other.samples, strict=True)))


def quartiles(samples: tuple[float, ...]) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile; of one sample three times the same.

    Raises:
        SettingsError: If there is no sample.
    """
    if not samples:
        raise SettingsError("no samples to summarise; measure at least one round")
    if len(samples) == 1:
        return samples[0], samples[0], samples[0]
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return low, median, high


def interleaved(
    runs: Mapping[str, Run],
    *,
    rounds: int = 10,
    warmup: int = 2,
    device: torch.device | str = "cpu",
) -> dict[str, Timing]:
    """Time several calls side by side.

    Every round takes one sample of every call, and every round begins with another one, so that
    whatever the machine does meanwhile (clock, heat, neighbours) reaches all of them alike.

    Args:
        runs: The calls by name.
        rounds: Samples of every call.
        warmup: Calls of each before the first sample.
        device: Where the calls compute; on CUDA events on the stream measure, elsewhere the
            monotonic clock.

    Returns:
        One timing for every name; sample i of each comes from round i.

    Raises:
        SettingsError: If there is nothing to run, or `rounds` < 1 or `warmup` < 0.
    """
    if not runs:
        raise SettingsError("nothing to time: `runs` is empty")
    if rounds < 1 or warmup < 0:
        raise SettingsError(
            f"rounds={rounds}, warmup={warmup}: expected rounds >= 1 and warmup >= 0"
        )
    device = torch.device(device)
    sample = _sample_cuda if device.type == "cuda" else _sample_clock
    names = list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    with torch.inference_mode():
        for _ in range(warmup):
            for name in names:
                runs[name]()
        for i in range(rounds):
            start = i % len(names)
            for name in names[start:] + names[:start]:
                samples[name].append(sample(runs[name], device))
    return {name: Timing.of(tuple(taken)) for name, taken in samples.items()}


def _sample_clock(run: Run, device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    run()
    _synchronize(device)
    return (time.perf_counter() - start) * 1e3


def _sample_cuda(run: Run, device: torch.device) -> float:
    with torch.cuda.device(device):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize(device)
        start.record()
        run()
        end.record()
        end.synchronize()
    return start.elapsed_time(end)


def _synchronize(device: torch.device) -> None:
    if device.type == "mps":
        torch.mps.synchronize()
    elif device.type == "xpu":
        torch.xpu.synchronize(device)


def peak_memory_mib(run: Run, device: torch.device | str = "cpu") -> float:
    """Highest memory that one call holds at a time beyond what was held before it, in MiB.

    Weights and input are there already, so this is activations and scratch tensors. On CUDA it is
    the caching allocator's maximum; on a CPU every allocation and release of torch's allocator is
    added up in order (scratch space that a library asks of the system on its own is not seen).

    Args:
        run: The call; it runs twice on CUDA (the first creates lasting workspaces), once on a CPU.
        device: Where the call computes: a CPU or CUDA.

    Raises:
        SettingsError: If memory cannot be measured on this kind of device.
    """
    device = torch.device(device)
    with torch.inference_mode():
        if device.type == "cuda":
            run()
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            run()
            torch.cuda.synchronize(device)
            return (torch.cuda.max_memory_allocated(device) - before) / MIB
        if device.type == "cpu":
            return _peak_cpu_bytes(run) / MIB
    raise SettingsError(f"peak memory on {device.type!r} cannot be measured; use a CPU or CUDA")


def _peak_cpu_bytes(run: Run) -> int:
    with (
        _quiet_profiler(),
        profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler,
    ):
        result = run()
    del result  # held until here, so that its release is not part of the call
    # The public event list drops the order of releases, which is what a peak depends on.
    recorded = profiler.profiler.kineto_results.events()
    changes = [
        (event.start_ns(), event.nbytes()) for event in recorded if event.name() == _ALLOCATION
    ]
    held = peak = 0
    for _, nbytes in sorted(changes, key=lambda change: change[0]):
        held += nbytes
        peak = max(peak, held)
    return peak


@contextmanager
def _quiet_profiler() -> Iterator[None]:
    """Keep the profiler's native library from writing its stages to standard error."""
    name = "KINETO_LOG_LEVEL"
    if name in os.environ:
        yield
        return
    os.environ[name] = "99"
    try:
        yield
    finally:
        os.environ.pop(name, None)
