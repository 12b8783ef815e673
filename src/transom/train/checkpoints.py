"""Checkpoints of a run: one folder each, complete or not there.

A checkpoint is written beside the last one and renamed when it is complete; only then the last
one goes. Whatever happens while writing, one whole checkpoint is left.
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from transom.errors import CheckpointError, TrainingError
from transom.train.recipe import Recipe, parse_recipe

_NAME = re.compile(r"step-(\d+)")


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint of a run; None if there is none."""
    found = [p for p in folder.glob("step-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    return max(found, key=_step, default=None)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def save(
    accelerator: Accelerator, folder: Path, step: int, recipe: Recipe, average: nn.Module | None
) -> None:
    """Write a checkpoint, then remove those before it.

    Args:
        accelerator: that holds model and optimizer.
        folder: of the checkpoints of this run.
        step: steps made.
        recipe: of the run.
        average: moving average of the weights.

    Raises:
        CheckpointError: it could not be written; the one before it is intact.
    """
    path, part = folder / f"step-{step:08d}", folder / f"step-{step:08d}.part"
    if path.is_dir():
        return
    main = accelerator.is_main_process
    failure: Exception | None = None
    try:
        if main:
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(part))
        if main:
            if average is not None:
                save_file(_contiguous(average), part / "average.safetensors")
            facts = {"step": step, "recipe": recipe.plain()}
            (part / "run.json").write_text(json.dumps(facts), encoding="utf-8")
    except (
        Exception
    ) as error:  # safetensors, torch and the system each report a full disk differently
        failure = error
    if failure is not None:
        shutil.rmtree(part, ignore_errors=True)
        before = latest(folder)
        kept = f"; {before.name} is intact, and the next run goes on from it" if before else ""
        raise CheckpointError(
            f"the checkpoint {path.name} could not be written to {str(folder)!r} ({failure}){kept}"
        ) from failure
    accelerator.wait_for_everyone()
    if main:
        part.rename(path)
        for old in folder.glob("step-*"):
            if old != path:
                shutil.rmtree(old, ignore_errors=True)
    accelerator.wait_for_everyone()


def load(accelerator: Accelerator, path: Path, recipe: Recipe, average: nn.Module | None) -> int:
    """Put a checkpoint into model, optimizer and average.

    Args:
        accelerator: prepared as in the run that wrote it.
        path: of the checkpoint.
        recipe: of this run; it has to be the one that wrote the checkpoint.
        average: moving average of the weights.

    Returns:
        Steps made.

    Raises:
        TrainingError: it belongs to another recipe.
        CheckpointError: it cannot be read.
    """
    try:
        facts: dict[str, Any] = json.loads((path / "run.json").read_text(encoding="utf-8"))
        different = parse_recipe(facts["recipe"]).differences(recipe)
        if different:
            raise TrainingError(
                f"{str(path.parent.parent)!r} holds a run of another recipe, which differs in "
                f"{different}; give the same recipe to go on, another --out, or --fresh"
            )
        accelerator.load_state(str(path))
        if average is not None:
            average.load_state_dict(load_file(path / "average.safetensors"))
    except TrainingError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"the checkpoint {str(path)!r} cannot be read ({error}); use --fresh to begin again"
        ) from error
    return int(facts["step"])


def write(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """A safetensors file that is there as a whole or not at all.

    Raises:
        CheckpointError: it could not be written.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part, metadata)
        part.replace(path)
    except Exception as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise CheckpointError(f"{str(path)!r} could not be written ({error})") from error


def _contiguous(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
