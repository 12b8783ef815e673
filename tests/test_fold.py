"""Folding norms away: hosts, plain modules, and everything that must not be folded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.hosts import HOSTS, call, images
from transom.errors import FitError, HostError
from transom.fold import Scale

NORMS = [("slab", {"linear": False}), ("slab", {}), ("unified-norm", {})]
SOME = ["timm-class", "timm-registers", "timm-rich", "timm-rotary", "hf-dinov2", "hf-clip"]


def trained(host: str, slug: str, **settings: Any) -> nn.Module:
    """A host in double precision whose new norms look as if they had been trained."""
    model = HOSTS[host]().double()
    transom.apply(model, slug, **settings)
    return stirred(model)


def stirred(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            if "transom" in name:
                tensor += 0.1 * torch.randn_like(tensor)
        for name, tensor in model.named_buffers():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 2)
            elif name.endswith("running_mean"):
                tensor.normal_(0, 0.5)
    return model.eval()


@pytest.mark.parametrize("host", SOME)
@pytest.mark.parametrize(("slug", "settings"), NORMS)
@torch.no_grad()
def test_folded_host_computes_the_same(slug: str, settings: dict[str, Any], host: str) -> None:
    model, x = trained(host, slug, **settings), images(host).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    folded = transom.fold(model)
    for a, b in zip(call(folded, x), call(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)
    assert not any(callable(getattr(module, "as_affine", None)) for module in folded.modules())
    assert [f.slug for f in transom.fittings(model)] == [slug]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@torch.no_grad()
def test_single_precision(host: str) -> None:
    model, x = trained(host, "slab").float(), images(host)
    for a, b in zip(call(transom.fold(model), x), call(model, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_host_with_nothing_but_norms_fitted_is_plain_afterwards() -> None:
    model, x = trained("timm-class", "unified-norm"), images("timm-class").double()
    folded: Any = transom.fold(model)
    assert not transom.fittings(folded)
    assert not hasattr(folded, "transom")
    assert isinstance(folded.blocks[0].norm1, nn.Identity)
    assert type(folded.blocks) is nn.Sequential
    # what timm made loads what was folded once its norms are gone too
    fresh: Any = HOSTS["timm-class"]().double()
    for block in fresh.blocks:
        block.norm1 = block.norm2 = nn.Identity()
    fresh.load_state_dict(folded.state_dict())
    torch.testing.assert_close(fresh(x), folded(x))
    transom.apply(folded, "tome", r=2)  # and is a host again
    assert folded(x).isfinite().all()


@torch.no_grad()
def test_a_token_step_stays_and_can_be_removed() -> None:
    model, x = trained("timm-class", "unified-norm"), images("timm-class").double()
    plain = model(x)
    transom.apply(model, "tome", r=2)
    folded = transom.fold(model)
    assert [f.slug for f in transom.fittings(folded)] == ["tome"]
    torch.testing.assert_close(folded(x), model(x))
    transom.remove(folded)
    torch.testing.assert_close(folded(x), plain)


@torch.no_grad()
def test_what_went_into_a_method_cannot_be_removed() -> None:
    folded = transom.fold(trained("timm-class", "slab"))
    with pytest.raises(FitError, match="folded"):
        transom.remove(folded)


def test_a_host_without_such_norms() -> None:
    with pytest.raises(FitError, match="no norm"):
        transom.fold(HOSTS["timm-class"]())


def batch_norms(model: nn.Module) -> int:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, Scale)
    return sum(isinstance(module, kinds) for module in model.modules())


def scales(model: nn.Module) -> int:
    return sum(isinstance(module, Scale) for module in model.modules())


class Shared(nn.Module):
    """One linear map behind two norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.out = nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.one(x)) + self.out(self.two(x))


class Tied(nn.Module):
    """A table that is looked up and projects as well."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(5, 6), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(self.norm(self.table(x)), self.table.weight)


class Leaking(nn.Module):
    """A norm whose output is added to what a linear map makes of it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return h + self.out(h)


class Twice(nn.Module):
    """A norm that runs twice, in front of two maps."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.a, self.b = nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(self.norm(x)) * self.b(self.norm(x.flip(0)))


class Attending(nn.Module):
    """A norm in front of packed attention."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.attention = nn.MultiheadAttention(6, 2, bias=bias, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.attention(h, h, h)[0]


class Crossing(Attending):
    """The queries come from elsewhere, so the packed weight serves two inputs."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.attention(x, h, h)[0]


def images8() -> Tensor:
    return torch.randn(2, 3, 8, 8)


def rows() -> Tensor:
    return torch.randn(4, 6)


CASES: dict[str, tuple[nn.Module, Any, int]] = {
    "into the convolution in front": (
        nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        images8,
        0,
    ),
    "into a grouped convolution in front": (
        nn.Sequential(nn.Conv2d(3, 6, 3, groups=3), nn.BatchNorm2d(6), nn.GELU()),
        images8,
        0,
    ),
    "into an unpadded convolution behind": (
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 2, 2), nn.ReLU()),
        images8,
        0,
    ),
    "not into a padded convolution behind": (
        nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 6, 3, padding=1), nn.ReLU()),
        images8,
        1,
    ),
    "through a mean": (
        nn.Sequential(
            nn.ReLU(), nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)
        ),
        images8,
        0,
    ),
    "not through an activation": (
        nn.Sequential(nn.ReLU(), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)),
        rows,
        1,
    ),
    "at the end, into the map in front": (
        nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5), nn.BatchNorm1d(6)),
        rows,
        0,
    ),
    "at the end, alone": (nn.Sequential(nn.Tanh(), nn.BatchNorm1d(6)), rows, 1),
    "without scale and shift of its own": (
        nn.Sequential(nn.Tanh(), nn.BatchNorm1d(6, affine=False), nn.Linear(6, 2, bias=False)),
        rows,
        0,
    ),
    "one norm twice": (Twice(), rows, 0),
    "a map of two norms": (Shared(), rows, 2),
    "a map whose weight is looked up": (Tied(), lambda: torch.arange(5), 1),
    "a norm that is read beside": (Leaking(), rows, 1),
    "packed attention": (Attending(bias=True), rows, 0),
    "packed attention without a bias": (Attending(bias=False), rows, 0),
    "packed attention of two inputs": (Crossing(bias=True), rows, 1),
    "two in a row": (
        nn.Sequential(nn.BatchNorm1d(6), nn.BatchNorm1d(6), nn.Linear(6, 2)),
        rows,
        1,
    ),
}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_plain_modules(case: str) -> None:
    model, make, left = CASES[case]
    torch.manual_seed(0)
    model = stirred(copy.deepcopy(model).double())
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d) and norm.affine:
            norm.weight.normal_()
            norm.bias.normal_()
    x = make()
    x = x.double() if x.is_floating_point() else x
    folded = transom.fold(model, example=x)
    assert scales(folded) == left
    assert batch_norms(folded) == left
    other = x if not x.is_floating_point() else torch.randn_like(x)
    torch.testing.assert_close(folded(other), model(other))


def test_without_an_example() -> None:
    with pytest.raises(HostError, match="example"):
        transom.fold(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 2)))


@torch.no_grad()
def test_arguments_by_name() -> None:
    model = stirred(Leaking())
    folded = transom.fold(model, example={"x": rows()})
    x = rows()
    torch.testing.assert_close(folded(x), model(x))


class Hidden(nn.Module):
    """Hands a norm's output on in a way that no function call shows."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out = nn.BatchNorm1d(6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.out(h) + torch.from_numpy(h.numpy())


@torch.no_grad()
def test_a_copy_that_computes_something_else_is_refused() -> None:
    with pytest.raises(FitError, match="does not compute"):
        transom.fold(stirred(Hidden()), example=rows())
