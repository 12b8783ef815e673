"""Make the model that a name on the command line means."""

from __future__ import annotations

import difflib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from transom import registry
from transom.convert import read
from transom.errors import CheckpointError, HostError


def create(
    name: str,
    *,
    args: dict[str, Any] | None = None,
    weights: Path | None = None,
    pretrained: bool = False,
    seed: int = 0,
) -> nn.Module:
    """A model by name, in eval mode.

    Args:
        name: of a timm model, of weights that ship with transom ("transom/cifar10-vit"), or the
            folder or hub name ("org/model") of a Hugging Face model.
        args: for the constructor of a timm model.
        weights: file with the state dict: safetensors, or a checkpoint that holds tensors only.
        pretrained: download the weights of a timm model. A Hugging Face model always has its own.
        seed: of weights that are left random.

    Returns:
        The model. CLIP-like models with two towers are run on images alone.

    Raises:
        HostError: no model has this name, or it does not take these arguments.
        CheckpointError: the weights cannot be read, or are not those of this model.
    """
    import timm

    registry.rooms()  # backbones register with timm when their rooms are imported
    torch.manual_seed(seed)
    model: nn.Module
    folder = Path(name)
    if name.startswith("transom/"):
        model = _shipped(name)
    elif timm.is_model(name.split(".")[0]) or name.startswith("hf-hub:"):
        model = _timm(name, pretrained, args or {})
    elif folder.is_dir() or "/" in name:
        model = _transformers(name)
    else:
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        raise HostError(
            f"there is no timm model {name!r} and no such folder; expected a timm name such as "
            f"vit_small_patch16_224{f' (near: {close})' if close else ''}, or the folder or hub "
            "name of a Hugging Face model"
        )
    if weights is not None:
        _load(model, weights)
    return model.eval()


def shipped() -> list[str]:
    """Names of the trained models that ship with transom."""
    folder = resources.files("transom").joinpath("assets")
    if not folder.is_dir():
        return []
    names = (file.name for file in folder.iterdir() if file.name.endswith(".json"))
    return sorted(f"transom/{name.removesuffix('.json')}" for name in names)


def _shipped(name: str) -> nn.Module:
    if name not in shipped():
        raise HostError(f"transom ships no {name!r}; it ships {shipped()}")
    folder = resources.files("transom").joinpath("assets")
    base = name.removeprefix("transom/")
    facts = json.loads(folder.joinpath(f"{base}.json").read_text(encoding="utf-8"))
    model = _timm(facts["name"], False, facts["args"])
    with resources.as_file(folder.joinpath(f"{base}.safetensors")) as path:
        _load(model, path)
    return model.float()


def _timm(name: str, pretrained: bool, args: dict[str, Any]) -> nn.Module:
    import timm

    try:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **args)
    except (TypeError, AssertionError) as error:
        if not args:
            raise
        raise HostError(f"the timm model {name!r} does not take {args}: {error}") from error
    return model


class ImageTower(nn.Module):
    """A two-tower model run on images alone: its image embeddings."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, D) of images (B, 3, H, W)."""
        out = self.model.get_image_features(pixel_values=images)
        return out if isinstance(out, Tensor) else out.pooler_output


def _transformers(name: str) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise HostError(f"{name!r} is no Hugging Face model: {error}") from error
    named = (config.architectures or [""])[0]
    cls = getattr(transformers, named, transformers.AutoModel)
    model = cls.from_pretrained(name)
    return ImageTower(model) if hasattr(model, "get_image_features") else model


def _load(model: nn.Module, path: Path) -> None:
    state = read(path)
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        first = f"missing {missing[0]!r}" if missing else f"unknown {unexpected[0]!r}"
        raise CheckpointError(
            f"{str(path)!r} holds other weights than {type(model).__name__}: {len(missing)} "
            f"missing and {len(unexpected)} unknown tensors, first {first}"
        )
