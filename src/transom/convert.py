"""Official checkpoints of backbones as safetensors files with this library's names."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transom import registry
from transom.errors import CheckpointError, SettingsError

# Where checkpoints of training scripts keep the weights, best first.
INSIDE = ("state_dict_ema", "model_ema", "state_dict", "model", "module")


def read(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The state dict in a checkpoint: safetensors, or a file of tensors and plain values.

    Args:
        path: of the file. Weights may stand under one of :data:`INSIDE`.

    Returns:
        Tensors by name, without a leading `module.`.

    Raises:
        CheckpointError: there is no such file, or it holds something beside tensors and plain
            values, or no weights.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no file {str(path)!r}")
    content: Any
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except SafetensorError as error:
        raise CheckpointError(f"{str(path)!r} is no safetensors file: {error}") from None
    except Exception as error:  # torch raises whatever the reader met
        raise CheckpointError(
            f"{str(path)!r} is no checkpoint of tensors and plain values, and nothing else is "
            f"loaded: {error}"
        ) from error
    while isinstance(content, Mapping):
        inner = next((content[k] for k in INSIDE if isinstance(content.get(k), Mapping)), None)
        if inner is None:
            break
        content = inner
    tensors = content if isinstance(content, Mapping) else {}
    state = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    if not state:
        raise CheckpointError(f"{str(path)!r} holds no state dict, under none of {list(INSIDE)}")
    if all(name.startswith("module.") for name in state):
        state = {name.removeprefix("module."): value for name, value in state.items()}
    return state


def convert(
    slug: str, source: str | os.PathLike[str], target: str | os.PathLike[str]
) -> tuple[str, int]:
    """Write an official checkpoint of a backbone as safetensors with our names.

    The checkpoint is held against every backbone of the paper; it has to be one of them, whatever
    the number of its classes.

    Args:
        slug: of the paper.
        source: the official file.
        target: safetensors file to write.

    Returns:
        Name of the backbone the weights belong to, and the number of tensors written.

    Raises:
        SettingsError: the paper has no backbones.
        CheckpointError: the file cannot be read, or belongs to no backbone of this paper.
    """
    from safetensors.torch import save_file

    rooms = registry.rooms()
    room = rooms.get(slug)
    if room is None or not room.backbones:
        have = [name for name, each in rooms.items() if each.backbones]
        raise SettingsError(f"{slug!r} has no backbones to convert weights for; {have} have some")
    state = read(source)
    if room.convert is not None:
        state = room.convert(state)
    misses = {b.name: _mismatch(b.name, state) for b in room.backbones}
    fitting = [name for name, miss in misses.items() if not miss]
    if not fitting:
        name, miss = min(misses.items(), key=lambda item: len(item[1]))
        raise CheckpointError(
            f"{os.fspath(source)!r} belongs to no backbone of {slug}; nearest is {name}, with "
            f"{len(miss)} differences, among them: {'; '.join(miss[:3])}"
        )
    metadata = {"format": "pt", "slug": slug, "backbone": fitting[0]}
    save_file({k: v.contiguous() for k, v in state.items()}, os.fspath(target), metadata)
    return fitting[0], len(state)


def _mismatch(name: str, state: Mapping[str, Tensor]) -> list[str]:
    """What stands between a state dict and a backbone; the classifier may have any width."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name)
    free = model.pretrained_cfg.get("classifier") or ()
    free = (free,) if isinstance(free, str) else tuple(free)
    own: dict[str, Tensor] = model.state_dict()
    found = [f"{k} is missing" for k in own if k not in state]
    found += [f"{k} is unknown" for k in state if k not in own]
    for key in own.keys() & state.keys():
        classifier = any(key.startswith(f"{prefix}.") for prefix in free)
        if own[key].shape != state[key].shape and not classifier:
            found.append(f"{key} is {tuple(state[key].shape)}, expected {tuple(own[key].shape)}")
    return found
