"""Lenses on the attention: where heads look, rollout, sinks."""

from __future__ import annotations

import numpy as np
import torch

from transom.lens.drawing import Pixels, mark, montage, overlay
from transom.lens.maps import Maps
from transom.lens.seen import Look, with_panels

CLIP = 0.98  # quantile of rollout that is brightest; single patches would hide all others
SINK = 5.0  # times the mean attention that makes a sink


def attention(maps: Maps, names: list[str], pixels: list[Pixels]) -> Look:
    seen = maps.looked_at().cpu().numpy()  # (L, B, H, h, w)
    lines = []
    share = seen.reshape(*seen.shape[:3], -1)
    total = share.sum(-1)
    top = max(1, round(share.shape[-1] * 0.05))
    few = np.sort(share, -1)[..., -top:].sum(-1) / total.clip(1e-12)
    for layer in sorted({0, len(seen) // 2, len(seen) - 1}):
        by_head = few[layer].mean(0)
        lines.append(
            f"layer {layer}: {100 * total[layer].mean():.0f} % of the attention is on patches, "
            f"{100 * by_head.mean():.0f} % of that on the top {top}; most focused head "
            f"{by_head.argmax()} ({100 * by_head.max():.0f} %)"
        )
    frames = [
        [
            (
                f"layer {layer}",
                montage(
                    [("mean", overlay(picture, heads.mean(0)))]
                    + [(f"head {h}", overlay(picture, m)) for h, m in enumerate(heads)]
                ),
            )
            for layer, heads in enumerate(seen[:, b])
        ]
        for b, picture in enumerate(pixels)
    ]
    return with_panels(Look("attention", {"attention": seen}, summary=lines), names, frames)


def rollout(maps: Maps, names: list[str], pixels: list[Pixels]) -> Look:
    flow, p = maps.rollout(), maps.prefix
    rows = flow[:, :, 0, p:] if maps.class_token else flow[:, :, p:, p:].mean(2)
    seen = rows.unflatten(-1, maps.grid).cpu().numpy()  # (L, B, h, w)
    lines = []
    for name, last in zip(names, seen[-1], strict=True):
        y, x = np.unravel_index(last.argmax(), last.shape)
        part = last.max() / last.sum()
        lines.append(
            f"{name}: most comes from the patch in row {y}, column {x} "
            f"({100 * part:.1f} %, {part * last.size:.1f} times the mean)"
        )
    frames = [
        [
            (
                f"up to layer {i}",
                montage([("", picture), ("rollout", overlay(picture, m, clip=CLIP))]),
            )
            for i, m in enumerate(seen[:, b])
        ]
        for b, picture in enumerate(pixels)
    ]
    return with_panels(Look("rollout", {"rollout": seen}, summary=lines), names, frames)


def sinks(maps: Maps, names: list[str], pixels: list[Pixels]) -> Look:
    received = maps.received().cpu().numpy()  # (L, B, N)
    norm = torch.stack([x.float().norm(dim=-1) for x in maps.residual]).cpu().numpy()
    p = maps.prefix
    patches, sizes = received[..., p:], norm[..., p:]
    sink = patches > SINK * patches.mean(-1, keepdims=True)
    lines = []
    for layer in range(len(received)):
        part = (patches * sink)[layer].sum(-1).mean()
        line = (
            f"layer {layer}: {sink[layer].sum(-1).mean():.1f} sinks an image get "
            f"{100 * part:.0f} % of all attention, class and register tokens "
            f"{100 * received[layer, :, :p].sum(-1).mean():.0f} %"
        )
        if sink[layer].any():
            ratio = np.median(sizes[layer][sink[layer]]) / np.median(sizes[layer])
            line += f"; norm of sinks {ratio:.1f} times that of patches"
        lines.append(line)
    grid = maps.grid
    frames = [
        [
            (
                f"layer {i}",
                montage(
                    [
                        ("attention received", overlay(picture, patches[i, b].reshape(grid))),
                        ("norm", overlay(picture, sizes[i, b].reshape(grid))),
                        ("sinks", mark(picture, sink[i, b].reshape(grid))),
                    ]
                ),
            )
            for i in range(len(received))
        ]
        for b, picture in enumerate(pixels)
    ]
    arrays = {"received": received, "norm": norm, "sinks": sink}
    return with_panels(Look("sinks", arrays, summary=lines), names, frames)
