"""Unified Normalization against hikvision-research/Unified-Normalization."""

from __future__ import annotations

from torch import Tensor

from transom.papers.compression.unified_norm import UnifiedNormLayer

from ..golden import Golden


def _layer(golden: Golden) -> UnifiedNormLayer:
    c = golden.config
    layer = UnifiedNormLayer(
        c["channels"],
        _pair(c["window_size"]),
        c.get("warmup_iters", 4000),
        c.get("outlier_filtration", True),
        c.get("eps", 1e-5),
        c.get("momentum", 0.9),
    )
    golden.load(layer)
    return layer.train(c.get("mode", "train") != "eval")


def _pair(window: int | list[int]) -> int | tuple[int, int]:
    return window if isinstance(window, int) else (window[0], window[1])


def _mask(golden: Golden, t: int) -> Tensor | None:
    """Padding of step t, if the case has some."""
    if not golden.config.get("pad_mask"):
        return None
    names = [f"{stem}{end}" for stem in ("pad_mask", "mask", "pad") for end in (t, "")]
    return next(golden.inputs[name] for name in names if name in golden.inputs).bool()


def norm(golden: Golden) -> dict[str, Tensor]:
    return {"y": _layer(golden)(golden.inputs["x"])}


def training(golden: Golden) -> dict[str, Tensor]:
    layer, inputs, out = _layer(golden), golden.inputs, {}
    grads, own = golden.tensors("grad"), golden.tensors("gradparam")
    for t in range(golden.config["steps"]):
        x, mask = inputs[f"x{t}"], _mask(golden, t)
        layer.zero_grad()
        y = out[f"y{t}"] = layer(x, mask)
        (y * inputs[f"cot{t}"].detach()).sum().backward()
        # no cotangent role in these files, so the gradients of each step are judged here
        golden._close(f"gradient of x{t}", x.grad, grads[f"x{t}"])
        for name in ("weight", "bias"):
            if f"{name}.step{t}" in own:
                got = layer.get_parameter(name).grad
                golden._close(f"gradient of {name}, step {t}", got, own[f"{name}.step{t}"])
    out |= dict(layer.named_buffers())
    out["y_eval"] = layer.eval()(inputs["x0"])
    return out


KINDS = {"norm": norm, "training": training}
