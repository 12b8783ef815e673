"""Applying changes what a host computes and nothing else; removing gives the host back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import transom
from tests.common.cases import (
    DROPS,
    MERGES,
    METHODS,
    anatomy,
    bites,
    close,
    fitted,
    pairs,
    same,
    strongest,
)
from tests.common.hosts import HOSTS, call, images, tensors
from transom import hosts, registry
from transom.errors import FitError


@pytest.mark.parametrize(("method", "host"), pairs())
@torch.no_grad()
def test_bites_then_restores(method: str, host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)
    before, keys = anatomy(model), list(model.state_dict())

    fitted(model, method)
    assert anatomy(model) != before
    got = call(model, x)
    assert [t.shape for t in got] == [t.shape for t in plain]
    assert same(got, plain) is not bites(model), f"{method} fills slots and changes nothing"
    assert [k for k in model.state_dict() if not _new(k)] == keys

    transom.remove(model)
    assert anatomy(model) == before
    assert list(model.state_dict()) == keys
    assert same(call(model, x), plain)


def _new(key: str) -> bool:
    return "transom" in key.split(".")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_fits_some_host(method: str) -> None:
    found = []
    for host in ("timm-class", "timm-average", "hf-vit"):
        try:
            model = transom.apply(HOSTS[host](), method, **strongest(method))
        except FitError:
            continue
        found.append(bites(model))
    assert found
    assert all(found) or method == "none"


@pytest.mark.parametrize(("method", "host"), pairs())
@torch.no_grad()
def test_neutral_settings_change_nothing(method: str, host: str) -> None:
    neutral = registry.methods()[method].neutral()
    if neutral is None:
        pytest.skip(f"{method} has no neutral settings")
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)
    try:
        transom.apply(model, method, **neutral)
    except FitError as error:
        pytest.skip(str(error))
    close(call(model, x), plain, 1e-6)


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_hooks_keep_firing(host: str) -> None:
    model: Any = HOSTS[host]()
    x, seen = images(host), []
    blocks: Any = hosts.find(model).stack
    blocks[0].register_forward_hook(lambda *_: seen.append("old"))
    blocks[1].register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1]))

    transom.apply(model, DROPS, **strongest(DROPS))
    seen.clear()
    blocks[2].register_forward_hook(lambda module, args, out: seen.append(tensors(out)[0].shape))
    call(model, x)
    assert seen[0] == "old"
    assert isinstance(seen[1], int)
    assert len(seen) == 3

    seen.clear()
    transom.remove(model)
    call(model, x)
    assert len(seen) == 3, "a hook of the user went away with the method"


@torch.no_grad()
def test_a_hook_may_change_what_a_block_returns() -> None:
    model: Any = HOSTS["timm-class"]()
    x = images("timm-class")
    transom.apply(model, MERGES, r=2)
    before = call(model, x)
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: 2 * out)
    assert not same(call(model, x), before)
    handle.remove()
    assert same(call(model, x), before)


@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@torch.no_grad()
def test_parameters_are_the_hosts_own(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fitted(model, MERGES)
    for parameter in model.parameters():
        parameter.mul_(0.5)
    model.load_state_dict(weights)
    transom.remove(model)
    assert same(call(model, x), plain)


@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@torch.no_grad()
def test_removed_in_any_order_and_applied_again(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    before = anatomy(model)
    first = call(fitted(model, MERGES), x)
    transom.remove(model, MERGES)
    second = call(fitted(model, DROPS), x)
    transom.remove(model)
    assert same(call(fitted(model, MERGES), x), first)
    assert not same(first, second)
    transom.remove(model)
    assert anatomy(model) == before


@torch.no_grad()
def test_a_host_inside_a_users_model() -> None:
    """The user's own module around a host is neither changed nor in the way."""
    host: Any = HOSTS["timm-average"]()
    model = torch.nn.Sequential(torch.nn.Identity(), host, torch.nn.Linear(10, 3))
    x = images("timm-average")
    plain, before = call(model, x), anatomy(model)
    assert transom.apply(model, MERGES, r=4) is model
    assert not same(call(model, x), plain)
    assert transom.fittings(model) == transom.fittings(host)
    transom.remove(model)
    assert anatomy(model) == before


def test_training_mode_survives() -> None:
    model = HOSTS["timm-class"]().train()
    model.get_submodule("blocks.1").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    transom.apply(model, MERGES)
    assert {name: module.training for name, module in model.named_modules()} == modes
    transom.remove(model)
    assert {name: module.training for name, module in model.named_modules()} == modes


def test_check_draws_no_random_number_of_the_user() -> None:
    model = HOSTS["timm-class"]()
    state = torch.get_rng_state()
    transom.apply(model, MERGES)
    assert torch.equal(torch.get_rng_state(), state)
