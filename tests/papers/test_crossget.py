"""CrossGET: the complete graph, the guide, cross tokens of two towers, and what only they need."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import transom
from tests.common.hosts import HOSTS, call, images
from transom.errors import HostError, SettingsError, TokensError
from transom.ops import matching, merging, padded, reference
from transom.papers.tokens.crossget import (
    CrossCLIP,
    CrossVision,
    alignment_loss,
    convert,
    from_transformers,
    towers,
)
from transom.papers.tokens.crossget.towers import reduce


def clip(**changes: Any) -> CrossCLIP:
    """Both towers, tiny; the end of a text is id 19."""
    torch.manual_seed(0)
    r = {"image": 0, "text": 0, **changes}
    visual = CrossVision(16, 4, 32, 3, 4, 16, r["image"])
    return CrossCLIP(
        visual,
        context_length=8,
        vocab=20,
        width=32,
        layers=3,
        heads=4,
        embed_dim=16,
        r=r["text"],
    )


def texts(count: int) -> Tensor:
    """Token ids (count, 8): a start, words, the end of the text, padding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 19, (count, 8), generator=generator)
    ids[:, 0], ids[:, 5], ids[:, 6:] = 1, 19, 0
    return ids


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("r", [0, 1, 5, 100])
def test_complete_matching_is_written_out(r: int, prefix: int) -> None:
    torch.manual_seed(0)
    metric, importance = torch.randn(4, 17, 6), torch.rand(4, 17) * 2 - 1
    also = torch.tensor([4, 9, 12, 15])
    reserved = matching.Reserved(prefix, 1, also)
    found = matching.complete(metric, r, importance, reserved)
    assert found.source.shape[1] == min(r, (17 - prefix - 2) // 2)
    assert torch.equal(found.keep, found.keep.sort(-1).values), "the order changed"
    for item in range(4):
        held = reserved.mask(4, 17, metric.device)[item]
        expected = reference.complete(metric[item], found.source.shape[1], importance[item], held)
        into = found.keep[item][found.into[item]]
        assert list(zip(found.source[item].tolist(), into.tolist(), strict=True)) == expected


def test_ensemble_is_written_out() -> None:
    torch.manual_seed(0)
    x, size = torch.randn(3, 14, 5), torch.randint(1, 4, (3, 14, 1)).float()
    importance = torch.randn(3, 14)
    found = matching.complete(torch.randn(3, 14, 4), 6, importance)
    shares = matching.guided_shares(found, importance)
    assert found.into.unique().numel() < found.into.numel(), "no destination is shared"
    expected = reference.ensemble(x, found, shares, size)
    torch.testing.assert_close(merging.ensemble(x, found, shares, size), expected)
    half = torch.full_like(shares, 0.5)
    torch.testing.assert_close(
        merging.ensemble(x, found, half, size), merging.merge(x, found, "mean", size)
    )


def test_pairs_that_bipartite_matching_cannot_merge() -> None:
    """Equal tokens on places of one parity: 1 and 3, 5 and 7, ...; 0 and 2, 4 and 6, ..."""
    torch.manual_seed(0)
    kinds = torch.linalg.qr(torch.randn(16, 16)).Q[:8]
    pair = torch.tensor([4 * (i // 4) // 2 + i % 2 for i in range(16)])
    metric = kinds[pair][None]
    assert all((pair == kind).nonzero()[:, 0].diff().tolist() == [2] for kind in range(8))

    def rightly(found: matching.Matching) -> int:
        into = found.keep.gather(1, found.into)
        return int((pair[found.source] == pair[into]).sum())

    assert rightly(matching.bipartite(metric, 8)) == 0
    assert rightly(matching.complete(metric, 8)) == 8


def test_tokens_like_the_guide_survive() -> None:
    torch.manual_seed(0)
    guide = F.normalize(torch.randn(64, 1, 16), dim=-1)
    metric = torch.randn(64, 24, 16)
    metric[:, :6] = guide + 0.3 * torch.randn(64, 6, 16)  # alike, and so first to be merged

    def survivors(importance: Tensor | None) -> float:
        return float((matching.complete(metric, 8, importance).keep < 6).float().sum(1).mean())

    guided = survivors(matching.guided_importance(metric, guide))
    assert guided > survivors(None) + 1


def test_mutual_partners_always_tie_and_go_by_position() -> None:
    torch.manual_seed(0)
    metric = torch.randn(1, 2, 4)
    found = matching.complete(metric, 1)
    assert found.source.tolist() == [[0]], "the first of the two looks at the second"
    for dtype in (torch.float32, torch.float64):
        wide = torch.randn(8, 26, 32, generator=torch.Generator().manual_seed(0)).to(dtype)
        graph = matching.complete_graph(wide, torch.zeros(8, 26, dtype=torch.bool))
        order = matching.complete_order(graph, None)
        if dtype == torch.float32:
            first = order
    assert torch.equal(order, first), "rounding decides"


@pytest.mark.parametrize(("prefix", "suffix"), [(0, 0), (1, 0), (3, 0), (1, 1), (0, 2)])
@pytest.mark.parametrize("r", [1, 4, 100])
def test_padded_items_are_matched_alone(r: int, prefix: int, suffix: int) -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([1, 2, 3, 7, 12, 19]) + prefix + suffix
    count = prefix + 19 + suffix
    metric, importance = torch.randn(6, count, 6), torch.rand(6, count)
    order = torch.rand(6, count)
    order[:, :prefix] = -1
    valid = order.argsort(1).argsort(1) < lengths[:, None]
    found = padded.complete(metric, valid, r, importance, prefix, suffix)
    everything = torch.cat([found.keep, found.source], 1).sort(1).values
    assert (everything == torch.arange(count)).all()
    for item in range(6):
        real = valid[item].nonzero()[:, 0]
        alone = matching.complete(
            metric[item, real][None],
            r,
            importance[item, real][None],
            matching.Reserved(prefix, suffix),
        )
        into = found.keep[item][found.into[item]]
        got = {
            (s, t)
            for s, t in zip(found.source[item].tolist(), into.tolist(), strict=True)
            if valid[item, s]
        }
        target = real[alone.keep[0]][alone.into[0]]
        assert got == set(zip(real[alone.source[0]].tolist(), target.tolist(), strict=True))


def test_padding_does_not_change_a_text() -> None:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30,
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=64,
    )
    model = BertModel(config).eval()
    transom.apply(model, "crossget", r=3)
    ids = torch.randint(1, 30, (1, 12), generator=torch.Generator().manual_seed(1))
    longer = torch.cat([ids, ids.new_zeros(1, 5)], 1)
    mask = torch.cat([torch.ones(1, 12), torch.zeros(1, 5)], 1).long()
    with torch.no_grad():
        alone = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        both = model(input_ids=longer, attention_mask=mask).last_hidden_state
    torch.testing.assert_close(both[:, 0], alone[:, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("host", ["timm-class", "timm-average", "hf-clip"])
def test_settings_reach_the_host(host: str) -> None:
    x = images(host)
    outputs = []
    for settings in ({}, {"ensemble": False}, {"guided": False}, {"prop_attn": False}):
        model = transom.apply(HOSTS[host](), "crossget", r=4, **settings)
        with torch.no_grad(), transom.trace(model) as trace:
            (out, *_) = call(model, x)
        assert trace.lengths[0] - trace.lengths[-1] >= 4
        outputs.append(out)
    for i, a in enumerate(outputs):
        assert all(not torch.allclose(a, b, atol=1e-5) for b in outputs[:i])


def test_a_clip_of_transformers() -> None:
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    shared = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    vision = {**shared, "image_size": 16, "patch_size": 4}
    text = {**shared, "vocab_size": 20, "max_position_embeddings": 8, "eos_token_id": 19}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = CLIPModel(config).eval()
    made, ids, pixels = from_transformers(model, 0, 0), texts(3), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        out = model(input_ids=ids, pixel_values=pixels)
        mine, seen = made.encode_text(ids).feature, made.encode_image(pixels).feature
    # behind the end of a text nothing is heard in it, so the cross token changes nothing
    torch.testing.assert_close(F.normalize(mine), out.text_embeds, atol=1e-5, rtol=1e-5)
    # patches do hear it; it begins as a second class token
    assert torch.cosine_similarity(seen, out.image_embeds).min() > 0.9
    assert made.encode_image(pixels).cross is None
    less = from_transformers(model, 3, 1)
    assert less.encode_image(pixels).size.shape == (3, 18 - 6, 1)
    assert less.encode_text(texts(3)).size.shape == (3, 9 - 2, 1)
    assert convert(made.state_dict()).keys() == made.state_dict().keys()
    with pytest.raises(HostError, match="CLIPModel"):
        from_transformers(torch.nn.Linear(2, 2))
    with pytest.raises(HostError, match=r"visual\.class_embedding"):
        convert({"visual.layer1.0.conv1.weight": torch.zeros(1)})


def test_the_order_of_a_text_and_its_end_are_kept() -> None:
    model = clip(text=2).eval()
    out = model.encode_text(texts(4))
    assert out.ids is not None
    assert (out.ids[:, 0] == 1).all()
    assert (out.ids.max(-1).values == 19).all()
    assert (out.size.sum(1) == 9).all()
    changed = texts(4)
    changed[:, 6:] = 7  # behind the end; ids below it
    assert model.encode_text(changed).feature.isfinite().all()


def test_cross_tokens_get_gradients_and_what_they_copy_does_not() -> None:
    model = clip(image=2, text=1).train()
    picture, text = model(torch.randn(4, 3, 16, 16), texts(4))
    assert picture.cross is not None and text.cross is not None
    assert picture.cross.shape == text.cross.shape == (12, 16)
    alignment_loss(picture.cross, text.cross).backward()
    found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert found == {"visual.transformer.cross_image", "transformer.cross_text"}


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """A bright patch somewhere, in one of 3 colours; the caption tells its row and colour."""
    generator = torch.Generator().manual_seed(seed)
    place = torch.randint(16, (count,), generator=generator)
    colour = torch.randint(3, (count,), generator=generator)
    pixels = 0.2 * torch.randn(count, 3, 4, 4, 4, 4, generator=generator)
    pixels[torch.arange(count), colour, place // 4, :, place % 4] += 2
    ids = torch.zeros(count, 8, dtype=torch.long)
    ids[:, 0], ids[:, 1], ids[:, 2], ids[:, 3] = 1, 2 + place // 4, 10 + colour, 19
    return pixels.flatten(4, 5).flatten(2, 3), ids, 3 * (place // 4) + colour


def test_retrieval_with_fewer_tokens() -> None:
    """With r tokens fewer a layer in training: guided merging finds more than random merging."""
    model = clip(image=4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(200):
        x, ids, same = pictures(48, step)
        loss = model.loss(x, ids, same)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()

    @torch.no_grad()
    def recall() -> float:
        x, ids, same = pictures(200, 1000)
        image, text = model(x, ids)
        best = (F.normalize(image.feature) @ F.normalize(text.feature).mT).argmax(-1)
        return float((same[best] == same).float().mean())

    guided = recall()
    assert guided > 0.9, guided  # chance is a twelfth

    def drawn(query: Tensor, key: Tensor, ids: Tensor | None, r: int, *, stable: bool) -> Any:
        fake = torch.randn(key.shape, generator=torch.Generator().manual_seed(0))
        return towers_match(query, fake, ids, r, stable=stable)

    towers_match = towers.match
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(towers, "match", drawn)
        assert recall() < guided - 0.2


def test_bad_input() -> None:
    with pytest.raises(SettingsError, match="r is"):
        transom.apply(HOSTS["timm-class"](), "crossget", r=-1)
    with pytest.raises(SettingsError, match="blocks"):
        transom.apply(HOSTS["timm-class"](), "crossget", r=(1, 1, 1, 1, 1, 1))
    with pytest.raises(SettingsError, match="heads"):
        CrossVision(16, 4, 30, 1, 4, 8)
    with pytest.raises(SettingsError, match="patch_size"):
        CrossVision(16, 5, 32, 1, 4, 8)
    model = clip().eval()
    with pytest.raises(TokensError, match="resize"):
        model.encode_image(torch.zeros(1, 3, 20, 20))
    with pytest.raises(TokensError, match="pad"):
        model.encode_text(torch.zeros(1, 5, dtype=torch.long))
    with pytest.raises(TokensError, match="train"):
        model.loss(torch.zeros(1, 3, 16, 16), texts(1))
    with pytest.raises(TokensError, match="depth"):
        alignment_loss(torch.zeros(4, 2), torch.zeros(6, 2))


def test_reduce_leaves_one_pair_at_least() -> None:
    x = torch.randn(2, 3, 8)
    out, size, _ = reduce(x, x, x, torch.ones(2, 3, 1), None, 5)
    assert torch.equal(out, x)
    assert size.shape == (2, 3, 1)
