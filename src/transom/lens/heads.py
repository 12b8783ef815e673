"""The lens on heads: importance, distance and patterns of all heads on one page."""

from __future__ import annotations

import numpy as np
from torch import Tensor, nn

from transom import registry
from transom.lens.drawing import plot_heads
from transom.lens.seen import Look, Panel, drawn

_WIDTHS = (128, 64, 32)  # of the autoencoder; smaller than the default, whose first layer is slow


def heads(model: nn.Module, x: Tensor, labels: Tensor | None, seed: int) -> Look:
    offers = {o.name: o.build for o in registry.rooms()["vit-visual-analytics"].offers}
    labelled = classifies(model, x)
    found = offers["heads"](
        model, x, labels, importance=labelled, seed=seed, widths=_WIDTHS, epochs=100
    )
    table = {name: values.cpu().numpy() for name, values in found.table.items()}
    lines = []
    if labelled:
        order = found.importance.order()
        kept = min(3, len(order))
        told = [", ".join(f"{i}.{h}" for i, h in part) for part in (order[:kept], order[-kept:])]
        lines.append(f"most important heads (layer.head): {told[0]}; least: {told[1]}")
    else:
        lines.append("the model has no classifier, so pruning was not measured")
    reach = found.trend()["distance"].cpu().numpy()
    lines.append(
        f"mean distance of attention: {reach[0]:.2f} patches in the first layer, "
        f"{reach[-1]:.2f} in the last"
    )
    if found.patterns is not None:
        sizes = found.patterns.cluster.bincount().tolist()
        lines.append(f"{len(sizes)} patterns, of {', '.join(map(str, sizes))} heads")
    mass = np.stack([s.mass.cpu().numpy() for s in found.strength])
    figure = plot_heads(table, mass, found.patterns)
    result = Look("heads", {**table, "mass": mass}, {"heads": figure}, summary=lines, details=found)
    result.panels.append(Panel("all heads", [("all layers", drawn(figure))]))
    return result


def classifies(model: nn.Module, x: Tensor) -> bool:
    """Whether the model returns logits of a classifier."""
    out = model(x[:1])
    logits = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        return False
    get = getattr(model, "get_classifier", None)
    return not (callable(get) and isinstance(get(), nn.Identity))
