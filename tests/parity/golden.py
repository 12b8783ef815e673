"""A golden case, and how it is run and judged.

Everything runs in float64. The files hold results rounded to float32, so what is left beyond that
rounding is a difference in mathematics; float32 noise of a gradient could hide one.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn


@dataclass
class Golden:
    """One file: metadata in the header, tensors by role (input, param, output, cotangent, grad)."""

    path: Path
    slug: str
    case: str
    kind: str
    config: dict[str, Any]
    rtol: float
    atol: float
    loaded: nn.Module | None = field(default=None, repr=False)
    inputs: dict[str, Tensor] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path) -> Golden:
        with safe_open(str(path), framework="pt") as file:
            meta = file.metadata()
        return cls(
            path,
            meta["slug"],
            meta["case"],
            meta["kind"],
            json.loads(meta["config"]),
            float(meta["rtol"]),
            float(meta["atol"]),
        )

    @property
    def name(self) -> str:
        return f"{self.slug}-{self.case}"

    def tensors(self, role: str) -> dict[str, Tensor]:
        """All tensors of one role by the name behind it, in float64 if they are floating."""
        with safe_open(str(self.path), framework="pt") as file:
            names = [n for n in file.keys() if n.startswith(f"{role}.")]  # noqa: SIM118
            found = {n.removeprefix(f"{role}."): file.get_tensor(n) for n in names}
        return {n: t.double() if t.is_floating_point() else t for n, t in found.items()}

    def load(self, module: nn.Module, **changes: Tensor) -> None:
        """Put the case's parameters into `module`; every one has to have a place and vice versa."""
        module.double()
        module.load_state_dict({**self.tensors("param"), **changes}, strict=True)
        self.loaded = module

    def run(self, runner: Callable[[Golden], dict[str, Tensor]]) -> None:
        """Run the case and hold outputs and gradients against the file."""
        self.inputs = {
            name: t.requires_grad_() if t.is_floating_point() else t
            for name, t in self.tensors("input").items()
        }
        outputs = runner(self)
        for name, expected in self.tensors("output").items():
            assert name in outputs, f"the runner returns no {name!r}"
            self._close(f"output {name}", outputs[name].detach(), expected)
        cotangents = self.tensors("cotangent")
        if not cotangents:
            return
        sum((outputs[name] * c).sum() for name, c in cotangents.items()).backward()
        for name, expected in self.tensors("grad").items():
            self._close(f"gradient of {name}", self.inputs[name].grad, expected)
        for name, expected in self.tensors("gradparam").items():
            assert self.loaded is not None
            self._close(f"gradient of {name}", self.loaded.get_parameter(name).grad, expected)

    def _close(self, what: str, actual: Tensor | None, expected: Tensor) -> None:
        assert actual is not None, f"{what} is missing"
        exact = not expected.is_floating_point()
        torch.testing.assert_close(
            actual,
            expected,
            rtol=0 if exact else self.rtol,
            atol=0 if exact else self.atol,
            check_dtype=False,
            msg=lambda text: f"{what}: {text}",
        )
