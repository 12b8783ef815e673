"""Methods side by side on one host, one set of images and one machine."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import transom
from transom import hosts, registry
from transom.errors import FitError, HostError, SettingsError, TokensError
from transom.hosts import Host
from transom.measure import budget as budgets
from transom.measure import outputs
from transom.measure.bench import Bench, MethodLike, Plan
from transom.measure.comparison import Comparison
from transom.measure.data import ImageSet, Source, load_images
from transom.measure.environment import Environment, describe
from transom.measure.journal import Journal, fingerprint, key_of
from transom.measure.outputs import Forward, Quality
from transom.measure.preprocessing import Preprocessing, classes_of, preprocessing_of
from transom.measure.quality import check_labels
from transom.measure.row import CONTROL, PLAIN, Row
from transom.measure.subjects import part, placed_copy
from transom.papers.baselines.random_visual import RandomVisual
from transom.registry import Method, Takes
from transom.slots import Restore

logger = logging.getLogger(__name__)

Progress = Callable[[Row, int, int], None]


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
    budget: float | None = None,
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
            of its `grid`, from mild to strong. By default all that need no training and mean
            fewer tokens, and their random controls; with `budget` also those that need training.
        labels: (N,) class numbers. By default those of the folder or file are used if the model
            has a classification head; True uses them although it has none (`forward` returns
            class scores), False never.
        target: Path of the part that methods are fitted to, for example "backbone", where the
            model holds several hosts.
        restore: When tokens are restored to the full sequence, see `transom.apply`.
        forward: What is run and timed, (model, images (B, 3, H, W)) -> output; by default a call.
            A model that sees and speaks needs one that adds the prompt; a decoder that loses
            tokens gives fewer logits, so let it return those of the last token.
        quality: Measures of its own, (output, output of the plain host) -> name: number or one
            number an image (B,). Outputs come batch by batch, on the CPU, in float32. These
            columns stand before the standard ones.
        device: Where to measure; where the model is by default.
        dtype: Of weights and images; that of the model by default.
        batch_size: Images of a call.
        rounds: Samples of every time; by default as many as fit into `seconds`, 3 to 50.
        seconds: Time spent on the timing of one row, about, when `rounds` is None.
        seed: Of random numbers, and of methods that have a setting `seed`.
        preprocessing: What the model wants to see, if it does not say so itself.
        limit: Use at most so many images.
        budget: Part of the plain host's GFLOPs, for example 0.6. Each method then has one row, with
            the mildest setting that was measured to need at most that much. What a pair sets stays
            as it is; an instance, and a pair that sets what would be searched, are measured as
            given. Methods that cannot meet it are listed in `skipped`.
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
    if budget is not None:
        budgets.check(budget)
    found = _hosts(model, target)
    place, kind = _placed(model, device, dtype)
    data, labelled = _data(model, images, labels, preprocessing, limit)
    bench = Bench(
        base=placed_copy(model, place, kind),
        hosts=found,
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
        plans, skipped = bench.plan(_chosen(methods, bench, budget), seed, budget)
        facts = {
            **bench.facts(),
            "seed": seed,
            "model": fingerprint(model),
            "data": data.fingerprint(),
        }
        environment = _environment(model, next(iter(found.values())), bench, seed, command)
        if budget is not None:
            environment["budget"] = budget
        result = Comparison([], environment, skipped, list(data.skipped))
        try:
            _run(bench, plans, facts, Journal(resume), result, seed, progress)
        except KeyboardInterrupt:
            logger.warning("interrupted after %d of %d rows", len(result.rows), len(plans))
            result.interrupted = True
    return result


def _run(
    bench: Bench,
    plans: list[Plan],
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
                result.skipped.append((plan.label, str(error)))
                total -= 1
                continue
            journal.put(key, row)
        result.rows.append(row)
        if progress is not None:
            progress(row, len(result.rows), total)


def _hosts(model: nn.Module, target: str) -> dict[Takes, Host]:
    """What methods can be fitted to: an encoder, a decoder, or one of each."""
    if not isinstance(model, nn.Module):
        raise HostError(f"got a {type(model).__name__}; expected a torch.nn.Module")
    if transom.fittings(model):
        slugs = ", ".join(fitting.slug for fitting in transom.fittings(model))
        raise FitError(
            f"{slugs} is fitted to this model, so the plain host cannot be measured; call "
            "transom.remove(model) first and name the method in `methods`"
        )
    inside, found = part(model, target), dict[Takes, Host]()
    try:
        found["encoder"] = hosts.find(inside)
    except HostError:
        try:
            found["decoder"] = hosts.find(inside, decodes=True)
        except HostError:
            hosts.find(inside)  # whose reasons are the ones to tell
        return found
    with contextlib.suppress(HostError):
        found["decoder"] = hosts.find(inside, decodes=True)
    return found


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


def _chosen(
    methods: Sequence[MethodLike] | None, bench: Bench, budget: float | None
) -> list[MethodLike]:
    if methods is None:
        listed: list[MethodLike] = [slug for slug, cls in _reducing(bench, budget)]
        controls = {"encoder": CONTROL, "decoder": RandomVisual.slug}
        return [*listed, *(controls[takes] for takes in bench.hosts)]
    if isinstance(methods, (str, Method)):
        methods = [methods]
    # The plain host is always measured; naming it does no harm.
    return [method for method in methods if method != PLAIN]


def _reducing(bench: Bench, budget: float | None) -> Iterator[tuple[str, type[Method]]]:
    """Methods that mean fewer tokens: what is fair without training, or, at one budget, all."""
    for slug, cls in registry.methods().items():
        if ".tokens." not in cls.__module__:
            continue
        if budget is not None or (
            cls.takes in bench.hosts and not cls(**cls.grid(12, 196)[-1]).needs_training
        ):
            yield slug, cls


def _environment(
    model: nn.Module, host: Host, bench: Bench, seed: int, command: str
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
