"""The bench: one host, one set of images, one machine, and how a row is measured on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import transom
from transom import registry
from transom.errors import FitError, HostError, SettingsError, TokensError
from transom.hosts import Host
from transom.measure import budget as budgets
from transom.measure import cost, outputs
from transom.measure.cost import Timing
from transom.measure.data import ImageSet
from transom.measure.environment import describe
from transom.measure.outputs import Forward, Mean, Quality
from transom.measure.row import PLAIN, Row
from transom.measure.subjects import DecoderTwin, Twin, fitted, idle, part
from transom.papers.baselines.random import Random
from transom.papers.baselines.random_visual import RandomVisual
from transom.registry import Method, Takes
from transom.slots import Restore
from transom.watching import Trace

MethodLike = str | tuple[str, Mapping[str, Any]] | Method

UNFIT = (FitError, HostError, TokensError)  # a method does not go with this host
_ROUNDS = (3, 50)  # fewest and most rounds when their number follows from the time


@dataclass(frozen=True)
class Plan:
    """One row to come; without a method the plain host's."""

    name: str
    settings: dict[str, Any]
    method: Method | None

    @property
    def label(self) -> str:
        """Slug and settings on one line."""
        return " ".join([self.name, *(f"{name}={value}" for name, value in self.settings.items())])


@dataclass
class Bench:
    """Everything that stays the same from row to row."""

    base: nn.Module
    hosts: dict[Takes, Host]
    target: str
    restore: Restore | None
    data: ImageSet
    labels: Tensor | None
    classifier: bool
    forward: Forward
    quality: Quality | None
    device: torch.device
    dtype: torch.dtype
    batch_size: int
    rounds: int | None
    seconds: float
    control: bool
    _reference: list[Any] | None = None
    _gflops: float | None = None
    _single: float | None = None
    _lengths: dict[Takes, tuple[int, ...]] = field(default_factory=dict)
    _pictures: dict[Takes, int] = field(default_factory=dict)

    def facts(self) -> dict[str, Any]:
        """What a row depends on beside model, data and method, as far as it can be told."""
        names = [getattr(f, "__qualname__", repr(f)) for f in (self.forward, self.quality)]
        return {
            "target": self.target,
            "restore": self.restore,
            "calls": names,
            "labels": self.labels is not None,
            "dtype": str(self.dtype),
            "batch_size": self.batch_size,
            "rounds": self.rounds,
            "seconds": self.seconds,
            "control": self.control,
            "machine": describe(self.device),
        }

    def plan(
        self, methods: list[MethodLike], seed: int, budget: float | None = None
    ) -> tuple[list[Plan], list[tuple[str, str]]]:
        """The rows to come, and (method, reason) of what does not fit this host."""
        self.plain()
        plans = [Plan(PLAIN, {}, None)]
        skipped: list[tuple[str, str]] = []
        for given in methods:
            try:
                options = self._options(given, seed, budget)
            except UNFIT as error:
                skipped.append((named(given), str(error)))
                continue
            for settings, method in options:
                try:
                    fitted(self.base, method, self.target, self.restore)
                except UNFIT as error:
                    if (method.slug, str(error)) not in skipped:
                        skipped.append((method.slug, str(error)))
                    continue
                plans.append(Plan(method.slug, settings, method))
        if skipped and len(plans) == 1:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped)
            what = "fits this host" if budget is None else f"meets the budget {budget:g} here"
            raise FitError(f"none of the methods {what}. {reasons}")
        return plans, skipped

    def _options(
        self, given: MethodLike, seed: int, budget: float | None
    ) -> list[tuple[dict[str, Any], Method]]:
        """(settings to show, method) of what a user named, on this host."""
        if isinstance(given, Method):
            return expanded(given, 0, 0, seed)
        cls = type(registry.build(*_split(given)))
        takes = cls.takes
        if takes not in self.hosts:
            kinds = " and ".join(f"{kind}s" for kind in self.hosts)
            raise FitError(f"{cls.slug} fits {takes}s, and the hosts in this model are {kinds}")
        depth, patches = self._extent(takes)
        if budget is None:
            return expanded(given, depth, patches, seed)
        slug, fixed = _split(given)
        knob = budgets.dial(cls, fixed, depth, patches)
        if isinstance(knob, str):
            if set(fixed):
                return expanded(given, depth, patches, seed)  # as the user set it
            raise FitError(knob)

        def build(settings: dict[str, Any]) -> Method:
            return seeded(slug, settings, seed)

        fitted(self.base, build(dict(cls.grid(depth, patches)[0], **fixed)), self.target,
               self.restore)  # fmt: skip
        found = budgets.meet(cls, knob, budget, self._ratio, build=build)
        if found.settings is None:
            raise FitError(found.reason)
        return [(found.settings, build(found.settings))]

    def _extent(self, takes: Takes) -> tuple[int, int]:
        """Blocks of a host, and its patches: in a decoder that sees the pieces of images."""
        host, lengths = self.hosts[takes], self.plain(takes)[1]
        return len(lengths), self._pictures.get(takes, lengths[0] - host.prefix)

    def _ratio(self, method: Method) -> float:
        """Operations with a method ÷ those of the plain host, for one image."""
        subject = fitted(self.base, method, self.target, self.restore)
        batch = self.data.sample(1, self.device, self.dtype)
        if self._single is None:
            self._single = cost.gflops(lambda: self.forward(self.base, batch))
        return cost.gflops(lambda: self.forward(subject, batch)) / self._single

    def plain(self, takes: Takes | None = None) -> tuple[float, tuple[int, ...]]:
        """GFLOPs per image of the plain host, and its tokens after each block.

        Args:
            takes: of which host, where the model holds an encoder and a decoder.
        """
        if self._gflops is None:
            # the plain host cannot be traced, and the fitted flow is not what is to be counted
            self._gflops = self._count(self.base)
            for each in list(self.hosts):
                subject = fitted(self.base, idle(each), self.target, self.restore, check=True)
                with transom.trace(part(subject, self.target)) as trace:
                    self._count(subject)
                if not trace.lengths and len(self.hosts) > 1:
                    del self.hosts[each]  # `forward` runs the other one only
                    continue
                self._lengths[each] = self._passed(trace)
                visual = trace.tokens[0].visual
                if visual is not None:
                    self._pictures[each] = int(visual.sum(1).max())
        chosen = next(iter(self.hosts)) if takes is None else takes
        return self._gflops, self._lengths[chosen]

    def measure(self, plan: Plan) -> Row:
        """One row."""
        plain_gflops, plain_lengths = self.plain()
        if plan.method is None:
            timings = self._timings({"plain": self.base, "again": self.base})
            return self._row(
                plan, plain_lengths, plain_gflops, timings["plain"], timings["again"], None,
                self._memory(self.base), self._quality(self.base), {},
            )  # fmt: skip
        takes = plan.method.takes
        plain_lengths = self.plain(takes)[1]
        subject = fitted(self.base, plan.method, self.target, self.restore)
        gflops, lengths = self._trace(subject)
        free = Twin(lengths) if takes == "encoder" else DecoderTwin(lengths)
        twin = fitted(self.base, free, self.target, self.restore)
        timings = self._timings({"plain": self.base, "method": subject, "twin": twin})
        return self._row(
            plan, lengths, gflops, timings["method"], timings["plain"],
            timings["twin"], self._memory(subject), self._quality(subject),
            self._chance(plan.method, lengths, plain_lengths),
        )  # fmt: skip

    def _row(
        self,
        plan: Plan,
        lengths: tuple[int, ...],
        gflops: float,
        timing: Timing,
        plain: Timing,
        twin: Timing | None,
        memory: float | None,
        quality: dict[str, float],
        control: dict[str, float],
    ) -> Row:
        plain_gflops = self.plain()[0]
        low, median, high = plain.over(timing)
        return Row(
            method=plan.name,
            settings=plan.settings,
            tokens=lengths[-1],
            lengths=lengths,
            gflops=gflops,
            flops_ratio=gflops / plain_gflops,
            ms=(
                timing.low_ms / self.batch_size,
                timing.median_ms / self.batch_size,
                timing.high_ms / self.batch_size,
            ),
            speedup=(low, 1.0 if plan.method is None else median, high),
            limit=plain_gflops / gflops,
            over_twin=None if twin is None else timing.over(twin),
            memory_mib=memory,
            quality=quality,
            control=control,
            rounds=len(timing.samples),
            batch_size=self.batch_size,
        )

    def _sample(self) -> Tensor:
        return self.data.sample(self.batch_size, self.device, self.dtype)

    def _trace(self, subject: nn.Module) -> tuple[float, tuple[int, ...]]:
        """GFLOPs per image, and tokens after each block, of a model with a method fitted."""
        with transom.trace(part(subject, self.target)) as trace:
            gflops = self._count(subject)
        return gflops, self._passed(trace)

    def _passed(self, trace: Trace) -> tuple[int, ...]:
        """Tokens after each block in the latest call."""
        if not trace.lengths:
            raise HostError(
                "`forward` ran without passing the blocks of the host, so there is nothing to "
                "measure; check `forward` and `target`"
            )
        return tuple(trace.lengths)

    def _count(self, subject: nn.Module) -> float:
        batch = self._sample()
        return cost.gflops(lambda: self.forward(subject, batch)) / self.batch_size

    def _memory(self, subject: nn.Module) -> float | None:
        if self.device.type not in ("cpu", "cuda"):
            return None
        batch = self._sample()
        return cost.peak_memory_mib(lambda: self.forward(subject, batch), self.device)

    def _timings(self, subjects: dict[str, nn.Module]) -> dict[str, Timing]:
        batch = self._sample()

        def run(subject: nn.Module) -> Callable[[], object]:
            return lambda: self.forward(subject, batch)

        if self.rounds is None:
            once = cost.interleaved({"": run(self.base)}, rounds=2, warmup=1, device=self.device)[
                ""
            ]
            fitting = int(self.seconds * 1e3 / (3 * max(once.median_ms, 1e-3)))
            self.rounds = min(max(fitting, _ROUNDS[0]), _ROUNDS[1])
        runs = {name: run(subject) for name, subject in subjects.items()}
        return cost.interleaved(runs, rounds=self.rounds, warmup=1, device=self.device)

    def _chance(
        self, method: Method, lengths: tuple[int, ...], plain_lengths: tuple[int, ...]
    ) -> dict[str, float]:
        """The measures of random pruning to the same tokens after each block."""
        drawn = Random if method.takes == "encoder" else RandomVisual
        if not self.control or lengths == plain_lengths or isinstance(method, drawn):
            return {}
        try:
            chance = fitted(self.base, drawn(counts=lengths), self.target, self.restore)
        except SettingsError:
            return {}  # a method may keep no patch at all, random pruning keeps at least one
        return self._quality(chance)

    def _quality(self, subject: nn.Module) -> dict[str, float]:
        mean = Mean()
        for i, (reference, output) in enumerate(
            zip(self._references(), self._outputs(subject), strict=True)
        ):
            start = i * self.batch_size
            count = min(self.batch_size, len(self.data) - start)
            labels = None if self.labels is None else self.labels[start : start + count]
            if self.quality is not None:
                mean.add(self.quality(output, reference), count)
            mean.add(outputs.fidelity(output, reference, labels, self.classifier), count)
        return mean.result()

    def _references(self) -> list[Any]:
        if self._reference is None:
            self._reference = list(self._outputs(self.base))
        return self._reference

    def _outputs(self, subject: nn.Module) -> Iterator[Any]:
        for batch in self.data.batches(self.batch_size, self.device, self.dtype):
            with torch.inference_mode():
                yield outputs.to_cpu(self.forward(subject, batch))


def expanded(
    given: MethodLike, depth: int, patches: int, seed: int
) -> list[tuple[dict[str, Any], Method]]:
    """(settings to show, method) of what a user named."""
    if isinstance(given, Method):
        defaults = {f.name: f.default for f in dataclasses.fields(given)}
        return [({k: v for k, v in given.settings().items() if v != defaults[k]}, given)]
    slug, fixed = _split(given)
    if not isinstance(given, str):
        return [(fixed, seeded(slug, fixed, seed))]
    grid = type(registry.build(slug, {})).grid(depth, patches)
    return [(settings, seeded(slug, settings, seed)) for settings in grid]


def seeded(slug: str, settings: dict[str, Any], seed: int) -> Method:
    """A method, with the comparison's seed if it has one that is not set."""
    method = registry.build(slug, settings)
    if "seed" in method.settings() and "seed" not in settings:
        method = registry.build(method, {"seed": seed})
    return method


def named(given: MethodLike) -> str:
    """The slug of what a user named."""
    if isinstance(given, Method):
        return given.slug
    return _split(given)[0]


def _split(given: MethodLike) -> tuple[str, dict[str, Any]]:
    """Slug and settings of what a user named."""
    if isinstance(given, str):
        return given, {}
    if isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Mapping):
        return given[0], dict(given[1])
    raise SettingsError(
        f"{given!r} names no method; expected a slug such as 'tome', a pair such as "
        "('tome', {'r': 8}) or an instance such as ToMe(r=8)"
    )
