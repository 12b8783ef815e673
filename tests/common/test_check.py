"""The run inside apply that holds a fitted host against its plain output is seen by nobody."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import transom
from tests.common.cases import DROPS, MERGES, anatomy, close, same, strongest
from tests.common.hosts import HOSTS, call, images
from transom import hosts
from transom.check import unobserved
from transom.errors import HostError


class Watcher:
    """Registers every kind of forward hook on every module, and counts what fires."""

    def __init__(self, model: nn.Module) -> None:
        self.fired = 0
        self.handles = []
        for module in model.modules():
            for keywords in (False, True):
                self.handles += [
                    module.register_forward_pre_hook(self.note, with_kwargs=keywords),
                    module.register_forward_hook(
                        self.note, with_kwargs=keywords, always_call=keywords
                    ),
                ]

    def note(self, *_: Any) -> None:
        self.fired += 1


@pytest.mark.parametrize("host", HOSTS)
@torch.no_grad()
def test_hooks_of_users_do_not_fire(host: str) -> None:
    model, x = HOSTS[host](), images(host)
    call(model, x)  # some hosts complete themselves in their first call
    watcher, before = Watcher(model), anatomy(model)
    transom.apply(model, DROPS, **strongest(DROPS))
    assert watcher.fired == 0
    call(model, x)
    assert watcher.fired
    transom.remove(model)
    assert anatomy(model) == before
    for handle in watcher.handles:
        handle.remove()
    watcher.fired = 0
    call(model, x)
    assert watcher.fired == 0


@pytest.mark.parametrize("passes", [0, 1, 2])
def test_hooks_are_back_after_a_refusal(passes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the three passes fails."""
    model: Any = HOSTS["timm-class"]()
    watcher, before = Watcher(model), anatomy(model)
    seen = []

    def stumble(host: Any) -> Any:
        seen.append(host)
        if len(seen) > passes:
            raise RuntimeError("stumbled")
        return torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    find = hosts.find

    def found(*args: Any) -> Any:
        host = find(*args)
        host.example = lambda: stumble(host)
        return host

    monkeypatch.setattr(hosts, "find", found)
    with pytest.raises((HostError, RuntimeError), match="stumbled"):
        transom.apply(model, MERGES)
    assert watcher.fired == 0
    assert anatomy(model) == before


@torch.no_grad()
def test_hooks_that_make_parameters_fire() -> None:
    """A pruned weight is made by a hook of torch; without it the old weight would be tested."""
    model: Any = HOSTS["timm-class"]()
    x = images("timm-class")
    prune.random_unstructured(model.blocks[0].mlp.fc1, "weight", amount=0.5)
    model.blocks[0].mlp.fc1.weight = None  # as a stale one would be
    transom.apply(model, MERGES, r=0)
    close(call(model, x), call(transom.remove(model), x), 1e-6)


@torch.no_grad()
def test_hidden_states_are_collected_after_the_first_call_was_ours() -> None:
    """transformers registers the hooks that collect them when they are first asked for."""
    model: Any = HOSTS["hf-vit"]()
    model.config.output_hidden_states = True
    x = images("hf-vit")
    watcher = Watcher(model)
    transom.apply(model, MERGES, r=0)
    assert watcher.fired == 0
    assert len(model(x).hidden_states) == 4
    transom.remove(model)
    plain: Any = HOSTS["hf-vit"]()
    plain.config.output_hidden_states = True
    assert same(call(model, x), call(plain, x))


@torch.no_grad()
def test_a_hook_registered_inside_stays() -> None:
    model, seen = nn.Linear(2, 2), []
    model.register_forward_hook(lambda *_: seen.append("before"))
    with unobserved(model):
        model.register_forward_hook(lambda *_: seen.append("inside"))
        model(torch.zeros(2))
    assert seen == ["inside"]
    model(torch.zeros(2))
    assert seen == ["inside", "before", "inside"]


def test_modes_of_single_parts_are_kept() -> None:
    """A part in training mode inside a model in evaluation mode, and the other way round."""
    for mode in (True, False):
        model: Any = HOSTS["timm-class"]().train(mode)
        model.blocks[1].train(not mode)
        modes = [module.training for module in model.modules()]
        transom.apply(model, MERGES)
        transom.remove(model)
        assert [module.training for module in model.modules()] == modes
