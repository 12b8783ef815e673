"""MULTI-LANE: continual learning with one cheap pathway a task beside a frozen ViT.

x (B, N, C) is the frozen stream, z (T, B, 1 + S, C) the pathways: a class token without position
and S learned selectors each. In every layer, with x̂ = norm1(x) and ẑ = norm1(z):

    P = softmax_N(ẑ_sel x̂ᵀ / √C),  u = [ẑ_cls, P x̂]             summarise the patches
    o = attention(u), prompts of the task in front of keys and values (first layers)
    z <- z + [o_cls, ẑ_sel],  z <- z + mlp(norm2(z))             drop and replace
    x <- x + attention(x̂),    x <- x + mlp(norm2(x))             as without pathways

so a pathway costs 1 + S tokens a layer instead of N, never sees another one, and only its class
token gathers. The head is shared: each pathway answers for the classes of its own task, and the
answers are added (or a key per task chooses one). A new task opens a pathway as a copy of the last
one; trained are its selectors and prompts, and the head.

Source: De Min et al., Less is more: Summarizing Patch Tokens for efficient Multi-Label
Class-Incremental Learning, CoLLAs 2024; official code tdemin16/multi-lane@5ee982c (CC-BY-NC 4.0;
this file is written from the mathematics).

Checked against the official code: one attention layer, the model in training and evaluation with
the concatenating head. As released, the branch of the selectors is the normed selectors, and the
temperature is C^-1/2 over the full width. Not checked against it, for want of cases: the variants
dandr=False, tome and head_mode="task".

:class:`MultiLane` is timm's VisionTransformer with pathways, under the official parameter names;
:func:`with_lanes` makes one from a trained ViT. :func:`learn` runs the tasks of a stream in order
and scores all classes seen after each (:class:`Scores`: average and last mAP);
:func:`mosaic_stream` makes a multi-label stream of labelled images.
"""

from __future__ import annotations

from transom.papers.tokens.multi_lane.model import (
    Laned,
    Lanes,
    MultiLane,
    lane_loss,
    merged_down,
    summarise,
    with_lanes,
)
from transom.papers.tokens.multi_lane.stream import (
    Scores,
    Task,
    average_precision,
    learn,
    mosaic_stream,
    mosaics,
    score,
)
from transom.registry import Offer

__all__ = [
    "Laned",
    "Lanes",
    "MultiLane",
    "Scores",
    "Task",
    "average_precision",
    "lane_loss",
    "learn",
    "merged_down",
    "mosaic_stream",
    "mosaics",
    "score",
    "summarise",
    "with_lanes",
]

OFFERS = (
    Offer("pipeline", "multi-lane", with_lanes),
    Offer("operator", "summarise", summarise),
    Offer("objective", "multi-lane-loss", lane_loss),
    Offer("pipeline", "multi-lane-learn", learn),
    Offer("pipeline", "mosaic-stream", mosaic_stream),
)
