"""The slots `attention` (with its projections), `norm` and `ffn`: whole parts replaced."""

from __future__ import annotations

import copy

import pytest
import torch

import transom
from tests.common.cases import anatomy, close, same
from tests.common.hosts import HOSTS, call, images
from tests.common.probes import Rebuild
from transom.errors import FitError, TokensError

# These attend in plain softmax attention without norms of q and k, gates or positions in between.
PLAIN = (
    *("timm-class", "timm-registers", "timm-average", "timm-map", "timm-dynamic", "timm-wide"),
    *("hf-vit", "hf-deit", "hf-dinov2", "hf-dinov2-registers", "hf-dinov2-backbone"),
    *("hf-clip-vision", "hf-clip", "hf-siglip-vision", "hf-siglip"),
)
CLOSED = ("timm-post-norm", "timm-parallel", "compact-convolution", "compact-class")


@pytest.mark.parametrize("host", PLAIN)
@torch.no_grad()
def test_copies_of_the_parts_are_the_host(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)
    transom.apply(model, Rebuild())
    close(call(model, x), plain, 1e-5)


@pytest.mark.parametrize("host", [h for h in HOSTS if h not in CLOSED])
@torch.no_grad()
def test_parts_bite_and_come_out_again(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain, before, keys = call(model, x), anatomy(model), list(model.state_dict())
    transom.apply(model, Rebuild(factor=1.5))
    got = call(model, x)
    assert [t.shape for t in got] == [t.shape for t in plain]
    assert not same(got, plain)
    assert [k for k in model.state_dict() if "transom" not in k.split(".")] == keys
    transom.remove(model)
    assert anatomy(model) == before
    assert same(call(model, x), plain)


@pytest.mark.parametrize("host", CLOSED)
def test_blocks_without_such_parts_are_refused(host: str) -> None:
    model = HOSTS[host]()
    before = anatomy(model)
    with pytest.raises(FitError):
        transom.apply(model, Rebuild())
    assert anatomy(model) == before


@torch.no_grad()
def test_new_parameters_are_the_ones_that_run(tmp_path) -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    transom.apply(model, Rebuild())
    for name, parameter in model.named_parameters():
        if ".transom." in f".{name}":
            parameter.mul_(0.5)
    got = call(model, x)
    other = copy.deepcopy(model)
    assert same(call(other, x), got)
    for name, parameter in other.named_parameters():
        if ".transom." in f".{name}":
            parameter.mul_(2)
    assert not same(call(other, x), got), "the copy runs on the parameters of the original"


@torch.no_grad()
def test_a_part_that_needs_the_grid_says_when_it_is_gone() -> None:
    model, x = HOSTS["timm-class"](), images("timm-class")
    transom.apply(model, Rebuild(), where=-1)
    transom.apply(model, "random", keep_rate=0.5, layers=(0,))
    with pytest.raises(TokensError, match="grid"):
        call(model, x)
