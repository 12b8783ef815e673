"""What a model wants to see: size, crop, mean and standard deviation, read from the model."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn

from transom.errors import DataError

logger = logging.getLogger(__name__)

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes the model's input.

    Attributes:
        size: (height, width) in pixels.
        mean: Of the channels, pixels scaled to [0, 1].
        std: Of the channels.
        interpolation: "bilinear", "bicubic" or another name of torchvision's.
        crop_pct: Part of the resized picture that the crop keeps.
        crop_mode: "center" (shorter side is fitted, middle is cut out), "squash" (both sides are
            resized, no crop) or "border" (longer side is fitted, the rest is filled).
    """

    size: tuple[int, int] = (224, 224)
    mean: Triple = IMAGENET_DEFAULT_MEAN
    std: Triple = IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def pixels(self) -> Callable[[Image.Image], Tensor]:
        """A function from an RGB picture to pixels (3, H, W) uint8, resized and cropped."""
        transform = create_transform(
            input_size=(3, *self.size),
            is_training=False,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
            mean=self.mean,
            std=self.std,
            normalize=False,  # leaves uint8; see `normalise`
        )
        return lambda picture: torch.as_tensor(transform(picture))

    def normalise(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, H, W) in 0 … 255 as the model's float32 input of the same shape."""
        mean = torch.tensor(self.mean, device=pixels.device).view(1, 3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(1, 3, 1, 1)
        return (pixels.float() / 255 - mean) / std


_HALF = {"mean": IMAGENET_INCEPTION_MEAN, "std": IMAGENET_INCEPTION_STD}
_IMAGENET = {"mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD}
_CLIP = {"mean": OPENAI_CLIP_MEAN, "std": OPENAI_CLIP_STD}

# What the image processors of transformers do by default, by the start of `config.model_type`.
_FAMILIES: dict[str, dict[str, Any]] = {
    "clip": {**_CLIP, "crop_pct": 1.0, "crop_mode": "center"},
    "deit": {**_HALF, "crop_pct": 224 / 256, "crop_mode": "center"},
    "dinov2": {**_IMAGENET, "crop_pct": 224 / 256, "crop_mode": "center"},
    "siglip": {**_HALF, "crop_pct": 1.0, "crop_mode": "squash"},
    "vit": {
        **_HALF,
        "crop_pct": 1.0,
        "crop_mode": "squash",
        "interpolation": "bilinear",
    },
}


def preprocessing_of(model: nn.Module, **settings: Any) -> Preprocessing:
    """What a model wants to see.

    A timm model says so in its pretrained configuration. For a Hugging Face model the settings of
    the checkpoint's image processor count where they are on this machine already, and the
    defaults of its family otherwise. The size is always that of the model at hand.

    Args:
        model: A timm or Hugging Face model, or a module that contains exactly one.
        **settings: Fields of `Preprocessing` that are known better.

    Raises:
        DataError: If the model does not say, or a setting is unknown.
    """
    known = [field.name for field in fields(Preprocessing)]
    unknown = sorted(settings.keys() - set(known))
    if unknown:
        raise DataError(f"preprocessing has no setting {unknown[0]!r}; it has {known}")
    for module in model.modules():
        if hasattr(module, "pretrained_cfg"):
            return replace(_of_timm(module), **settings)
        if hasattr(getattr(module, "config", None), "model_type"):
            found = _of_transformers(module)
            if found is not None:
                return replace(found, **settings)
    if "size" in settings:
        return Preprocessing(**settings)
    raise DataError(
        f"{type(model).__name__} does not say what images it wants; pass "
        "preprocessing=Preprocessing(size=(height, width), mean=…, std=…)"
    )


def classes_of(model: nn.Module) -> int | None:
    """How many classes the head of a model tells apart; None if it has no classification head."""
    if hasattr(model, "pretrained_cfg"):
        return int(getattr(model, "num_classes", 0)) or None
    config: Any = getattr(model, "config", None)
    # DeiT's head for two class tokens has two classifiers, which agree on the classes.
    for name in ("classifier", "cls_classifier"):
        if isinstance(getattr(model, name, None), nn.Linear) and hasattr(config, "num_labels"):
            return int(config.num_labels)
    return None


def _of_timm(model: nn.Module) -> Preprocessing:
    config = resolve_model_data_config(model)
    size = config["input_size"][1:]
    # A model built with another img_size keeps the configuration of the checkpoint.
    embed = getattr(model, "patch_embed", None)
    if getattr(embed, "img_size", None) is not None:
        size = embed.img_size  # type: ignore[union-attr]
    return Preprocessing(
        size=(int(size[0]), int(size[1])),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def _of_transformers(model: nn.Module) -> Preprocessing | None:
    config: Any = model.config
    vision = getattr(config, "vision_config", config)
    size = getattr(vision, "image_size", None)
    family = next((name for name in _FAMILIES if vision.model_type.startswith(name)), None)
    if size is None or family is None:
        return None
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    settings = {"size": (height, width), **_FAMILIES[family], **_saved_processor(config)}
    return Preprocessing(**settings)


def _saved_processor(config: Any) -> dict[str, Any]:
    """Mean and standard deviation that were saved beside the weights, if they are here already."""
    origin = getattr(config, "_name_or_path", "")
    if not origin:
        return {}
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(origin, local_files_only=True)
    except (OSError, ValueError, ImportError):
        logger.info("no image processor of %s is here; its family's defaults are used", origin)
        return {}
    found = {"mean": processor.image_mean, "std": processor.image_std}
    return {name: tuple(value) for name, value in found.items() if value is not None}
