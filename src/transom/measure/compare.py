"""Methods side by side on one host, one set of images and one machine."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import transom
from transom import hosts, registry
from transom.errors import FitError, HostError, SettingsError, TokensError
from transom.hosts import Host
from transom.measure import cost, outputs
from transom.measure.comparison import Comparison
from transom.measure.cost import Timing
from transom.measure.data import ImageSet, Source, load_images
from transom.measure.environment import Environment, describe
from transom.measure.journal import Journal, fingerprint, key_of
from transom.measure.outputs import Forward, Mean, Quality
from transom.measure.preprocessing import Preprocessing, classes_of, preprocessing_of
from transom.measure.quality import check_labels
from transom.measure.row import CONTROL, PLAIN, Row
from transom.measure.subjects import Twin, fitted, part, placed_copy
from transom.papers.baselines.none import NoOp
from transom.papers.baselines.random import Random
from transom.registry import Method
from transom.slots import Restore

logger = logging.getLogger(__name__)

MethodLike = str | tuple[str, Mapping[str, Any]] | Method
Progress = Callable[[Row, int, int], None]

_ROUNDS = (5, 50)  # fewest and most rounds when their number follows from the time


def compare(
    model: nn.Module,
    images: Source | ImageSet,
    methods: Sequence[MethodLike] | None = None,
    *,
    labels: Tensor | Sequence[int] | bool | None = None,
    target: str = "",
    restore: Restore | None = None,
    forward: Forward | None = None,
    quality: Quality | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | str | None = None,
    batch_size: int = 8,
    rounds: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    preprocessing: Preprocessing | None = None,
    limit: int | None = None,
    control: bool = True,
    resume: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    command: str = "",
) -> Comparison:
    """Measure what methods buy on a model, and what they cost.

    The model stays as it is: methods are fitted to copies that share its weights. The plain host
    comes first; then for each method one row a setting. A row is timed in rounds, each of which
    takes one sample of the plain host, the fitted one and its free twin.

    Args:
        model: A supported host, or a model that contains one. Nothing may be fitted to it.
        images: An `ImageSet`, or whatever `transom.measure.load_images` reads: a folder, a
            parquet file, a tensor (N, 3, H, W), pictures.
        methods: Slugs, (slug, settings) pairs or instances. A bare slug stands for the settings
            of its `grid`, from mild to strong. All methods of the registry by default.
        labels: (N,) class numbers. By default those of the folder or file are used if the model
            has a classification head; True uses them although it has none (`forward` returns
            class scores), False never.
        target: Path of the part that methods are fitted to, for example "backbone", where the
            model holds several hosts.
        restore: When tokens are restored to the full sequence, see `transom.apply`.
        forward: What is run and timed, (model, images (B, 3, H, W)) -> output; by default a call.
        quality: Measures of its own, (output, output of the plain host) -> name: number or one
            number an image (B,). Outputs come batch by batch, on the CPU, in float32. These
            columns stand before the standard ones.
        device: Where to measure; where the model is by default.
        dtype: Of weights and images; that of the model by default.
        batch_size: Images of a call.
        rounds: Samples of every time; by default as many as fit into `seconds`, 5 to 50.
        seconds: Time spent on the timing of one row, about, when `rounds` is None.
        seed: Of random numbers, and of methods that have a setting `seed`.
        preprocessing: What the model wants to see, if it does not say so itself.
        limit: Use at most so many images.
        control: Whether the quality of random pruning to the same token counts is measured too.
        resume: JSON lines file. Finished rows are written to it as they come, and rows that it
            has for the same model, data and conditions are taken from there.
        progress: Called with (row, rows done, rows in all) after each row.
        command: What a reader types to repeat this; goes into the report.

    Returns:
        The comparison. An interrupt from the keyboard ends it early: then `interrupted` is set
        and the rows finished so far are there. Methods that do not fit this host are listed in
        `skipped`, with the reason.

    Raises:
        HostError: If the model is no supported host or cannot be copied.
        FitError: If something is fitted already, or not one of the methods fits.
        SettingsError: If a method, a setting or an argument is unknown or out of range.
        DataError: If images or labels cannot be used.
    """
    if batch_size < 1 or seconds <= 0 or (rounds is not None and rounds < 1):
        raise SettingsError(
            f"batch_size={batch_size}, rounds={rounds}, seconds={seconds}: expected at least one "
            "image a call, one round and more than 0 seconds"
        )
    host = _host(model, target)
    place, kind = _placed(model, device, dtype)
    data, labelled = _data(model, images, labels, preprocessing, limit)
    bench = _Bench(
        base=placed_copy(model, place, kind),
        target=target,
        restore=restore,
        data=data,
        labels=data.labels if labelled else None,
        classifier=labelled or classes_of(model) is not None,
        forward=forward or outputs.call,
        quality=quality,
        device=place,
        dtype=kind,
        batch_size=batch_size,
        rounds=rounds,
        seconds=seconds,
        control=control,
    )
    with torch.random.fork_rng(devices=[place] if place.type == "cuda" else []):
        torch.manual_seed(seed)
        plans, skipped = bench.plan(_chosen(methods), host, seed)
        facts = {
            **bench.facts(),
            "seed": seed,
            "model": fingerprint(model),
            "data": data.fingerprint(),
        }
        environment = _environment(model, host, bench, seed, command)
        result = Comparison([], environment, skipped, list(data.skipped))
        try:
            _run(bench, plans, facts, Journal(resume), result, seed, progress)
        except KeyboardInterrupt:
            logger.warning("interrupted after %d of %d rows", len(result.rows), len(plans))
            result.interrupted = True
    return result


@dataclass(frozen=True)
class _Plan:
    """One row to come; without a method the plain host's."""

    name: str
    settings: dict[str, Any]
    method: Method | None


def _run(
    bench: _Bench,
    plans: list[_Plan],
    facts: dict[str, Any],
    journal: Journal,
    result: Comparison,
    seed: int,
    progress: Progress | None,
) -> None:
    total = len(plans)
    for plan in plans:
        full = {} if plan.method is None else plan.method.settings()
        key = key_of({**facts, "method": plan.name, "settings": full})
        row = journal.get(key)
        if row is None:
            torch.manual_seed(seed)
            try:
                row = bench.measure(plan)
            except (FitError, TokensError) as error:
                result.skipped.append((_label(plan), str(error)))
                total -= 1
                continue
            journal.put(key, row)
        result.rows.append(row)
        if progress is not None:
            progress(row, len(result.rows), total)


@dataclass
class _Bench:
    """Everything that stays the same from row to row."""

    base: nn.Module
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
    _plain: tuple[float, tuple[int, ...]] | None = None

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
        self, methods: list[MethodLike], host: Host, seed: int
    ) -> tuple[list[_Plan], list[tuple[str, str]]]:
        """The rows to come, and (method, reason) of what does not fit this host."""
        fitted(self.base, NoOp(), self.target, self.restore, check=True)
        lengths = self.plain()[1]
        plans = [_Plan(PLAIN, {}, None)]
        skipped: list[tuple[str, str]] = []
        for given in methods:
            for settings, method in _expanded(given, len(lengths), lengths[0] - host.prefix, seed):
                plan = _Plan(method.slug, settings, method)
                try:
                    fitted(self.base, method, self.target, self.restore)
                except FitError as error:
                    if (method.slug, str(error)) not in skipped:
                        skipped.append((method.slug, str(error)))
                    continue
                plans.append(plan)
        if skipped and len(plans) == 1:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped)
            raise FitError(f"none of the methods fits this host. {reasons}")
        return plans, skipped

    def plain(self) -> tuple[float, tuple[int, ...]]:
        """GFLOPs per image of the plain host, and its tokens after each block."""
        if self._plain is None:
            subject = fitted(self.base, NoOp(), self.target, self.restore)
            self._plain = (self._gflops(self.base), self._lengths(subject))
        return self._plain

    def measure(self, plan: _Plan) -> Row:
        """One row."""
        plain_gflops, plain_lengths = self.plain()
        if plan.method is None:
            timings = self._timings({"plain": self.base, "again": self.base})
            return self._row(
                plan, plain_lengths, plain_gflops, timings["plain"], timings["again"], None,
                self._memory(self.base), self._quality(self.base), {},
            )  # fmt: skip
        subject = fitted(self.base, plan.method, self.target, self.restore)
        lengths = self._lengths(subject)
        twin = fitted(self.base, Twin(lengths), self.target, self.restore)
        timings = self._timings({"plain": self.base, "method": subject, "twin": twin})
        return self._row(
            plan, lengths, self._gflops(subject), timings["method"], timings["plain"],
            timings["twin"], self._memory(subject), self._quality(subject),
            self._chance(plan.method, lengths, plain_lengths),
        )  # fmt: skip

    def _row(
        self,
        plan: _Plan,
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

    def _lengths(self, subject: nn.Module) -> tuple[int, ...]:
        with torch.inference_mode(), transom.trace(part(subject, self.target)) as trace:
            self.forward(subject, self._sample())
        if not trace.lengths:
            raise HostError(
                "`forward` ran without passing the blocks of the host, so there is nothing to "
                "measure; check `forward` and `target`"
            )
        return tuple(trace.lengths)

    def _gflops(self, subject: nn.Module) -> float:
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
            once = cost.interleaved({"": run(self.base)}, rounds=2, device=self.device)[""]
            fitting = int(self.seconds * 1e3 / (3 * max(once.median_ms, 1e-3)))
            self.rounds = min(max(fitting, _ROUNDS[0]), _ROUNDS[1])
        runs = {name: run(subject) for name, subject in subjects.items()}
        return cost.interleaved(runs, rounds=self.rounds, device=self.device)

    def _chance(
        self, method: Method, lengths: tuple[int, ...], plain_lengths: tuple[int, ...]
    ) -> dict[str, float]:
        """The measures of random pruning to the same tokens after each block."""
        if not self.control or lengths == plain_lengths or method.slug == CONTROL:
            return {}
        try:
            chance = fitted(self.base, Random(counts=lengths), self.target, self.restore)
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

    def _outputs(self, subject: nn.Module) -> Any:
        for batch in self.data.batches(self.batch_size, self.device, self.dtype):
            with torch.inference_mode():
                yield outputs.to_cpu(self.forward(subject, batch))


def _host(model: nn.Module, target: str) -> Host:
    if not isinstance(model, nn.Module):
        raise HostError(f"got a {type(model).__name__}; expected a torch.nn.Module")
    if transom.fittings(model):
        slugs = ", ".join(fitting.slug for fitting in transom.fittings(model))
        raise FitError(
            f"{slugs} is fitted to this model, so the plain host cannot be measured; call "
            "transom.remove(model) first and name the method in `methods`"
        )
    return hosts.find(part(model, target))


def _data(
    model: nn.Module,
    images: Source | ImageSet,
    labels: Tensor | Sequence[int] | bool | None,
    preprocessing: Preprocessing | None,
    limit: int | None,
) -> tuple[ImageSet, bool]:
    """The images, and whether their labels are what the model's output is judged by."""
    classes = classes_of(model)
    if isinstance(images, ImageSet):
        if limit is not None or preprocessing is not None or not isinstance(labels, bool | None):
            raise SettingsError(
                "limit, preprocessing and labels belong to load_images when an ImageSet is given; "
                "beside it labels can only be True, False or None"
            )
        data = images
    else:
        wanted = preprocessing
        if wanted is None and isinstance(images, Tensor) and images.is_floating_point():
            wanted = Preprocessing(size=(images.shape[-2], images.shape[-1]))  # is never applied
        elif wanted is None:
            wanted = preprocessing_of(model)
        data = load_images(images, wanted, labels=labels, classes=classes, limit=limit)
    if data.labels is None or labels is False:
        return data, False
    if classes is None and labels is None:
        logger.info("the model has no classification head, so the labels are left out")
        return data, False
    if classes is not None:
        check_labels(data.labels, classes)
    return data, True


def _placed(
    model: nn.Module, device: torch.device | str | None, dtype: torch.dtype | str | None
) -> tuple[torch.device, torch.dtype]:
    own = next(p for p in model.parameters() if p.is_floating_point())
    if isinstance(dtype, str):
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise SettingsError(f"dtype={dtype!r}: expected float32, bfloat16 or float16")
        dtype = found
    try:
        place = own.device if device is None else torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise SettingsError(f"device={str(device)!r} cannot be used here: {reason}") from error
    return place, dtype or own.dtype


def _chosen(methods: Sequence[MethodLike] | None) -> list[MethodLike]:
    if methods is None:
        known = registry.methods()
        papers = [s for s, cls in known.items() if ".baselines." not in cls.__module__]
        return [*papers, CONTROL]
    if isinstance(methods, (str, Method)):
        methods = [methods]
    # The plain host is always measured; naming it does no harm.
    return [method for method in methods if method != PLAIN]


def _expanded(
    given: MethodLike, depth: int, patches: int, seed: int
) -> list[tuple[dict[str, Any], Method]]:
    """(settings to show, method) of what a user named."""
    if isinstance(given, Method):
        defaults = {f.name: f.default for f in dataclasses.fields(given)}
        return [({k: v for k, v in given.settings().items() if v != defaults[k]}, given)]
    if isinstance(given, str):
        grid = type(registry.build(given, {})).grid(depth, patches)
        pairs = [(given, settings) for settings in grid]
    elif isinstance(given, (tuple, list)) and len(given) == 2 and isinstance(given[1], Mapping):
        pairs = [(given[0], dict(given[1]))]
    else:
        raise SettingsError(
            f"{given!r} names no method; expected a slug such as 'tome', a pair such as "
            "('tome', {'r': 8}) or an instance such as ToMe(r=8)"
        )
    expanded = []
    for slug, settings in pairs:
        method = registry.build(slug, settings)
        if "seed" in method.settings() and "seed" not in settings:
            method = registry.build(method, {"seed": seed})
        expanded.append((settings, method))
    return expanded


def _label(plan: _Plan) -> str:
    settings = ", ".join(f"{name}={value}" for name, value in plan.settings.items())
    return f"{plan.name} {settings}".rstrip()


def _environment(
    model: nn.Module, host: Host, bench: _Bench, seed: int, command: str
) -> Environment:
    name = type(model).__name__
    architecture = host.architecture
    return {
        "model": f"{name} ({architecture})" if architecture and name != architecture else name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "host": host.family,
        "images": len(bench.data),
        "image_size": "×".join(str(side) for side in bench.data.images.shape[2:]),
        "dtype": str(bench.dtype).removeprefix("torch."),
        "batch_size": bench.batch_size,
        "seed": seed,
        **describe(bench.device),
        **({"command": command} if command else {}),
    }
