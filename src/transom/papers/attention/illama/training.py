"""What exists only during training: schedules, and a start from the weights of a LLaMA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from transom.errors import CheckpointError, SettingsError

Schedule = Literal["constant", "linear"]
Mode = Literal["standard", "early", "late"]


def _lengths(epochs: int, iterations: int, cutoff: int) -> tuple[int, int]:
    if iterations < 1 or not 0 <= cutoff <= epochs:
        raise SettingsError(
            f"epochs is {epochs}, iterations {iterations} and cutoff {cutoff}; expected at least "
            "one iteration an epoch, and a cutoff between 0 and the epochs"
        )
    return cutoff * iterations, (epochs - cutoff) * iterations


def soft_mask_schedule(
    rate: float,
    epochs: int,
    iterations: int,
    cutoff: int,
    schedule: Schedule | Literal["standard"] = "linear",
) -> Tensor:
    """Rate of the soft mask at every iteration: from bidirectional to causal (sec. 3.5).

    Args:
        rate: at the start; 1 is bidirectional.
        epochs: of the training.
        iterations: of an epoch.
        cutoff: epochs after which the rate is 0.
        schedule: "constant" keeps the rate until then, "linear" lets it fall to 0, both ends
            included; "standard" keeps it for the whole training.

    Returns:
        (epochs · iterations,) float32.

    Raises:
        SettingsError: a number or a name is out of range.
    """
    mode: Mode = "standard" if schedule == "standard" else "early"
    return drop_schedule(
        rate, epochs, iterations, cutoff, mode, "constant" if schedule == "standard" else schedule
    )


def drop_schedule(
    rate: float,
    epochs: int,
    iterations: int,
    cutoff: int = 0,
    mode: Mode = "standard",
    schedule: Schedule = "constant",
) -> Tensor:
    """Rate of dropout or of dropped paths at every iteration.

    Args:
        rate: while it is on.
        epochs: of the training.
        iterations: of an epoch.
        cutoff: epochs after which an early rate is 0 and a late one begins.
        mode: "standard" is always on, "early" until the cutoff, "late" from there.
        schedule: of "early": constant, or linear to 0.

    Returns:
        (epochs · iterations,) float32.

    Raises:
        SettingsError: a number or a name is out of range.
    """
    if not 0 <= rate <= 1:
        raise SettingsError(f"rate is {rate}; expected a number from 0 to 1")
    if schedule not in ("constant", "linear") or mode not in ("standard", "early", "late"):
        raise SettingsError(
            f"mode is {mode!r} and schedule {schedule!r}; expected 'standard', 'early' or 'late', "
            "and 'constant' or 'linear'"
        )
    first, rest = _lengths(epochs, iterations, cutoff)
    if mode == "standard":
        return torch.full((first + rest,), rate)
    if mode == "late":
        return torch.cat([torch.zeros(first), torch.full((rest,), rate)])
    linear = schedule == "linear"
    early = torch.linspace(rate, 0, first) if linear else torch.full((first,), rate)
    return torch.cat([early, torch.zeros(rest)])


def selected(weight: Tensor, shape: Sequence[int]) -> Tensor:
    """Evenly spaced elements of a larger weight, along every axis.

    Where the size divides, indices 0, s, 2s, ... with s the ratio; elsewhere T - 1 in even steps,
    rounded.

    Args:
        weight: of the teacher.
        shape: of the student's, no larger.

    Raises:
        SettingsError: the shape has another number of axes, or is larger somewhere.
    """
    have = tuple(weight.shape)
    if len(have) != len(shape) or any(s > t for s, t in zip(shape, have, strict=True)):
        raise SettingsError(f"elements of shape {tuple(shape)} cannot be selected from {have}")
    for axis, (size, total) in enumerate(zip(shape, have, strict=True)):
        if total % size == 0:
            index = torch.arange(0, total, total // size, device=weight.device)
        else:
            index = torch.linspace(0, total - 1, size, device=weight.device).round().long()
        weight = weight.index_select(axis, index)
    return weight


# a LLaMA's names in transformers, by ours; several are stacked
_SOURCES = {
    "norm1.weight": ("input_layernorm.weight",),
    "norm2.weight": ("post_attention_layernorm.weight",),
    "attn.qkv.weight": tuple(f"self_attn.{n}_proj.weight" for n in "qkv"),
    "attn.proj.weight": ("self_attn.o_proj.weight",),
    "mlp.fc1.weight": ("mlp.gate_proj.weight",),
    "mlp.fc2.weight": ("mlp.down_proj.weight",),
    "mlp.fc3.weight": ("mlp.up_proj.weight",),
}


def from_llama(
    teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], prefix: str = "model.layers."
) -> dict[str, Tensor]:
    """A start for the blocks from the first layers of a LLaMA (sec. 3.6).

    Queries and keys are taken as they lie in the file; those of transformers pair channel i with
    i + d/2 in the rotation, here neighbours are paired, as the official code has it too.

    Args:
        teacher: state dict of a LLaMA of transformers, with as many key heads as query heads.
        student: state dict of an iLLaMA.
        prefix: of the teacher's layers.

    Returns:
        The student's state dict with its blocks replaced, but for biases.

    Raises:
        CheckpointError: the teacher lacks a tensor.
    """
    out = dict(student)
    for name, old in student.items():
        if not name.startswith("blocks."):
            continue
        _, number, rest = name.split(".", 2)
        if rest not in _SOURCES:
            continue
        wanted = [f"{prefix}{number}.{source}" for source in _SOURCES[rest]]
        missing = [source for source in wanted if source not in teacher]
        if missing:
            raise CheckpointError(
                f"the teacher has no {missing[0]!r}; expected the state dict of a LLaMA of "
                "transformers with at least as many layers as the student"
            )
        stacked = torch.cat([teacher[source] for source in wanted])
        out[name] = selected(stacked, old.shape).to(old).clone()
    return out
