"""CrossGET on the text tower of CLIP, on both towers of it, and on those of BLIP."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import transom
from tests.common.cases import anatomy
from tests.common.hosts import HOSTS, hf_clip, images, tensors
from tests.papers.crossget_models import blip, clip, learn, words
from tests.zoo.hf_inputs import questions
from transom.errors import FitError, HostError, SettingsError, TokensError
from transom.papers.tokens.crossget import aligning, fit_towers, from_transformers

END = 1  # id of the end of a text in the small CLIP


class TestTextTower:
    """CLIP's text tower: causal, read at the end of each text."""

    def test_neutral_real_and_back(self) -> None:
        model: Any = hf_clip().text_model
        ids = words(3, 12, 64, END)
        ids[1, 6:], ids[2, 3:] = END, END
        plain, before = tensors(model(ids)), anatomy(model)
        transom.apply(model, "crossget", r=0)
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(ids)), plain, strict=True))
        transom.adjust(model, r=2)
        with transom.trace(model) as trace:
            got = tensors(model(ids))
        assert trace.lengths == [10, 8, 6]
        assert [t.shape for t in got] == [t.shape for t in plain]
        assert not torch.allclose(got[1], plain[1], atol=1e-4)
        transom.remove(model)
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(ids)), plain, strict=True))
        assert anatomy(model) == before

    @pytest.mark.parametrize("cross", [False, True])
    def test_what_stands_behind_the_end_does_not_matter(self, cross: bool) -> None:
        model: Any = hf_clip().text_model
        ids = words(3, 12, 64, END)
        ids[1, 6:], ids[2, 3:] = END, END
        transom.apply(model, "crossget", r=2, cross=cross)
        learn(model)
        with torch.no_grad():
            together = model(ids).pooler_output
            for item, length in enumerate((12, 7, 4)):
                alone = model(ids[item : item + 1, :length]).pooler_output
                torch.testing.assert_close(together[item : item + 1], alone, atol=1e-5, rtol=1e-5)
            masked = model(ids, attention_mask=(torch.arange(12) < 7).long().expand(3, -1))
            torch.testing.assert_close(masked.pooler_output[1:], together[1:])

    def test_words_before_the_end_hear_no_cross_token(self) -> None:
        """As in the released code: the cross token stands last, and the mask is causal."""
        model: Any = hf_clip().text_model
        ids = words(2, 12, 64, END)
        plain = model(ids).last_hidden_state
        transom.apply(model, "crossget", r=0, cross=True)
        learn(model, 5.0)
        torch.testing.assert_close(model(ids).last_hidden_state, plain, atol=1e-5, rtol=1e-5)

    def test_the_tower_is_found_in_what_wraps_it(self) -> None:
        from transformers import CLIPTextModelWithProjection

        config = hf_clip().config.text_config
        model: Any = CLIPTextModelWithProjection(config).eval()
        ids = words(2, 12, 64, END)
        plain = model(ids).text_embeds
        transom.apply(model, "crossget", r=2, cross=True)
        assert not torch.allclose(model(ids).text_embeds, plain, atol=1e-5)
        twin = copy.deepcopy(model)
        transom.remove(model)
        assert torch.equal(model(ids).text_embeds, plain)
        assert not torch.allclose(twin(ids).text_embeds, plain, atol=1e-5)

    def test_the_end_of_first_checkpoints_is_the_largest_id(self) -> None:
        """Their configurations say 2, which is no end."""
        model: Any = hf_clip().text_model
        model.eos_token_id = 2
        ids = words(2, 12, 64, 63)
        ids[1, 5], ids[1, 6:] = 63, 0
        transom.apply(model, "crossget", r=2)
        with torch.no_grad():
            together = model(ids).pooler_output
            alone = model(ids[1:, :6]).pooler_output
        torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)

    def test_methods_that_mix_up_the_order_are_refused(self) -> None:
        model: Any = hf_clip().text_model
        for method in ("tome", "pitome", "random"):
            with pytest.raises(FitError, match="stay in order"):
                transom.apply(model, method, **transom.registry.methods()[method].grid(3, 10)[-1])
        with pytest.raises(SettingsError, match="importance='received'"):
            transom.apply(model, "crossget", r=1, importance="received")
        transom.apply(model, "none")
        with pytest.raises(TokensError, match="where each text ends"):
            model.encoder(torch.randn(1, 5, 32))


class TestTwoTowers:
    """The modality-independent form, against the towers of the room, which have golden cases."""

    @pytest.mark.parametrize(("r_image", "r_text"), [(0, 0), (3, 1), (5, 2)])
    def test_the_fitted_clip_is_the_clip_of_the_room(self, r_image: int, r_text: int) -> None:
        model = clip()
        fit_towers(model, r_image, r_text)
        learn(model, 0.3)
        mine = from_transformers(transom.remove(copy.deepcopy(model)), r_image, r_text)
        for tower, cross in (
            (model.vision_model, mine.visual.transformer.cross_image),
            (model.text_model, mine.transformer.cross_text),
        ):
            learned = [p for n, p in tower.named_parameters() if n.endswith("learned")]
            cross.data = torch.cat(learned, 1).data
        ids, pixels = words(4), torch.randn(4, 3, 32, 32)
        mine.train()
        image, text = mine(pixels, ids)
        with aligning(model) as alignment:
            out = model(input_ids=ids, pixel_values=pixels)
        near = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-4)
        near(out.image_embeds, F.normalize(image.feature))
        near(out.text_embeds, F.normalize(text.feature))
        crosses = alignment.crosses()
        assert image.cross is not None and text.cross is not None
        near(crosses[0].flatten(0, 1), image.cross)
        near(crosses[1].flatten(0, 1), text.cross)

    @pytest.mark.parametrize("build", [clip, blip])
    def test_the_loss_trains_cross_tokens_and_nothing_else(self, build: Any) -> None:
        model = fit_towers(build(), 3, 2).train()
        ids = words(4) if build is clip else questions(4)["input_ids"]
        with aligning(model) as alignment:
            model(input_ids=ids, pixel_values=images("hf-vit", 4))
        alignment.loss().backward()
        found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert found == {n for n, _ in model.named_parameters() if "crossget" in n}
        assert len(found) == 6

    def test_cross_tokens_learn_of_the_other_tower(self) -> None:
        model = fit_towers(clip(), 3, 2).train()
        own = [p for n, p in model.named_parameters() if "crossget" in n]
        optimizer = torch.optim.Adam(own, 0.05)
        given = {"input_ids": words(4), "pixel_values": images("hf-vit", 4)}
        losses = []
        for _ in range(25):
            with aligning(model) as alignment:
                model(**given)
            loss = alignment.loss()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < 0.5 * losses[0]

    def test_towers_of_unequal_depth(self) -> None:
        """Layers of the shorter tower are repeated."""
        from transformers import CLIPConfig, CLIPModel

        config: Any = clip().config.to_dict()
        config["text_config"]["num_hidden_layers"] = 2
        model = fit_towers(CLIPModel(CLIPConfig(**config)).eval(), 2, 1)
        with aligning(model) as alignment:
            model(input_ids=words(2), pixel_values=images("hf-vit"))
        image, text = alignment.crosses()
        assert image.shape == text.shape == (3, 2, 16)
        assert torch.equal(text[0], text[1]) and not torch.equal(text[1], text[2])

    def test_bad_input(self) -> None:
        with pytest.raises(HostError, match="no two towers"):
            fit_towers(HOSTS["hf-vit"]())
        model = clip()
        with pytest.raises(FitError, match="fit_towers"), aligning(model):
            pass
        with pytest.raises(SettingsError):
            fit_towers(model, 2, -1)
        assert not transom.fittings(model), "one tower was left fitted"
        fit_towers(model, 2, 1)
        with aligning(model) as alignment, pytest.raises(TokensError, match="no cross tokens"):
            alignment.loss()
        with aligning(model) as alignment:
            model(input_ids=words(2), pixel_values=images("hf-vit", 3))
            with pytest.raises(TokensError, match="as many"):
                alignment.loss()


class TestDependentTowers:
    """BLIP: the text looks at the image, and so does its cross token."""

    def test_the_image_guides_the_text(self) -> None:
        """Other images, other cross tokens of the text, other words merged."""
        model, given = fit_towers(blip(), 3, 2), questions(4)
        learn(model)
        seen = []
        for pixels in (given["pixel_values"], given["pixel_values"].flip(0)):
            with (
                torch.no_grad(),
                transom.trace(model.text_encoder) as trace,
                transom.capture(model.text_encoder, "blocks.2.guests") as guests,
            ):
                model(**{**given, "pixel_values": pixels})
            index = trace.tokens[-1].index
            assert index is not None
            seen.append((guests["blocks.2.guests"], index))
        assert not torch.allclose(seen[0][0], seen[1][0], atol=1e-3)
        assert not torch.equal(seen[0][1], seen[1][1]), "the image has no say in what is merged"

    def test_fewer_image_tokens_and_back(self) -> None:
        model, given = blip(), questions(3)
        plain, before = tensors(model(**given)), anatomy(model)
        fit_towers(model, 4, 2)
        got = tensors(model(**given))
        assert [t.shape for t in got] == [t.shape for t in plain]
        assert not torch.allclose(got[0], plain[0], atol=1e-4)
        transom.remove(model)
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(**given)), plain, strict=True))
        assert anatomy(model) == before


def things(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures of noise with a thing in one patch, which the caption names by shape and colour.

    Returns:
        Pixels (B, 3, 16, 16) in patches of 4, words (B, 6), what it is and in which patch, (B,).
    """
    generator = torch.Generator().manual_seed(seed)
    kind, place = (torch.randint(n, (count,), generator=generator) for n in (12, 16))
    item = torch.arange(count)
    shapes = torch.zeros(4, 4, 4)
    shapes[0, :2], shapes[1, :, :2], shapes[2, 1:3, 1:3], shapes[3] = 1, 1, 2, 2 * torch.eye(4)
    thing = 0.2 * torch.randn(count, 3, 4, 4, generator=generator)
    thing[item, kind % 3] += 2 * shapes[kind // 3]
    patches = 0.7 * torch.randn(count, 16, 3, 4, 4, generator=generator)  # no two are alike
    patches[item, place] = thing
    pixels = patches.unflatten(1, (4, 4)).permute(0, 3, 1, 4, 2, 5).reshape(count, 3, 16, 16)
    ids = torch.tensor([0, 0, 0, 19, 0, 0]).repeat(count, 1)
    ids[:, 1], ids[:, 2] = 2 + kind // 3, 10 + kind % 3
    return pixels, ids, kind, place


@pytest.mark.slow
def test_what_the_caption_names_survives() -> None:
    """With equally few tokens, the named patch stays by itself with crossget and not otherwise.

    How much of the token that a patch ends up in is that patch: 1 when it is alone, 0 when it is
    dropped. A third of the tokens is left.
    """
    model = clip(image_size=16, patch_size=4)
    fit_towers(model, 4).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(150):
        pixels, ids, kind, _ = things(48, step)
        with aligning(model) as alignment:
            out = model(input_ids=ids, pixel_values=pixels)
        right = (kind[:, None] == kind).float()
        right = right / right.sum(1, keepdim=True)
        similar = 20 * out.image_embeds @ out.text_embeds.mT
        contrast = (F.cross_entropy(similar, right) + F.cross_entropy(similar.mT, right)) / 2
        loss = (contrast + alignment.loss()) / 2
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    pixels, ids, kind, place = things(400, 1000)
    tower = model.eval().vision_model

    @torch.no_grad()
    def measured() -> tuple[float, float]:
        with transom.trace(tower) as trace:
            out = model(input_ids=ids, pixel_values=pixels)
        assert trace.lengths == [13, 9, 5]
        record, item = trace.tokens[-1], torch.arange(400)
        assert record.index is not None
        token = record.index[item, place + 1]
        size = torch.ones(400, 5) if record.size is None else record.size[..., 0]
        share = torch.where(token < 0, 0.0, 1 / size[item, token.clamp(min=0)])
        best = (out.image_embeds @ out.text_embeds.mT).argmax(-1)
        return float(share.mean()), float((kind[best] == kind).float().mean())

    found = {"cross": measured()}
    transom.remove(tower)
    equal: dict[str, dict[str, Any]] = {"tome": {"r": 4}, "random": {"counts": (13, 9, 5)}}
    for method, settings in equal.items():
        transom.apply(tower, method, **settings)
        found[method] = measured()
        transom.remove(tower)
    transom.apply(tower, "crossget", r=4, guided=False)
    found["not guided"] = measured()
    share = {name: x[0] for name, x in found.items()}
    assert share["cross"] > 0.75, found
    assert share["cross"] > share["not guided"] + 0.05, found
    assert max(share["tome"], share["random"]) < 0.5, found
    recall = {name: x[1] for name, x in found.items()}
    assert recall["cross"] > 0.97 > recall["random"], found  # chance is a twelfth
