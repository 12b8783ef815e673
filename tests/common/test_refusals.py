"""What cannot work is refused with words that help, and leaves the model as it was."""

from __future__ import annotations

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import transom
from tests.common.cases import MERGES, METHODS, anatomy, unchanged
from tests.common.hosts import HOSTS, images, timm_vit
from transom import registry
from transom.errors import (
    FitError,
    HostError,
    SettingsError,
    TransomError,
)

X = images("timm-class")
NEEDY = [method for method in METHODS if registry.methods()[method].needs_class_token]
CLASSLESS = ("timm-average", "timm-map", "hf-siglip-vision", "hf-siglip")


def refuses(model: nn.Module, error: type[TransomError], words: str, *args: Any, **kw: Any) -> None:
    """Assert that apply refuses, says why, and changes nothing."""
    before = anatomy(model)
    with pytest.raises(error, match=words):
        transom.apply(model, *(args or (MERGES,)), **kw)
    assert anatomy(model) == before
    assert transom.fittings(model) == ()


@pytest.mark.parametrize("thing", [None, "vit_base_patch16_224", torch.zeros(3), nn.Linear])
def test_not_a_module(thing: Any) -> None:
    for function in (lambda m: transom.apply(m, MERGES), transom.remove, transom.fittings):
        with pytest.raises(HostError, match=r"got a \w+; expected a torch\.nn\.Module"):
            function(thing)


def test_models_that_are_no_hosts() -> None:
    from timm.models.resnet import BasicBlock, ResNet
    from timm.models.swin_transformer import SwinTransformer

    resnet = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=3).eval()
    with unchanged(resnet):
        refuses(resnet, HostError, "ResNet is not a supported host. Supported are")
    swin = SwinTransformer(img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(1, 1))
    refuses(swin, HostError, "SwinTransformer.*windows")
    refuses(nn.Linear(3, 3), HostError, "Linear is not a supported host")


def test_two_hosts_in_one_model() -> None:
    pair = nn.ModuleDict({"left": timm_vit(), "right": timm_vit()})
    refuses(pair, HostError, r"holds 2 hosts \(left, right\).*apply\(model\.left")


def test_a_compiled_model() -> None:
    model = HOSTS["timm-class"]()
    compiled = torch.compile(model)
    with unchanged(model):
        refuses(compiled, HostError, "compile afterwards")


def test_a_compiled_block() -> None:
    model: Any = HOSTS["timm-class"]()
    model.blocks[1] = torch.compile(model.blocks[1])
    refuses(model, HostError, r"blocks\.1.*OptimizedModule")


class Attention(nn.Module):
    """Somebody's own, under a name that timm has too."""


def broken_timm(kind: str) -> nn.Module:
    """A timm host in which one part is unknown."""
    model: Any = HOSTS["timm-class"]()
    block = model.blocks[1]
    if kind == "child of a block":
        block.adapter = nn.Linear(32, 32)
    elif kind == "child of an attention":
        block.attn.lora = nn.Linear(32, 32)
    elif kind == "class of a block":
        model.blocks[1] = type("Block2", (type(block),), {})(32, 4)
    elif kind == "class of an attention":
        block.attn = Attention()
    elif kind == "parameter of a block":
        block.prompt = nn.Parameter(torch.zeros(1, 2, 32))
    elif kind == "forward of a block":
        block.forward = partial(block.forward)
    elif kind == "no blocks":
        model.blocks = nn.Sequential()
    return model


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("child of a block", r"blocks\.1.*'adapter'.*does not know"),
        ("child of an attention", r"blocks\.1\.attn.*'lora'.*does not know"),
        ("class of a block", r"blocks\.1 is a Block2"),
        ("class of an attention", r"blocks\.1\.attn is a .*Attention"),
        ("parameter of a block", r"blocks\.1.*'prompt'.*does not know"),
        ("forward of a block", "forward of its own"),
        ("no blocks", "of 0 blocks"),
    ],
)
def test_an_unknown_part_of_timm_is_named(kind: str, words: str) -> None:
    refuses(broken_timm(kind), HostError, words)


@pytest.mark.parametrize("host", ["hf-vit", "hf-dinov2", "hf-clip-vision", "hf-siglip-vision"])
def test_an_unknown_part_of_transformers_is_named(host: str) -> None:
    def layer(model: nn.Module) -> Any:
        return transom.hosts.find(model).views[1].module

    model = HOSTS[host]()
    layer(model).adapter = nn.Linear(32, 32)
    refuses(model, HostError, r"\.1.*'adapter'.*does not know")

    model = HOSTS[host]()
    attention: Any = next(m for m in layer(model).modules() if hasattr(m, "q_proj"))
    attention.lora = nn.Linear(32, 32)
    refuses(model, HostError, r"'lora'.*does not know")

    model = HOSTS[host]()
    root: Any = transom.hosts.find(model).root
    root.embeddings.prompt_tokens = nn.Parameter(torch.zeros(1, 2, 32))
    refuses(model, HostError, "parameter 'prompt_tokens' that transom does not know")

    model = HOSTS[host]()
    layer(model).norm3 = nn.LayerNorm(32)
    refuses(model, HostError, "'norm3'")


def test_an_attention_that_cannot_be_fitted() -> None:
    model: Any = HOSTS["hf-vit"]()
    model.config._attn_implementation_internal = "flex_attention"
    refuses(model, HostError, r"'flex_attention'.*set_attn_implementation\('sdpa'\)")


@torch.no_grad()
def test_a_host_that_does_not_compute_what_it_looks_like(monkeypatch: pytest.MonkeyPatch) -> None:
    """A block of a known name that does one thing more: noticed by running it."""
    from timm.models.vision_transformer import Block

    before = Block.forward
    monkeypatch.setattr(Block, "forward", lambda self, x, **kw: before(self, x, **kw) + x.sin())
    model = HOSTS["timm-class"]()
    with unchanged(model):
        refuses(model, HostError, "changes its output.*nothing was fitted.*check=False")
    transom.apply(model, MERGES, check=False)
    transom.remove(model)


def test_unknown_words_suggest_the_nearest() -> None:
    model = HOSTS["timm-class"]()
    refuses(model, SettingsError, r"no method 'tomee' \(did you mean 'tome'\?\)", "tomee")
    refuses(model, SettingsError, r"no method 'xyz'; methods are \[", "xyz")
    refuses(model, SettingsError, r"no setting 'rate'.*it has \[", "evit", rate=0.5)
    refuses(
        model,
        SettingsError,
        r"no setting 'kep_rate' \(did you mean 'keep_rate'",
        "evit",
        kep_rate=1,
    )
    refuses(model, SettingsError, "got a int as method; expected a slug", 42)
    refuses(model, SettingsError, "restore is 'sometimes'; expected 'never'", restore="sometimes")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", ["banana", float("nan"), object(), {"a": 1}, ["banana"] * 3])
def test_values_of_the_wrong_type(method: str, value: Any) -> None:
    """Whatever is given for whichever setting: our error, with the setting's name."""
    cls = registry.methods()[method]
    for field in dataclasses.fields(cls):
        if field.type in ("Any", "object"):
            continue
        with pytest.raises(SettingsError, match=rf"{field.name}.* is .*; expected"):
            cls(**{field.name: value})


@pytest.mark.parametrize(
    ("method", "settings", "words"),
    [
        ("tome", {"r": -1}, r"r is -1; expected .*>= 0"),
        ("tome", {"r": (1, 1, 1, 1)}, "lists 4 blocks, but the host has 3"),
        ("tome", {"inflect": 1.5}, "inflect is 1.5"),
        ("tome", {"kth": 0}, "kth is 0"),
        ("pitome", {"ratio": 0.3}, r"ratio is 0.3; expected .*0\.5"),
        ("pitome", {"ratio": 1.2}, "ratio is 1.2"),
        ("pitome", {"margin": "swin"}, "margin is 'swin'"),
        ("pitome", {"matching": ("pitome",) * 2}, "matching lists 2 blocks"),
        ("evit", {"keep_rate": 0.0}, "keep_rate is 0.0; expected .*above 0"),
        ("evit", {"keep_rate": 1.01}, "keep_rate is 1.01"),
        ("evit", {"layers": (3,)}, "block 3, but the host has blocks 0 to 2"),
        ("evit", {"tokens": 0}, "tokens is 0"),
        ("random", {"keep_rate": -0.1}, "keep_rate is -0.1"),
        ("random", {"counts": (17, 17)}, "counts lists 2 blocks"),
        ("random", {"counts": (17, 9, 1)}, "1 prefix token"),
        ("slice", {"counts": (0,)}, "counts is"),
        ("slice", {"counts": (17, 9, 1)}, "1 prefix token"),
    ],
)
def test_values_out_of_range(method: str, settings: dict[str, Any], words: str) -> None:
    model = HOSTS["timm-class"]()
    with unchanged(model):
        refuses(model, SettingsError, words, method, **settings)


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        (3, SettingsError, "where names block 3, but the host has blocks 0 to 2"),
        (-4, SettingsError, "where names block -4"),
        ([0, 7], SettingsError, "where names block 7"),
        (["blocks.0"], SettingsError, "where names block 'blocks.0'"),
        ("blocks.0", SettingsError, "where"),
        (1.0, SettingsError, "where"),
        ([], FitError, "leaves no block of 3"),
        (slice(5, 9), FitError, "leaves no block of 3"),
    ],
)
def test_where_out_of_range(where: Any, error: type[TransomError], words: str) -> None:
    refuses(HOSTS["timm-class"](), error, words, MERGES, where=where)


@pytest.mark.parametrize("host", CLASSLESS)
@pytest.mark.parametrize("method", NEEDY)
def test_a_class_token_that_is_not_there(method: str, host: str) -> None:
    words = f"{method} needs a class token, and this .* has none; 'tome'"
    refuses(HOSTS[host](), FitError, words, method)


def test_a_second_error_leaves_the_first_method() -> None:
    model = transom.apply(HOSTS["timm-class"](), MERGES, r=4)
    for wrong in ({"r": 2}, {"r": -1}, {"where": 9}):
        with unchanged(model), pytest.raises((FitError, SettingsError)):
            transom.apply(model, MERGES, **wrong)
    with unchanged(model), pytest.raises(SettingsError):
        transom.adjust(model, r=-1)
    with unchanged(model), pytest.raises(SettingsError, match="no setting 'ratio'"):
        transom.adjust(model, ratio=0.5)


def test_nothing_is_fitted(tmp_path: Path) -> None:
    model = HOSTS["timm-class"]()
    for function in (
        transom.remove,
        transom.adjust,
        lambda m: transom.save(m, tmp_path / "x"),
        lambda m: transom.trace(m).__enter__(),
    ):
        with unchanged(model), pytest.raises(FitError, match=r"nothing is fitted.*transom\.apply"):
            function(model)
    transom.apply(model, MERGES)
    with unchanged(model), pytest.raises(FitError, match=r"'evit' is not fitted; fitted are.*tome"):
        transom.remove(model, "evit")
    with unchanged(model), pytest.raises(FitError, match="names 0 of the fitted methods"):
        transom.adjust(model, "evit", keep_rate=0.5)
    transom.apply(HOSTS["timm-class"](), MERGES)
    assert list(tmp_path.iterdir()) == []
