"""Calls and files that cannot work are refused with words that help, and break nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import transom
from tests.common.cases import DROPS, MERGES, METHODS, fitted, unchanged
from tests.common.hosts import HOSTS, call, images, timm_vit
from transom.errors import CheckpointError, FitError, TokensError

X = images("timm-class")


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
