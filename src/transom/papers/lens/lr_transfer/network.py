"""The residual network whose scale is chosen by name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError

Regime = Literal["ntk", "mup", "depth-mup", "standard"]
PHI: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "linear": lambda x: x,
}


class ResidualNet(nn.Module):
    """A residual network with weights N(0, 1) and all scales in the forward pass.

    "standard" is what frameworks do, a deviation of 1/sqrt(fan in) and one learning rate for all
    weights, written in weights N(0, 1): the forward pass of "ntk", and a step size that grows with
    the fan in of each matrix.

    Args:
        inputs: features of an input, D.
        width: N.
        depth: residual layers, L.
        regime: "ntk", "mup", "depth-mup" or "standard".
        activation: one of tanh, relu, gelu, silu, linear.
        gamma: that the output is divided by; by default what the regime says.
        depth_exponent: a of the factor L^-a of each layer; by default what the regime says.
        narrow: width at which "ntk" and "standard" divide the output as "mup" does, so that a
            network of this width learns features in each of them; by default 1.
        generator: of the weights.

    Raises:
        SettingsError: an argument is out of range.
    """

    def __init__(
        self,
        inputs: int,
        width: int,
        depth: int,
        regime: Regime = "mup",
        *,
        activation: str = "tanh",
        gamma: float | None = None,
        depth_exponent: float | None = None,
        narrow: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        if regime not in get_args(Regime):
            raise SettingsError(f"regime is {regime!r}; expected one of {get_args(Regime)}")
        if activation not in PHI:
            raise SettingsError(f"activation is {activation!r}; expected one of {list(PHI)}")
        if min(inputs, width, depth, narrow) < 1:
            raise SettingsError(
                f"inputs={inputs}, width={width}, depth={depth}, narrow={narrow}; expected each "
                "to be 1 or more"
            )
        self.regime = regime
        self.depth = depth
        self.phi = PHI[activation]
        feeds = width if regime in ("mup", "depth-mup") else narrow
        self.gamma = gamma or math.sqrt(feeds)
        if depth_exponent is None:
            depth_exponent = 0.5 if regime == "depth-mup" else 0.0
        self.branch = depth**-depth_exponent

        def weight(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(shape, generator=generator))

        self.w_in = weight(width, inputs)
        for i in range(depth):
            self.register_parameter(f"w_{i}", weight(width, width))
        self.w_out = weight(width)

    def rate(self, base: float) -> float:
        """The step size eta_0 gamma^2 that goes with this width, from eta_0."""
        return base * self.gamma**2

    def rates(self, base: float) -> list[float]:
        """The step size of each parameter; all the same but for "standard"."""
        if self.regime == "standard":
            return [base * float(p.shape[-1]) for p in self.parameters()]
        return [self.rate(base)] * (self.depth + 2)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs (n, D) -> outputs (n,)."""
        width, inputs = self.w_in.shape
        h = x @ self.w_in.T / math.sqrt(inputs)
        for i in range(self.depth):
            w = self.get_parameter(f"w_{i}")
            h = h + self.branch / math.sqrt(width) * self.phi(h) @ w.T
        return self.phi(h) @ self.w_out / (self.gamma * math.sqrt(width))


def half_squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """0.5 mean (f - y)^2, whose Hessian by the outputs is the identity over n."""
    return 0.5 * (outputs - targets).square().mean()
