"""Sharpness against dense Hessians, and the muP rules against microsoft/mup."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.papers.lens.lr_transfer import (
    Curvature,
    Readout,
    ResidualNet,
    groups,
    half_squared_error,
    rescale,
    spectrum,
    tangent_kernel,
    trace,
)

from ..golden import Golden


def sharpness(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    x, y = given["x"].detach(), given["y"].detach()
    net = ResidualNet(
        c["input"],
        c["width"],
        c["depth"],
        "ntk" if c["regime"] == "ntk" else "mup",
        activation=c["activation"],
        gamma=c["gamma"],
        depth_exponent=c["depth_exponent"],
    )
    golden.load(net)
    named = dict(net.named_parameters())
    parameters = [named[name] for name in c["order_of_flattening"]]

    def loss() -> Tensor:
        return half_squared_error(net(x), y)

    here = Curvature(loss, parameters)
    values = spectrum(here, here.gradient, here.size, generator=torch.Generator().manual_seed(0))
    kernel = tangent_kernel(lambda: net(x), parameters)
    out = {
        "f": net(x),
        "loss": here.loss,
        "gradient": here.gradient,
        "hessian_top5": values[:5],
        "hessian_min": values[-1],
        "hessian_trace": trace(here, None),
        "ntk_eigenvalues": torch.linalg.eigvalsh(kernel).flip(0),
        "scaled_sharpness": net.gamma**2 * values[0],
        "lr": torch.tensor(net.rate(c["eta0"])),
    }
    with torch.no_grad():
        step = net.rate(c["eta0"]) * here.gradient
        for p, change in zip(parameters, step.split([p.numel() for p in parameters]), strict=True):
            p -= change.view_as(p)
    after = Curvature(loss, parameters)
    later = spectrum(after, after.gradient, after.size, generator=torch.Generator().manual_seed(0))
    return out | {
        "params_after_step": torch.cat([p.detach().flatten() for p in parameters]),
        "loss_after_step": after.loss,
        "sharpness_after_step": later[0],
    }


class Net(nn.Module):
    """The network of the case."""

    def __init__(self, inputs: int, width: int, classes: int, output_mult: float) -> None:
        super().__init__()
        self.inp = nn.Linear(inputs, width)
        self.hid = nn.Linear(width, 2 * width)
        self.hid2 = nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.out = Readout(width, classes, output_mult=output_mult)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x).relu()
        logits: Tensor = self.out(self.norm(h + self.hid2(self.hid(h).relu())))
        return logits


def training(golden: Golden) -> dict[str, Tensor]:
    c, given = golden.config, golden.inputs
    x, label = given["x"].detach(), given["label"]
    net, base = (
        Net(c["input"], width, c["classes"], c["output_mult"])
        for width in (c["width"], c["base_width"])
    )
    golden.load(net)
    ratios = rescale(net, base)
    logits = net(x)
    out = {"logits": logits, "loss": F.cross_entropy(logits, label)}
    out |= {f"rescaled.{name}": p.detach().clone() for name, p in net.named_parameters()}

    def trained(name: str, make: Callable[[nn.Module], torch.optim.Optimizer]) -> dict[str, Tensor]:
        twin = copy.deepcopy(net)
        optimizer = make(twin)
        for _ in range(c["steps"]):
            optimizer.zero_grad()
            F.cross_entropy(twin(x), label).backward()
            optimizer.step()
        return {f"{name}.{n}": p.detach() for n, p in twin.named_parameters()}

    decay = c["weight_decay"]
    out |= trained(
        "adam",
        lambda m: torch.optim.Adam(groups(m, ratios, c["adam_lr"], weight_decay=decay)),
    )
    rate, momentum = c["sgd_lr"], c["sgd_momentum"]
    out |= trained(
        "sgd",
        lambda m: torch.optim.SGD(
            groups(m, ratios, rate, optimizer="sgd", weight_decay=decay), momentum=momentum
        ),
    )
    return out


KINDS = {"sharpness": sharpness, "training": training}
