"""The two phases of Sparsifiner's training as what a run asks for at each step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from transom.errors import SettingsError
from transom.hosts.base import Host
from transom.papers.attention.sparsifiner.loss import Weights, losses
from transom.papers.attention.sparsifiner.predictor import MaskPredictor, Prediction
from transom.registry import Training


class Phases(Training):
    """First the prediction is fitted to a teacher, then the model learns to live with it.

    Args:
        phase1: part of the training in which the prediction is fitted (the paper: 5 of 50 epochs).
        cls_distill, token_distill, attn_recon, attn_self_distill: weights of the losses beside
            that of the task.
        teacher: safetensors file with weights of the untouched host; None takes those the training
            starts from. A training that goes on after a stop needs the file.
    """

    def __init__(
        self,
        phase1: float = 0.1,
        cls_distill: float = 0.5,
        token_distill: float = 0.5,
        attn_recon: float = 0.01,
        attn_self_distill: float = 0.0,
        teacher: str | None = None,
    ) -> None:
        if not 0 <= phase1 <= 1:
            raise SettingsError(f"phase1 is {phase1}; expected a part of the training, from 0 to 1")
        self.phase1, self.path = phase1, teacher
        self.weights = Weights(0.0, cls_distill, token_distill, attn_recon, attn_self_distill)
        negative = [n for n, w in dataclasses.asdict(self.weights).items() if w < 0]
        if negative:
            raise SettingsError(f"{negative[0]} is negative; expected a weight of at least 0")
        self.teacher: nn.Module | None = None
        self.reconstructs = False
        self.handles: list[RemovableHandle] = []
        self.asked: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.seen: dict[int, tuple[Tensor, Tensor, Prediction]] = {}
        self.features: dict[str, Tensor] = {}

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Phases:
        """From a recipe.

        Raises:
            SettingsError: an option is unknown or out of range.
        """
        known = ("phase1", "cls_distill", "token_distill", "attn_recon", "attn_self_distill")
        unknown = sorted(set(options) - {*known, "teacher"})
        if unknown:
            raise SettingsError(
                f"sparsifiner's training has no {unknown[0]!r}; it has {[*known, 'teacher']}"
            )
        return cls(**options)

    def at_step(self, model: nn.Module, step: int, total: int) -> Mapping[str, Any]:
        predictors = [m for m in model.modules() if isinstance(m, MaskPredictor)]
        self.reconstructs = step < round(self.phase1 * total)
        for predictor in predictors:
            predictor.reconstructs = self.reconstructs
        if step >= total:
            self._stop()
        elif self.teacher is None:
            self._start(model, predictors, step)
        return {}

    def _start(self, model: nn.Module, predictors: list[MaskPredictor], step: int) -> None:
        import transom
        from transom import hosts

        if step and self.path is None:
            raise SettingsError(
                "sparsifiner's teacher is the model that the training started from, which is gone "
                "when a run goes on; give its weights as training option teacher=FILE.safetensors"
            )
        teacher = transom.remove(copy.deepcopy(model), "sparsifiner")
        if self.path is not None:
            teacher.load_state_dict(load_file(self.path))
        self.teacher = teacher.requires_grad_(False).eval()

        def call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training:
                self.asked = (args, kwargs)
                self.seen.clear()

        def keep(module: nn.Module, args: tuple[Any, ...], found: Prediction) -> None:
            if module.training:
                self.seen[id(module)] = (args[0], args[1], found)

        self.handles = [model.register_forward_pre_hook(call, with_kwargs=True)]
        self.handles += [p.register_forward_hook(keep) for p in predictors]
        self.handles += [
            _last(transom.fittings(model)[0].host).register_forward_hook(self._note("student")),
            _last(hosts.find(self.teacher)).register_forward_hook(self._note("teacher")),
        ]

    def _note(self, who: str) -> Any:
        def note(module: nn.Module, args: Any, out: Any) -> None:
            self.features[who] = out if isinstance(out, Tensor) else out[0]

        return note

    def _stop(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles, self.teacher, self.asked = [], None, None
        self.seen.clear()
        self.features.clear()

    def extra_loss(self, model: nn.Module, outputs: Tensor) -> Tensor | None:
        import transom

        if self.teacher is None or self.asked is None:
            return None
        args, kwargs = self.asked
        names = ["blocks.*.attention.probabilities"] if self.reconstructs else []
        with torch.no_grad(), transom.capture(self.teacher, *names, check=False) as held:
            taught = self.teacher(*args, **kwargs)
        taught = taught if isinstance(taught, Tensor) else taught.logits
        approx = [found.approx for _, _, found in self.seen.values()]
        if any(not a.requires_grad for a in approx):
            raise SettingsError(
                "sparsifiner's losses need the predictions of the forward pass, which gradient "
                "checkpointing throws away; switch it off"
            )
        weights, own = self.weights, []
        if not self.reconstructs:
            weights = dataclasses.replace(weights, attn_recon=0.0)
        if weights.attn_self_distill:
            width = next(iter(self.seen.values()))[0].shape[-1]
            own = [((q @ k.mT) * width**-0.5).softmax(-1) for q, k, _ in self.seen.values()]
        prefix = transom.fittings(model)[0].host.prefix
        found = losses(
            outputs,
            outputs.new_zeros(len(outputs), dtype=torch.int64),
            self.features["student"][:, prefix:],
            taught.to(outputs.dtype),
            self.features["teacher"][:, prefix:],
            approx,
            self._chosen(model, list(held.values())),
            own,
            weights=weights,
        )
        return found["loss"]

    def _chosen(self, model: nn.Module, attention: list[Tensor]) -> list[Tensor]:
        """The teacher's attention in the blocks that have a prediction."""
        import transom

        fitting = next(f for f in transom.fittings(model) if f.slug == "sparsifiner")
        if fitting.where is None or not attention:
            return attention
        return [attention[i] for i in fitting.where]


def _last(host: Host) -> nn.Module:
    """The norm that tokens leave before the head, or the last block."""
    for name in ("norm", "layernorm"):
        norm = getattr(host.root, name, None)
        if isinstance(norm, nn.Module) and not isinstance(norm, nn.Identity):
            return norm
    return next(reversed(list(host.stack.children())))
