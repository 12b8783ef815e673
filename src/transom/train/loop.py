"""The loop. It knows recipes, accelerate and timm; what a paper adds comes from its method.

Everything random in step s depends on the seed, s and the process alone, and every rate is a
function of s. So a run that is killed goes on from its last checkpoint to the same numbers.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, skip_first_batches
from accelerate.state import AcceleratorState, GradientState
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader

import transom
from transom.errors import DataError, SettingsError, TrainingError
from transom.measure import models
from transom.measure.environment import describe
from transom.measure.preprocessing import Preprocessing, classes_of, preprocessing_of
from transom.registry import Training
from transom.train import checkpoints
from transom.train.data import (
    Shuffled,
    Splits,
    TrainingImages,
    augmentation,
    load_splits,
    seed_everything,
)
from transom.train.evaluate import Score, evaluate
from transom.train.logs import Log, tensorboard
from transom.train.objective import Classify, Objective
from transom.train.recipe import ModelPart, Recipe
from transom.train.schedules import optimizer_of, scheduler_of

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Moment:
    """Where a run is, for whoever watches it.

    Attributes:
        step: steps made.
        steps: of the whole run.
        epoch: passes over the data that are complete.
        epochs: of the whole run.
        loss: of the last step.
        accuracy: of the last step, in percent.
        images_per_s: since this run was started or resumed.
        eta_s: seconds the rest will take, tests left out.
        test: accuracy on the test split in percent, right after it was measured.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    accuracy: float
    images_per_s: float
    eta_s: float
    test: float | None = None


@dataclass(frozen=True)
class Outcome:
    """What a run gave.

    Attributes:
        model: trained, in eval mode, with the method fitted if there is one; the moving average
            of its weights if the recipe asks for one.
        score: on the test split.
        out: folder with model.safetensors, fitting.safetensors, result.json and the logs.
        seconds: of this run, since it was started or resumed.
    """

    model: nn.Module
    score: Score
    out: Path
    seconds: float


def build_model(part: ModelPart, seed: int = 0) -> nn.Module:
    """The model of a recipe.

    Args:
        part: the section.
        seed: of random weights.

    Raises:
        HostError: no model has this name, or it does not take these arguments.
        CheckpointError: the weights are not its own.
    """
    weights = None if part.weights is None else Path(part.weights)
    return models.create(
        part.name, args=timm_args(part), weights=weights, pretrained=part.pretrained, seed=seed
    )


def timm_args(part: ModelPart) -> dict[str, Any]:
    """The arguments for ``timm.create_model`` that a section comes down to."""
    known: dict[str, Any] = {"mean": part.mean, "std": part.std, "crop_pct": part.crop_pct}
    overlay = {name: value for name, value in known.items() if value is not None}
    return {**part.args, **({"pretrained_cfg_overlay": overlay} if overlay else {})}


def train(
    recipe: Recipe,
    out: Path | str,
    *,
    watch: Callable[[Moment], None] | None = None,
    fresh: bool = False,
) -> Outcome:
    """Train, or go on where the run in `out` was stopped.

    Args:
        recipe: what to do.
        out: folder for checkpoints, logs and results.
        watch: called after every step.
        fresh: begin again instead of going on.

    Raises:
        SettingsError: the recipe asks for what does not exist or does not fit together.
        DataError: the data cannot be used.
        TrainingError: the loss is no finite number; `out` holds a run of another recipe; or the
            processes that were launched do not find each other.
        CheckpointError: a checkpoint cannot be written or read.
    """
    run = _Run(recipe, Path(out), fresh)
    for _ in run.steps(watch):
        pass
    return run.finish()


class _Run:
    """Everything one run consists of."""

    def __init__(self, recipe: Recipe, out: Path, fresh: bool) -> None:
        self.recipe, self.out = recipe, out
        self.accelerator = _accelerator(recipe, out)
        self.main = self.accelerator.is_main_process
        if self.main:
            if fresh:
                shutil.rmtree(out / "checkpoints", ignore_errors=True)
            out.mkdir(parents=True, exist_ok=True)
        self.accelerator.wait_for_everyone()
        # what differs is told before minutes are spent on reading data
        model = build_model(recipe.model, recipe.seed)
        self.preprocessing = preprocessing_of(model)
        classes = classes_of(model)
        if classes is None:
            raise SettingsError(
                f"{recipe.model.name!r} has no classification head; set model.args.num_classes"
            )
        self.splits = load_splits(recipe.data, self.preprocessing, classes)
        teacher = copy.deepcopy(model).requires_grad_(False).eval() if recipe.distil else None
        self.training = Training()
        if recipe.method is not None:
            part = recipe.method
            method = transom.registry.build(part.name, part.settings)
            self.training = method.training(**part.training)
            transom.apply(model, method, where=part.where, restore=part.restore)
        self._prepare(model.train(), teacher, classes)

    def _prepare(self, model: nn.Module, teacher: nn.Module | None, classes: int) -> None:
        recipe, accelerator = self.recipe, self.accelerator
        optimizer = optimizer_of(model, recipe.optim)
        # before accelerate wraps the forward of mixed precision around it, which a copy would share
        self.average: ModelEmaV3 | None = None
        if recipe.ema is not None:
            self.average = ModelEmaV3(model, decay=recipe.ema, use_warmup=True)
            self.average.to(accelerator.device)
        self.own_forward = model.__dict__.get("forward")
        self.sampler = Shuffled(len(self.splits.train.pictures), recipe.seed)
        loader = _loader(recipe, self.splits, self.preprocessing, self.sampler)
        self.model, self.optimizer, self.loader = accelerator.prepare(model, optimizer, loader)
        self.bare: nn.Module = accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if teacher is not None:
            teacher = teacher.to(accelerator.device)
        self.objective: Objective = Classify(recipe, classes, teacher, self.training)
        self.per_epoch = -(-len(self.loader) // recipe.accumulate)
        self.total = recipe.epochs * self.per_epoch
        self.scheduler = scheduler_of(optimizer, recipe.optim, self.total, self.per_epoch)
        self.final: Score | None = None
        self.done = 0
        last = checkpoints.latest(self.out / "checkpoints")
        if last is not None:
            average = None if self.average is None else self.average.module
            self.done = checkpoints.load(accelerator, last, recipe, average)
            logger.info("going on after step %d of %d", self.done, self.total)
        if self.main:
            text = json.dumps(recipe.plain(), indent=2)
            (self.out / "recipe.json").write_text(text + "\n", encoding="utf-8")
        self.log = Log(accelerator, self.out, self.done)

    @property
    def judged(self) -> nn.Module:
        """The model that is tested and written."""
        return self.bare if self.average is None else self.average.module

    def steps(self, watch: Callable[[Moment], None] | None) -> Iterator[int]:
        """Make all steps that are left."""
        self.started, first = time.perf_counter(), self.done
        batch = self.recipe.batch_size * self.recipe.accumulate * self.accelerator.num_processes
        tested: float | None = None
        while self.done < self.total:
            epoch = self.done // self.per_epoch
            for judged in self._epoch(epoch):
                made = self.done - first
                rate = made / (time.perf_counter() - self.started)
                loss, correct = judged
                self._row(epoch, loss, correct, rate * batch)
                ends = self.done % self.per_epoch == 0
                tested = self._test(epoch + 1) if ends else None
                if ends or self.done % (self.recipe.checkpoint_steps or self.total + 1) == 0:
                    self._checkpoint()
                if watch is not None and self.main:
                    left = (self.total - self.done) / rate
                    watch(
                        Moment(
                            self.done,
                            self.total,
                            epoch + ends,
                            self.recipe.epochs,
                            loss,
                            100 * correct,
                            rate * batch,
                            left,
                            tested,
                        )
                    )
                yield self.done

    def _epoch(self, epoch: int) -> Iterator[tuple[float, float]]:
        """The steps of one epoch that are left: loss and part that was right, of each."""
        recipe, accelerator = self.recipe, self.accelerator
        self.sampler.epoch = epoch
        skip = (self.done - epoch * self.per_epoch) * recipe.accumulate
        loader = skip_first_batches(self.loader, skip) if skip else self.loader
        self.model.train()
        self.optimizer.zero_grad()
        sums: list[Tensor] = []
        for place, (images, labels, indices) in enumerate(loader, skip):
            if not sums:
                self._begin(self.done)
            ticket = epoch * len(self.loader) + place
            seed_everything(recipe.seed, ticket, accelerator.process_index, 1)
            with accelerator.accumulate(self.model):
                judged = self.objective(self.model, self.bare, images, labels)
                self._finite(judged.loss, images, labels, indices)
                accelerator.backward(judged.loss)
                if accelerator.sync_gradients and recipe.optim.clip is not None:
                    accelerator.clip_grad_norm_(self.model.parameters(), recipe.optim.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            sums.append(torch.stack([judged.loss.detach(), judged.correct]))
            if accelerator.sync_gradients:
                self.done += 1
                if self.average is not None:
                    self.average.update(self.bare, step=self.done)
                mean = accelerator.reduce(torch.stack(sums).mean(0), reduction="mean")
                sums = []
                yield float(mean[0]), float(mean[1])

    def _begin(self, step: int) -> None:
        """Learning rate and settings of the method for the step that is about to be made."""
        self.scheduler.step_update(step)
        method = self.recipe.method
        if method is None:
            return
        settings = self.training.at_step(self.bare, step, self.total)
        for model in (self.bare, *(() if self.average is None else (self.average.module,))):
            now = next(f for f in transom.fittings(model) if f.slug == method.name).method
            if any(getattr(now, name) != value for name, value in settings.items()):
                transom.adjust(model, method.name, **settings)

    def _finite(self, loss: Tensor, images: Tensor, labels: Tensor, indices: Tensor) -> None:
        if torch.isfinite(loss):
            return
        path = self.out / f"bad-batch-{self.accelerator.process_index}.safetensors"
        names = [self.splits.train.names[i] for i in indices.tolist()]
        checkpoints.write(
            {"images": images, "labels": labels, "indices": indices},
            path,
            {"step": str(self.done), "names": json.dumps(names)},
        )
        shown = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        inputs = (
            "the images are finite"
            if torch.isfinite(images).all()
            else "the images are not finite either"
        )
        raise TrainingError(
            f"the loss of step {self.done} is {float(loss.detach())}, on {shown}; {inputs}. The "
            f"batch is in {str(path)!r}. A lower optim.lr, optim.clip=1 or precision=fp32 may help"
        )

    def _row(self, epoch: int, loss: float, correct: float, rate: float) -> None:
        if self.done % self.recipe.log_steps and self.done != self.total:
            return
        self.log.add(
            "train",
            self.done,
            epoch=epoch,
            loss=loss,
            accuracy=100 * correct,
            lr=max(group["lr"] for group in self.optimizer.param_groups),
            images_per_s=round(rate, 1),
            seconds=round(time.perf_counter() - self.started, 2),
        )

    def _score(self, exact: bool) -> Score:
        accelerator = self.accelerator
        options: dict[str, Any] = {} if exact else {"context": accelerator.autocast}
        return evaluate(
            self.judged,
            self.splits.test,
            batch_size=self.recipe.batch_size,
            device=accelerator.device,
            part=(accelerator.process_index, accelerator.num_processes),
            total=lambda counts: accelerator.reduce(counts, reduction="sum"),
            **options,
        )

    def _test(self, epoch: int) -> float:
        last = self.done == self.total
        if last:
            self._settle()
        score = self._score(exact=last)
        self.final = score if last else None
        seconds = round(time.perf_counter() - self.started, 2)
        values = {"loss": score.loss, "accuracy": score.accuracy, "seconds": seconds}
        self.log.add("test", self.done, epoch=epoch, **values)
        return score.accuracy

    def _settle(self) -> None:
        """Bring the model to what is judged, written and handed out: final settings, fp32."""
        self._begin(self.total)
        self.bare.__dict__.pop("_original_forward", None)
        if self.own_forward is None:
            self.bare.__dict__.pop("forward", None)
        else:
            self.bare.forward = self.own_forward

    def _checkpoint(self) -> None:
        average = None if self.average is None else self.average.module
        folder = self.out / "checkpoints"
        checkpoints.save(self.accelerator, folder, self.done, self.recipe, average)

    def finish(self) -> Outcome:
        """Judge the model and write it."""
        seconds = time.perf_counter() - self.started
        if self.final is None:  # nothing was left to do
            self._settle()
        score = self.final or self._score(exact=True)
        model = self.judged.eval()
        if self.main:
            fitted = transom.fittings(model)
            own = {
                name: tensor
                for name, tensor in model.state_dict().items()
                if not (fitted and "transom" in name.split("."))
            }
            checkpoints.write(own, self.out / "model.safetensors")
            if fitted:
                transom.save(model, self.out / "fitting.safetensors")
            self._result(score, seconds)
        self.log.close()
        self.accelerator.wait_for_everyone()
        return Outcome(model, score, self.out, seconds)

    def _result(self, score: Score, seconds: float) -> None:
        train = self.splits.train
        result = {
            "accuracy": score.accuracy,
            "loss": score.loss,
            "confusion": score.confusion.tolist(),
            "train_images": len(train.pictures),
            "test_images": score.count,
            "skipped": [list(pair) for pair in self.splits.skipped],
            "parameters": sum(p.numel() for p in self.bare.parameters()),
            "steps": self.total,
            "seconds": round(seconds, 1),
            "environment": describe(self.accelerator.device),
            "recipe": self.recipe.plain(),
        }
        text = json.dumps(result, indent=2)
        (self.out / "result.json").write_text(text + "\n", encoding="utf-8")


def _accelerator(recipe: Recipe, out: Path) -> Accelerator:
    """An accelerator for this recipe, also where another run in this process had other options."""
    launched = torch.distributed.is_available() and torch.distributed.is_initialized()
    AcceleratorState._reset_state(reset_partial_state=not launched)
    GradientState._reset_state()
    precision = {"fp32": "no"}.get(recipe.precision, recipe.precision)
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=recipe.accumulate,
            cpu=recipe.device == "cpu",
            dynamo_backend="inductor" if recipe.compile else None,
            log_with="tensorboard" if tensorboard() else None,
            project_dir=str(out),
            step_scheduler_with_optimizer=False,
        )
    except (ValueError, ImportError) as error:
        raise SettingsError(f"accelerate refuses precision {recipe.precision}: {error}") from error
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > accelerator.num_processes == 1:
        # without a GPU accelerate overlooks a launch for FSDP: each process would train alone
        raise TrainingError(
            f"{processes} processes were launched, but each would train alone, because accelerate "
            "found no GPU; give device=cpu to share the work on a CPU, and leave FSDP to GPUs"
        )
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise SettingsError("precision is fp16, which needs a GPU; use bf16 or fp32 on the CPU")
    if recipe.ema is not None and str(accelerator.distributed_type).endswith("FSDP"):
        raise SettingsError("ema averages whole weights, which FSDP does not keep; leave it out")
    return accelerator


def _loader(
    recipe: Recipe, splits: Splits, preprocessing: Preprocessing, sampler: Shuffled
) -> DataLoader[tuple[Tensor, int, int]]:
    images = TrainingImages(splits.train, augmentation(recipe.augment, preprocessing), recipe.seed)
    if len(images) < recipe.batch_size:
        raise DataError(
            f"the train split has {len(images)} images, fewer than one batch of "
            f"{recipe.batch_size}; set a smaller batch_size"
        )
    return DataLoader(
        images,
        batch_sampler=BatchSampler(sampler, recipe.batch_size, drop_last=True),
        num_workers=recipe.workers,
        persistent_workers=False,
        pin_memory=torch.cuda.is_available(),
    )
