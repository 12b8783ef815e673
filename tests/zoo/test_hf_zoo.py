"""Every family of transformers either fits exactly or is refused with a reason.

That a host is followed through a reduction (rotary and relative positions, masks, tokens behind
the patches) is checked inside `transom.apply` itself, by a run with tokens out of order.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import anatomy, close, same
from tests.common.hosts import tensors
from tests.zoo.hf_builders import DEPTH, SIZE
from tests.zoo.hf_inputs import images, text
from tests.zoo.hf_zoo import FAMILIES, FITS, REFUSED, TEXT
from transom import hosts
from transom.errors import HostError

# One that merges and counts sizes, one that drops; enough to reach every part of an adapter.
REAL = {"tome": {"r": 2}, "random": {"keep_rate": 0.6}}
TO_TEXT = {**REAL, "pitome": {"ratio": 0.7}, "evit": {"keep_rate": 0.6, "fuse_token": True}}


def run(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**inputs))


@pytest.mark.parametrize("family", FITS)
def test_fits(family: str) -> None:
    """Identity at the neutral setting, bites at a real one, and back bit for bit."""
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(2, 0)
    plain, before = run(model, inputs), anatomy(model)
    for method, settings in REAL.items():
        neutral = transom.registry.methods()[method].neutral()
        assert neutral is not None
        transom.apply(model, method, check=method == "tome", **neutral)
        close(run(model, inputs), plain, 1e-6)
        transom.adjust(model, **settings)
        with transom.trace(model) as trace:
            got = run(model, inputs)
        assert trace.lengths[-1] < trace.tokens[0].layout.count
        assert [t.shape for t in got] == [t.shape for t in plain]
        assert not same(got, plain), f"{method} reduces and changes nothing"
        transom.remove(model)
        assert same(run(model, inputs), plain)
    assert anatomy(model) == before


@pytest.mark.parametrize("family", FITS)
def test_layout(family: str) -> None:
    """Prefix, grid and number of tokens are those that really arrive."""
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(2, 0)
    transom.apply(model, "none", check=False)
    host = transom.fittings(model)[0].host
    with transom.trace(model) as trace:
        run(model, inputs)
    layout = trace.tokens[0].layout
    assert layout.prefix == host.prefix
    assert host.depth >= DEPTH
    if host.grid is not None:
        assert layout.count == host.prefix + host.grid[0] * host.grid[1]
        assert layout.grid == host.grid


@pytest.mark.parametrize("family", FITS)
def test_training_is_untouched(family: str) -> None:
    """With the same seed, dropout and stochastic depth fall as they do without a fitting."""
    model, inputs = FAMILIES[family].build().train(), FAMILIES[family].inputs(2, 0)
    torch.manual_seed(1)
    plain = run(model, inputs)
    transom.apply(model, "none", check=False)
    torch.manual_seed(1)
    close(run(model, inputs), plain, 1e-6)


@pytest.mark.parametrize("family", FITS)
def test_batch_mates_do_not_matter(family: str) -> None:
    """Of a batch of three the last comes out as it does alone, padded or not."""
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(3, 0)
    transom.apply(model, "tome", r=2, check=False)
    with torch.no_grad():
        together = model(**inputs)
        alone = model(**{name: value[2:] for name, value in inputs.items()})
    compared = 0
    for name, value in together.items():
        for a, b in zip(tensors(value), tensors(alone[name]), strict=False):
            if a.dim() and a[2:].shape == b.shape:
                torch.testing.assert_close(a[2:], b, atol=1e-5, rtol=1e-5)
                compared += 1
    assert compared or family == "Pixtral"  # whose images stand in one sequence; see below


@pytest.mark.parametrize("method", TO_TEXT)
@pytest.mark.parametrize("family", TEXT)
def test_padding_does_not_matter(family: str, method: str) -> None:
    """A text alone comes out as it does in a padded batch."""
    model, batch = FAMILIES[family].build(), text(4)
    transom.apply(model, method, check=False, **TO_TEXT[method])
    together = model(**batch)[0].detach()
    for item, length in enumerate(batch["attention_mask"].sum(1).tolist()):
        words = batch["input_ids"][item : item + 1, :length]
        with torch.no_grad():
            alone = model(input_ids=words, attention_mask=torch.ones_like(words))[0]
        part = together[item : item + 1]
        part = part[:, :length] if part.dim() == 3 else part
        torch.testing.assert_close(part, alone, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", REFUSED)
def test_refused(family: str) -> None:
    """With the reason, and the model as it was."""
    model = FAMILIES[family].build()
    before = anatomy(model)
    with pytest.raises(HostError, match=FAMILIES[family].refused):
        transom.apply(model, "tome", r=1)
    assert anatomy(model) == before
    assert not transom.fittings(model)


@pytest.mark.parametrize("family", ["DINOv3", "BEiT", "MLCD", "Pixtral", "MPNet"])
def test_positions_that_stay_behind_are_noticed(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A host whose positions do not follow is refused by the run with tokens out of order."""
    found = hosts.find

    def forgetful(model: nn.Module, decodes: bool = False) -> Any:
        host = found(model, decodes)
        host.follows = False
        return host

    monkeypatch.setattr(hosts, "find", forgetful)
    model = FAMILIES[family].build()
    before = anatomy(model)
    with pytest.raises(HostError):
        transom.apply(model, "tome", r=2)
    assert anatomy(model) == before


def test_positions_made_for_fewer_tokens_are_refused() -> None:
    """Data2Vec stretches its shared positions to the tokens that are there at the time."""
    model, inputs = FAMILIES["data2vec vision"].build(), images(2)
    stretched = {**inputs, "interpolate_pos_encoding": True}
    plain = run(model, stretched)
    transom.apply(model, "tome", r=0)
    close(run(model, stretched), plain, 1e-6)
    transom.adjust(model, r=2)
    with pytest.raises(transom.errors.TokensError, match=r"positions for 15 tokens.*all 17"):
        run(model, stretched)


def test_images_of_different_size_in_one_sequence() -> None:
    """Pixtral packs the images of a batch; each is merged by itself."""
    model = FAMILIES["Pixtral"].build()
    pixels = images(3)["pixel_values"]
    sizes = torch.tensor([[SIZE, SIZE], [SIZE, SIZE - 16], [SIZE - 8, SIZE]])
    inputs = {"pixel_values": pixels, "image_sizes": sizes}
    plain = run(model, inputs)
    transom.apply(model, "tome", r=0)
    close(run(model, inputs), plain, 1e-5)
    transom.adjust(model, r=2)
    (together,) = run(model, inputs)
    assert together.shape == plain[0].shape
    assert not same([together], plain)
    start = 0
    for item, (height, width) in enumerate(sizes.tolist()):
        (alone,) = run(model, {"pixel_values": pixels[item : item + 1, :, :height, :width]})
        stop = start + alone.shape[1]
        torch.testing.assert_close(together[:, start:stop], alone, atol=1e-5, rtol=1e-5)
        start = stop


def test_the_count_of_image_tokens_is_the_users_choice() -> None:
    """A language model gets as many image tokens as it expects, unless the user restores never."""
    model, inputs = FAMILIES["LLaVA"].build(), FAMILIES["LLaVA"].inputs(1, 0)
    model.config.vision_feature_layer = -1
    transom.apply(model, "tome", r=2, restore="never")
    with pytest.raises(Exception, match="do not match"):
        run(model, inputs)
    fewer = torch.cat([inputs["input_ids"][:, :12], inputs["input_ids"][:, -2:]], 1)
    (logits, *_) = run(model, {**inputs, "input_ids": fewer})
    assert logits.shape[1] == 14


def test_left_padding_is_refused() -> None:
    model, batch = FAMILIES["BERT"].build(), text(2)
    transom.apply(model, "tome", r=2)
    batch["attention_mask"] = batch["attention_mask"].flip(1)
    with pytest.raises(transom.errors.TokensError, match="pad on the right"):
        run(model, batch)


def test_a_text_too_short_to_lose_a_token_passes() -> None:
    model, words = FAMILIES["BERT"].build(), torch.tensor([[0, 2]])
    plain = run(model, {"input_ids": words})
    for method, settings in TO_TEXT.items():
        transom.apply(model, method, **settings)
        close(run(model, {"input_ids": words}), plain, 1e-6)
        transom.remove(model)


def test_pitome_on_text_is_the_text_variant() -> None:
    """Merging in the first three blocks only, and never with the padding."""
    model: Any = FAMILIES["BERT"].build()
    transom.apply(model, "pitome", ratio=0.5)
    steps = [fill.tokens for fill in transom.fittings(model)[0].fills]
    assert [getattr(step, "kind", None) for step in steps] == ["text"] * 3
    assert not any(fill.size_bias for fill in transom.fittings(model)[0].fills)
    batch = text(4)
    with transom.trace(model) as trace:
        run(model, batch)
    assert trace.lengths == [8, 5, 3]
    last = trace.tokens[-1]
    assert last.size is not None
    assert last.valid is not None
    assert torch.equal(last.size.sum((1, 2)).long(), batch["attention_mask"].sum(1))
    assert (last.size[~last.valid] == 0).all()


def test_one_tower_of_two_is_taken() -> None:
    """A model with an image and a text encoder is taken by its images."""
    model: Any = FAMILIES["Chinese-CLIP"].build()
    assert hosts.find(model).modality == "image"
    assert hosts.find(model.text_model).modality == "text"
