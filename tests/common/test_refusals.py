"""What cannot work is refused with words that help, and leaves the model as it was."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

import transom
from tests.common.cases import DROPS, MERGES, METHODS, anatomy, fitted, same
from tests.common.hosts import HOSTS, call, images, timm_vit
from transom import registry
from transom.errors import (
    CheckpointError,
    FitError,
    HostError,
    SettingsError,
    TokensError,
    TransomError,
)

X = images("timm-class")
CLASSLESS = ("timm-average", "timm-map", "hf-siglip-vision", "hf-siglip")


@contextlib.contextmanager
def unchanged(model: nn.Module, x: torch.Tensor = X) -> Iterator[None]:
    """Assert that nothing about a model changes inside this context."""
    before, keys = anatomy(model), list(model.state_dict())
    with torch.no_grad():
        out = call(model, x)
    yield
    assert anatomy(model) == before
    assert list(model.state_dict()) == keys
    with torch.no_grad():
        assert same(call(model, x), out)


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
        block.forward = block.forward
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
@pytest.mark.parametrize("method", METHODS)
def test_a_class_token_that_is_not_there(method: str, host: str) -> None:
    if not registry.methods()[method].needs_class_token:
        pytest.skip(f"{method} does without")
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


@pytest.mark.parametrize("broken", ["input", "weights"])
@pytest.mark.parametrize("host", ["timm-class", "timm-average", "hf-dinov2"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_nan_in_checked_mode(method: str, host: str, broken: str) -> None:
    model = fitted(HOSTS[host](), method, checked=True)
    reduces = any(fill.tokens for f in transom.fittings(model) for fill in f.fills)
    x = images(host)
    call(model, x)
    bad = x.clone()
    if broken == "input":
        bad[0, 0, 0, 0] = torch.nan
    else:
        norm = transom.fittings(model)[0].host.views[0].module.norm1
        norm.bias.fill_(torch.inf)
    if reduces:
        with pytest.raises(TokensError, match=r"not finite where tokens are reduced.*NaN or inf"):
            call(model, bad)
    if broken == "input":
        call(model, x)  # and the next call is as good as ever


@pytest.mark.parametrize(
    ("host", "options"),
    [("timm-dynamic", {}), ("hf-vit", {"interpolate_pos_encoding": True}), ("hf-dinov2", {})],
)
@pytest.mark.parametrize("method", [MERGES, DROPS])
@torch.no_grad()
def test_an_image_that_is_too_small(method: str, host: str, options: dict[str, Any]) -> None:
    model = fitted(HOSTS[host](), method)
    with (
        unchanged(model, images(host)),
        pytest.raises(TokensError, match=r"gives 1 token.*at least 2.*larger image"),
    ):
        call(model, torch.zeros(1, 3, 8, 8), **options)
    transom.remove(model)
    call(model, torch.zeros(1, 3, 8, 8), **options)


@torch.no_grad()
def test_fewer_tokens_than_settings_remove() -> None:
    """r is capped at half of what is there; nothing ever empties the sequence."""
    model = transom.apply(HOSTS["timm-class"](), MERGES, r=1000)
    with transom.trace(model) as trace:
        call(model, X)
    assert trace.lengths == [9, 5, 3]
    alone = transom.apply(HOSTS["timm-average"](depth=6), MERGES, r=1000)
    with transom.trace(alone) as trace:
        call(alone, X)
    assert trace.lengths == [8, 4, 2, 1, 1, 1]
    transom.adjust(model, kth=1000)
    with pytest.raises(TokensError, match="kth is 1000, but only 16 patch tokens"):
        call(model, X)


@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@torch.no_grad()
def test_a_block_called_alone(host: str) -> None:
    model = fitted(HOSTS[host](), MERGES)
    block = transom.fittings(model)[0].host.views[1].module
    with (
        unchanged(model),
        pytest.raises(TokensError, match=r"\.1 was called alone.*call the model"),
    ):
        block(torch.zeros(1, 17, 32))
    transom.remove(model)
    block(torch.zeros(1, 17, 32))


@torch.no_grad()
def test_something_between_the_blocks_changes_the_sequence() -> None:
    model: Any = fitted(HOSTS["timm-class"](), MERGES)
    handle = model.blocks[0].register_forward_hook(lambda m, args, out: out[:, :-1])
    with pytest.raises(TokensError, match=r"block 1 got 12 tokens, but 13 left the block before"):
        call(model, X)
    handle.remove()
    call(model, X)


@torch.no_grad()
def test_an_attention_mask() -> None:
    model: Any = fitted(HOSTS["timm-class"](), MERGES)
    for mask in ({"attn_mask": torch.randn(17, 17)}, {"is_causal": True}):
        with (
            unchanged(model),
            pytest.raises(TokensError, match=r"attention mask.*remove the method"),
        ):
            model(X, **mask)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A fitting of MERGES on timm-class."""
    path = tmp_path / "good.safetensors"
    transom.save(fitted(HOSTS["timm-class"](), MERGES), path)
    return path


def test_loading_what_is_no_fitting(tmp_path: Path, saved: Path) -> None:
    model = HOSTS["timm-class"]()
    files = {
        "there is no file": tmp_path / "missing",
        "is no safetensors file": tmp_path / "weights.pt",
        "no safetensors.*file": tmp_path / "text.safetensors",
        "holds tensors but no transom fitting": tmp_path / "weights.safetensors",
    }
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    (tmp_path / "text.safetensors").write_text("method: tome\n")
    safetensors.torch.save_file({"x": X}, tmp_path / "weights.safetensors")
    for words, path in files.items():
        with unchanged(model), pytest.raises(CheckpointError, match=words) as caught:
            transom.load(model, path)
        assert path.name in str(caught.value)
    whole = saved.read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    with unchanged(model), pytest.raises(CheckpointError, match="no safetensors file"):
        transom.load(model, tmp_path / "cut.safetensors")


@pytest.mark.parametrize(
    "other", [lambda: timm_vit(depth=4), lambda: timm_vit(embed_dim=64), HOSTS["hf-vit"]]
)
def test_loading_for_another_host(other: Any, saved: Path) -> None:
    model = other()
    with unchanged(model), pytest.raises(CheckpointError, match=r"saved for a host .*this one is"):
        transom.load(model, saved)


def test_loading_onto_a_fitted_model(saved: Path) -> None:
    model = fitted(HOSTS["timm-class"](), DROPS)
    with unchanged(model), pytest.raises(FitError, match=r"fitted methods already.*remove"):
        transom.load(model, saved)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('\\"slug\\": \\"tome\\"', '\\"slug\\": \\"none\\"'),
        ('\\"slug\\": \\"tome\\"', '\\"slug\\": \\"unheard\\"'),
        ('\\"inflect\\": 0.0', '\\"inflect\\": 9.9'),
    ],
)
def test_loading_a_file_of_another_method(old: str, new: str, saved: Path) -> None:
    """Metadata that was written by hand, or by a later version."""
    with safetensors.safe_open(saved, "pt") as file:
        metadata = file.metadata()
    metadata["fittings"] = metadata["fittings"].replace(
        old.replace("\\", ""), new.replace("\\", "")
    )
    safetensors.torch.save_file({}, saved, metadata)
    model = HOSTS["timm-class"]()
    with unchanged(model), pytest.raises(CheckpointError, match="does not fit"):
        transom.load(model, saved)
