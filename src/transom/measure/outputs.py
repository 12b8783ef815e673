"""What models return, brought to one form: on the CPU, and as logits or features."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import DataError
from transom.measure import quality

Forward = Callable[[nn.Module, Tensor], Any]
# (output, output of the plain host) -> measures, one number or one number an image (B,) each
Quality = Callable[[Any, Any], Mapping[str, "Tensor | float"]]

# In this order: what stands for the image as a whole comes before what has to be averaged.
_FEATURES = ("image_embeds", "pooler_output", "features", "last_hidden_state")


def call(model: nn.Module, images: Tensor) -> Any:
    """Run a model on images (B, 3, H, W) as its library means it."""
    if getattr(model, "main_input_name", None) == "pixel_values":
        return model(pixel_values=images)
    return model(images)


def to_cpu(output: Any) -> Any:
    """The same output with every tensor on the CPU, floating point ones in float32."""
    if isinstance(output, Tensor):
        output = output.detach().cpu()
        return output.float() if output.is_floating_point() else output
    if isinstance(output, Mapping):
        return type(output)(**{name: to_cpu(value) for name, value in output.items()})
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*(to_cpu(value) for value in output))
    if isinstance(output, (list, tuple)):
        return type(output)(to_cpu(value) for value in output)
    return output


def logits(output: Any) -> Tensor | None:
    """Class scores (B, C) of an output that names them; None of any other."""
    found = output.get("logits") if isinstance(output, Mapping) else None
    return found if isinstance(found, Tensor) else None


def features(output: Any) -> Tensor:
    """What an output says about each image: a tensor (B, ...).

    A mapping is asked for pooled features first, then for tokens; of a sequence the first tensor
    counts.

    Raises:
        DataError: If there is no tensor in it.
    """
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        for name in ("logits", *_FEATURES):
            if isinstance(output.get(name), Tensor):
                return output[name]
        output = list(output.values())
    if isinstance(output, (list, tuple)):
        for value in output:
            if isinstance(value, Tensor) and value.ndim >= 2:
                return value
    raise DataError(
        f"the model returned a {type(output).__name__} without a tensor (B, ...) to compare; pass "
        "forward=, a function (model, images) -> tensor"
    )


def fidelity(output: Any, plain: Any, labels: Tensor | None, classifier: bool) -> dict[str, Tensor]:
    """The standard measures of one batch, one number an image (B,) each.

    Args:
        output: Of the fitted model.
        plain: Of the plain host for the same images.
        labels: (B,) class numbers, if there are any.
        classifier: Whether a bare tensor (B, C) holds class scores.

    Returns:
        With labels top-1, top-5, agreement and cosine; without cosine, and for class scores also
        agreement and kl.

    Raises:
        DataError: If the outputs differ in shape, or there are labels and no class scores.
    """
    a, b = features(output), features(plain)
    scores = logits(output)
    if scores is None and classifier and a.ndim == 2:
        scores = a
    measures = {"cosine": quality.cosine(a, b)}
    if scores is None:
        if labels is not None:
            raise DataError(
                f"labels need class scores (B, C), but the output is {tuple(a.shape)}; pass "
                "labels=False, or a forward that returns class scores"
            )
        return measures
    reference = logits(plain)
    reference = b if reference is None else reference
    if labels is None:
        return {
            **measures,
            "agreement": quality.agreement(scores, reference),
            "kl": quality.kl(scores, reference),
        }
    return {
        "top-1": quality.top_k(scores, labels, 1),
        "top-5": quality.top_k(scores, labels, 5),
        "agreement": quality.agreement(scores, reference),
        **measures,
    }


class Mean:
    """Means over images of measures that come batch by batch."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._images: dict[str, int] = {}

    def add(self, measures: Mapping[str, Tensor | float], images: int) -> None:
        """Take in one batch of so many images; a plain number counts for all of them.

        Raises:
            DataError: If a measure is neither a number nor one number an image.
        """
        for name, value in measures.items():
            values = torch.as_tensor(value, dtype=torch.float64)
            if values.ndim == 0:
                total = float(values) * images
            elif values.shape == (images,):
                total = float(values.sum())
            else:
                raise DataError(
                    f"the measure {name!r} has shape {tuple(values.shape)}; expected one number "
                    f"or one for each of the {images} images"
                )
            self._sums[name] = self._sums.get(name, 0.0) + total
            self._images[name] = self._images.get(name, 0) + images

    def result(self) -> dict[str, float]:
        """The means."""
        return {name: total / self._images[name] for name, total in self._sums.items()}
