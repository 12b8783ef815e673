"""Head importance: what changes when a head is pruned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import transom
from transom.errors import HostError, SettingsError
from transom.lens.capture import ablate
from transom.watching import Edit

Replace = Literal["zero", "uniform", "mean"]
METRICS = ("accuracy", "confidence_true", "confidence_predicted", "distribution", "representation")


@dataclass(frozen=True)
class Importance:
    """What pruning each head costs; positive where the head helps.

    Attributes:
        images: by metric (L, H, B), per image: fall of accuracy (of 0 or 1) and of the probability
            of the true and the predicted class, Jensen-Shannon divergence in nats, and
            1 - cosine of the features before the classifier. Without labels the first two are
            absent, without classes all but the last.
        labels: (B,) true classes, or None.
        predicted: (B,) classes of the whole model; zeros without classes.
    """

    images: dict[str, Tensor]
    labels: Tensor | None
    predicted: Tensor

    @property
    def heads(self) -> dict[str, Tensor]:
        """Mean over images, by metric (L, H)."""
        return {name: values.mean(-1) for name, values in self.images.items()}

    def classes(self) -> dict[int, dict[str, Tensor]]:
        """Mean over the images of each class (predicted without labels), by metric (L, H)."""
        own = self.predicted if self.labels is None else self.labels
        return {
            int(c): {name: v[..., own == c].mean(-1) for name, v in self.images.items()}
            for c in own.unique()
        }

    @property
    def rank(self) -> Tensor:
        """(L, H) mean of the ranks by each metric; 0 is the most important head."""
        return torch.stack([ranks(values) for values in self.heads.values()]).mean(0)

    def order(self) -> list[tuple[int, int]]:
        """Heads (layer, head) from the most to the least important."""
        across = self.rank.shape[1]
        places = self.rank.flatten().argsort(stable=True).tolist()
        return [(place // across, place % across) for place in places]


def ranks(values: Tensor) -> Tensor:
    """Rank of every entry, 0 for the largest; equal ones share their mean rank."""
    flat = values.flatten().double()
    larger = (flat[None] > flat[:, None]).sum(1)
    equal = (flat[None] == flat[:, None]).sum(1)
    return (larger + (equal - 1) / 2).view(values.shape)


def divergence(p: Tensor, q: Tensor) -> Tensor:
    """Jensen-Shannon divergence in nats of distributions (..., C)."""
    middle = (p + q) / 2
    tiny = torch.finfo(p.dtype).tiny

    def relative(a: Tensor) -> Tensor:
        return (a * (a.clamp_min(tiny).log() - middle.clamp_min(tiny).log())).sum(-1)

    return ((relative(p) + relative(q)) / 2).clamp_min(0)


def measures(
    whole: tuple[Tensor | None, Tensor],
    pruned: tuple[Tensor | None, Tensor],
    labels: Tensor | None,
) -> dict[str, Tensor]:
    """All metrics of one pruned head, per image.

    Args:
        whole: logits (B, C), or None, and features (B, D) of the model.
        pruned: the same without the head.
        labels: (B,) true classes, or None.

    Returns:
        By metric (B,).
    """
    (logits, z), (other, w) = whole, pruned
    moved = 1 - torch.nn.functional.cosine_similarity(z, w, dim=-1)
    if logits is None or other is None:
        return {"representation": moved}
    exact = torch.promote_types(logits.dtype, torch.float32)  # halves are too coarse to compare
    p, q = logits.to(exact).softmax(-1), other.to(exact).softmax(-1)
    found = {}
    rows = torch.arange(len(p), device=p.device)
    if labels is not None:
        right, still = p.argmax(-1) == labels, q.argmax(-1) == labels
        found["accuracy"] = right.to(p.dtype) - still.to(p.dtype)
        found["confidence_true"] = p[rows, labels] - q[rows, labels]
    best = p.argmax(-1)
    found["confidence_predicted"] = p[rows, best] - q[rows, best]
    found["distribution"] = divergence(p, q)
    found["representation"] = moved
    return found


@torch.no_grad()
def head_importance(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None = None,
    *,
    replace: Replace = "zero",
    classes: bool = True,
) -> Importance:
    """Prune every head alone and measure what changes: L · H + 1 calls of the model.

    Args:
        model: an image host that returns logits (B, C), with or without fitted methods.
        images: (B, 3, H, W) as the model wants them.
        labels: (B,) true classes, or None.
        replace: what a pruned head puts out before the output projection (whose bias stays):
            "zero", the mean of its values ("uniform" attention), or its "mean" over these images.
        classes: False for a model that returns features (B, D) or (B, N, D) and no logits; only
            the change of these is measured then.

    Returns:
        See :class:`Importance`.

    Raises:
        HostError: the model returns no logits, or no features.
        SettingsError: `replace` is none of these, or labels do not fit the images.
    """
    if replace not in ("zero", "uniform", "mean"):
        raise SettingsError(f"replace is {replace!r}; expected 'zero', 'uniform' or 'mean'")
    if labels is not None and labels.shape != images.shape[:1]:
        raise SettingsError(
            f"labels have the shape {tuple(labels.shape)}; expected one a image, {len(images)}"
        )
    with transom.capture(model, "blocks.*.attention.head_output", check=False) as seen:
        look = run if classes else features
        whole = look(model, images)
        outs = list(seen.values())
        means = [out.mean(0) for out in outs]
        found: list[list[dict[str, Tensor]]] = []
        for i, out in enumerate(outs):
            found.append([])
            for h in range(out.shape[1]):
                with pruning(model, [(i, h)], replace, means):
                    found[-1].append(measures(whole, look(model, images), labels))
    names = found[0][0]
    values = {
        name: torch.stack([torch.stack([each[name] for each in layer]) for layer in found])
        for name in names
    }
    logits = whole[0]
    none = torch.zeros(len(images), dtype=torch.long, device=images.device)
    return Importance(values, labels, none if logits is None else logits.argmax(-1))


@torch.no_grad()
def pruning_curve(
    model: nn.Module, images: Tensor, labels: Tensor, order: Sequence[tuple[int, int]]
) -> Tensor:
    """Accuracy while heads are pruned one after the other, the last of `order` first.

    Args:
        model, images, labels: as in :func:`head_importance`.
        order: heads (layer, head) from the most to the least important.

    Returns:
        (heads + 1,) accuracy with 0, 1, ... heads pruned; its mean is the area under the curve.
    """
    curve = []
    with transom.capture(model, check=False):
        for count in range(len(order) + 1):
            with pruning(model, order[len(order) - count :]):
                right = run(model, images)[0].argmax(-1) == labels
            curve.append(right.double().mean())
    return torch.stack(curve)


@contextlib.contextmanager
def pruning(
    model: nn.Module,
    heads: Sequence[tuple[int, int]],
    replace: Replace = "zero",
    means: Sequence[Tensor] = (),
) -> Iterator[None]:
    """Calls in this context run without some heads (layer, head)."""
    layers: dict[int, list[int]] = {}
    for layer, head in heads:
        layers.setdefault(layer, []).append(head)
    kind = "probabilities" if replace == "uniform" else "head_output"
    edits: dict[str, Edit | Tensor | float] = {
        f"blocks.{layer}.attention.{kind}": _edit(own, replace, means[layer] if means else None)
        for layer, own in layers.items()
    }
    with transom.intervene(model, edits, check=False):
        yield


def _edit(heads: list[int], replace: Replace, mean: Tensor | None) -> Edit:
    if replace == "zero":
        return ablate(heads=heads)

    def edit(x: Tensor) -> Tensor:
        x = x.clone()
        for head in heads:
            x[:, head] = 1 / x.shape[-1] if mean is None or replace == "uniform" else mean[head]
        return x

    return edit


def run(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, C), and the features (B, D) that the classifier read."""
    kept: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        kept.append(given[0].detach())

    handle = classifier(model).register_forward_pre_hook(keep)
    try:
        out = model(images)
    finally:
        handle.remove()
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or not kept:
        raise HostError(
            f"{type(model).__name__} returns no logits (B, C) of one classifier; head importance "
            "needs a classifier"
        )
    features = kept[-1]
    return logits, features if features.dim() == 2 else features.mean(1)


def features(model: nn.Module, images: Tensor) -> tuple[None, Tensor]:
    """No logits, and the features (B, D) that a model without classifier returns."""
    out = model(images)
    pooled = getattr(out, "pooler_output", None)
    found = out if isinstance(out, Tensor) else pooled
    found = getattr(out, "last_hidden_state", None) if found is None else found
    if not isinstance(found, Tensor) or found.dim() not in (2, 3):
        raise HostError(
            f"{type(model).__name__} returns no features (B, D) or (B, N, D), so it cannot be told "
            "what a pruned head changes"
        )
    return None, found if found.dim() == 2 else found.mean(1)


def classifier(model: nn.Module) -> nn.Module:
    """The last layer of a model that classifies."""
    get = getattr(model, "get_classifier", None)
    found = get() if callable(get) else None
    for name in ("classifier", "head", "heads", "fc"):
        if found is None:
            found = getattr(model, name, None)
    if isinstance(found, nn.Module) and not isinstance(found, nn.Identity):
        return found
    raise HostError(
        f"{type(model).__name__} has no classifier that transom finds (get_classifier, classifier, "
        "head, heads or fc); head importance needs one"
    )
