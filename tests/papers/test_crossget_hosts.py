"""CrossGET on fitted hosts: cross tokens as guests of the blocks, both towers of CLIP, BLIP."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import transom
from tests.common.cases import anatomy
from tests.common.hosts import HOSTS, call, hf_clip, images, tensors
from tests.zoo.hf_zoo import BLIP_TEXT, FAMILIES, FITS, joint, questions, told_images
from transom import hosts
from transom.errors import FitError, HostError, SettingsError, TokensError
from transom.hosts import Host
from transom.papers.tokens.crossget import (
    aligning,
    aligning_llava,
    fit_llava,
    fit_towers,
    from_transformers,
)
from transom.registry import Method
from transom.slots import Fill

END = 1  # id of the end of a text in the small CLIP


def clip(image_size: int = 32, patch_size: int = 8) -> Any:
    """transformers' CLIP with the ffn that CrossGET's own towers have."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(0)
    tower = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 128,
    }
    ids = {"bos_token_id": 0, "eos_token_id": 19}
    text = {**tower, **ids, "vocab_size": 20, "max_position_embeddings": 8}
    vision = {**tower, "image_size": image_size, "patch_size": patch_size}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)
    model = CLIPModel(config).eval()
    for parameter in model.parameters():  # words that differ more than at initialisation
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
    return model


def words(count: int, length: int = 8, vocab: int = 20, end: int = 19) -> Tensor:
    """Texts that end with their last token."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, vocab - 1, (count, length), generator=generator)
    ids[:, 0], ids[:, -1] = 0, end
    return ids


def blip() -> Any:
    config = {"vision_config": "BlipVisionConfig", "text_config": BLIP_TEXT}
    return joint("BlipForImageTextRetrieval", "BlipConfig", config, image_text_hidden_size=16)


def learn(model: nn.Module, scale: float = 0.5) -> None:
    """Cross tokens as if they had been trained."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if ".transom." in f".{name}":
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data = scale * noise


@dataclass(frozen=True)
class SameNorms(Method):
    """Copies of the host's own norms, in their slot."""

    slug: ClassVar[str] = "same-norms"

    def fit(self, host: Host) -> list[Fill]:
        def copied(view: Any) -> Any:
            return tuple(copy.deepcopy(view.part(name)) for name in ("norm1", "norm2"))

        return [Fill(norms=copied(view)) for view in host.views]


class TestGuests:
    """A token beside those of the host: heard by them, seen by nobody outside."""

    @pytest.mark.parametrize(
        "host",
        ["timm-class", "timm-registers", "timm-average", "timm-rich", "hf-clip", "hf-siglip"],
    )
    def test_outputs_hold_the_hosts_own_tokens(self, host: str) -> None:
        model, x = HOSTS[host](), images(host)
        plain, before = call(model, x), anatomy(model)
        transom.apply(model, "crossget", r=0, cross=True)
        learn(model)
        with torch.no_grad(), transom.trace(model) as trace:
            got = call(model, x)
        assert [t.shape for t in got] == [t.shape for t in plain]
        assert any(not torch.allclose(a, b, atol=1e-3) for a, b in zip(got, plain, strict=True))
        layout = trace.tokens[0].layout
        assert set(trace.lengths) == {layout.count}
        transom.remove(model)
        assert all(torch.equal(a, b) for a, b in zip(call(model, x), plain, strict=True))
        assert anatomy(model) == before

    def test_hidden_states_and_maps_hold_no_guest(self) -> None:
        model, x = HOSTS["hf-vit"](), images("hf-vit")
        transom.apply(model, "crossget", r=2, cross=True, restore="every")
        shown = model(x, output_hidden_states=True).hidden_states
        assert {h.shape[1] for h in shown} == {17}
        backbone: Any = HOSTS["timm-class"]()
        transom.apply(backbone, "crossget", r=2, cross=True)
        maps = backbone.forward_intermediates(images("timm-class"), intermediates_only=True)
        assert {m.shape[-2:] for m in maps} == {(4, 4)}

    @pytest.mark.parametrize("restore", ["never", "end", "every"])
    @pytest.mark.parametrize("host", ["timm-average", "hf-clip"])
    def test_tokens_leave_beside_a_guest(self, host: str, restore: Any) -> None:
        model, x = HOSTS[host](), images(host)
        transom.apply(model, "crossget", r=4, cross=True, restore=restore)
        with torch.no_grad(), transom.trace(model) as trace:
            call(model, x)
        count = trace.tokens[0].layout.count
        assert trace.lengths == [count - 4, count - 8, count - 12]
        last = trace.tokens[-1]
        assert last.size is not None and last.index is not None
        assert (last.size.sum((1, 2)) == count).all(), "the guest is counted"
        assert last.index.max() == trace.lengths[-1] - 1

    def test_some_blocks_only(self) -> None:
        """A guest rests where the method is not, and goes on behind."""
        model, x = HOSTS["timm-class"](), images("timm-class")
        transom.apply(model, "crossget", r=1, cross=True, where=[0, 2])
        with transom.capture(model, "blocks.*.guests", "blocks.*.residual.post") as seen:
            model(x)
        assert [n for n in seen if n.endswith("guests")] == ["blocks.0.guests", "blocks.2.guests"]
        assert seen["blocks.2.residual.post"].shape[1] == 15
        assert not torch.equal(seen["blocks.2.guests"], seen["blocks.0.guests"])

    def test_saved_and_loaded(self, tmp_path: Path) -> None:
        model, x = HOSTS["timm-class"](), images("timm-class")
        transom.apply(model, "crossget", r=3, cross=True)
        learn(model)
        expected = model(x)
        transom.save(model, tmp_path / "fitting.safetensors")
        fresh = HOSTS["timm-class"]()
        transom.load(fresh, tmp_path / "fitting.safetensors")
        assert torch.equal(fresh(x), expected)
        names = set(fresh.state_dict()) - set(HOSTS["timm-class"]().state_dict())
        assert names == {f"transom.crossget.{i}.learned" for i in range(3)}

    def test_batch_mates_do_not_matter(self) -> None:
        model, x = HOSTS["hf-vit"](), images("hf-vit", 3)
        transom.apply(model, "crossget", r=3, cross=True)
        learn(model)
        with torch.no_grad():
            torch.testing.assert_close(model(x).logits[1:2], model(x[1:2]).logits)

    def test_gradients_and_checkpointing(self) -> None:
        grads = []
        for checkpoints in (False, True):
            model: Any = FAMILIES["BLIP vision"].build()
            transom.apply(model, "crossget", r=3, cross=True)
            learn(model)
            if checkpoints:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            torch.manual_seed(3)
            model.train()
            model(images("hf-vit", 2)).last_hidden_state.square().mean().backward()
            grads.append({n: p.grad for n, p in model.named_parameters()})
        new = [n for n in grads[0] if "crossget" in n]
        assert len(new) == 3
        assert all(grads[0][n] is not None and grads[0][n].any() for n in new)
        for name, grad in grads[0].items():
            if grad is not None:
                torch.testing.assert_close(grads[1][name], grad)

    def test_compiled_and_exported(self) -> None:
        model, x = HOSTS["timm-class"](), images("timm-class")
        transom.apply(model, "crossget", r=3, cross=True)
        learn(model)
        with torch.no_grad():
            expected = model(x)
            program = torch.export.export(model, (x,))
            torch.testing.assert_close(program.module()(x), expected, atol=1e-5, rtol=1e-5)

    def test_composes_with_another_slot(self) -> None:
        """Norms and ffns of another method see the guest like any token."""
        model, x = HOSTS["timm-class"](), images("timm-class")
        transom.apply(model, "crossget", r=2, cross=True)
        learn(model)
        before = model(x)
        transom.apply(model, SameNorms())
        torch.testing.assert_close(model(x), before)
        torch.testing.assert_close(copy.deepcopy(model)(x), before)
        with pytest.raises(FitError, match="taken by crossget"):
            transom.apply(model, "tome", r=2)

    def test_hosts_without_room_are_refused(self) -> None:
        for host in ("timm-rotary",):
            model = HOSTS[host]()
            with pytest.raises(FitError, match="have no position"):
                transom.apply(model, "crossget", r=2, cross=True)
            assert not transom.fittings(model)
        with pytest.raises(SettingsError, match="cross=True with guided=False"):
            transom.apply(HOSTS["timm-class"](), "crossget", cross=True, guided=False)


class TestTextTower:
    """CLIP's text tower: causal, read at the end of each text."""

    def test_neutral_real_and_back(self) -> None:
        model: Any = hf_clip().text_model  # type: ignore[attr-defined]
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
        model: Any = hf_clip().text_model  # type: ignore[attr-defined]
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
        model: Any = hf_clip().text_model  # type: ignore[attr-defined]
        ids = words(2, 12, 64, END)
        plain = model(ids).last_hidden_state
        transom.apply(model, "crossget", r=0, cross=True)
        learn(model, 5.0)
        torch.testing.assert_close(model(ids).last_hidden_state, plain, atol=1e-5, rtol=1e-5)

    def test_the_tower_is_found_in_what_wraps_it(self) -> None:
        from transformers import CLIPTextModelWithProjection

        config = hf_clip().config.text_config  # type: ignore[attr-defined]
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
        model: Any = hf_clip().text_model  # type: ignore[attr-defined]
        model.eos_token_id = 2
        ids = words(2, 12, 64, 63)
        ids[1, 5], ids[1, 6:] = 63, 0
        transom.apply(model, "crossget", r=2)
        with torch.no_grad():
            together = model(ids).pooler_output
            alone = model(ids[1:, :6]).pooler_output
        torch.testing.assert_close(together[1:], alone, atol=1e-5, rtol=1e-5)

    def test_methods_that_mix_up_the_order_are_refused(self) -> None:
        model: Any = hf_clip().text_model  # type: ignore[attr-defined]
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


class TestReceived:
    """Importance for LLaVA: how much attention a token receives."""

    def test_it_is_written_out(self) -> None:
        from transom.papers.tokens.crossget.method import MergeGuided
        from transom.slots import Ask

        q, k = torch.randn(2, 4, 9, 8), torch.randn(2, 4, 9, 8)
        ask = Ask(q=q, k=k, scale=8**-0.5, guests=1)
        step = MergeGuided(2, "cross", True, received=True)
        got = step.importance(ask.key[:, :8], ask, 8, None)
        seen = (q @ k.mT * 8**-0.5).softmax(-1).mean(1)
        for item in range(2):
            for token in range(8):
                mean = sum(float(seen[item, other, token]) for other in range(8)) / 8
                want = mean + float(seen[item, 8, token])
                assert abs(float(got[item, token]) - want) < 1e-6

    @pytest.mark.parametrize("cross", [False, True])
    def test_the_vision_tower_of_llava(self, cross: bool) -> None:
        family = FAMILIES["LLaVA"]
        model, given = family.build(), family.inputs(2, 0)
        plain = tensors(model(**given))
        transom.apply(model, "crossget", r=3, importance="received", cross=cross)
        with torch.no_grad(), transom.trace(model) as trace:
            got = tensors(model(**given))
        assert trace.lengths[-1] == 17 - 9
        assert [t.shape for t in got] == [t.shape for t in plain]
        one = tensors(model(**{name: x[1:] for name, x in given.items()}))
        torch.testing.assert_close(got[0][1:], one[0], atol=1e-5, rtol=1e-5)
        transom.remove(model)
        assert torch.equal(tensors(model(**given))[0], plain[0])


class TestLanguage:
    """LLaVA: a guest in the vision tower, a replaced first token in the language model."""

    def test_generation_and_back(self) -> None:
        family = FAMILIES["LLaVA"]
        model: Any = family.build()
        given = family.inputs(2, 0)
        plain = model.generate(**given, max_new_tokens=5, min_new_tokens=5)
        logits, before = model(**given).logits, anatomy(model)  # with hooks of the library
        fit_llava(model, 3)
        got = model.generate(**given, max_new_tokens=5, min_new_tokens=5)
        assert got.shape == plain.shape
        transom.remove(model, "crossget")  # what is left replaces the first token by itself
        torch.testing.assert_close(model(**given).logits, logits, atol=1e-5, rtol=1e-5)
        learn(model)
        assert not torch.allclose(model(**given).logits, logits, atol=1e-2)
        transom.remove(model)
        assert torch.equal(model.generate(**given, max_new_tokens=5, min_new_tokens=5), plain)
        assert anatomy(model) == before

    def test_only_the_prompt_is_changed(self) -> None:
        """Word by word behind a prompt gives what one long prompt gives."""
        family = FAMILIES["LLaVA"]
        model, given = family.build(), family.inputs(1, 0)
        fit_llava(model, 3)
        learn(model)
        with torch.no_grad():
            whole = model(**given).logits[:, -1]
            head = {**given, "input_ids": given["input_ids"][:, :-1]}
            cache = model(**head, use_cache=True).past_key_values
            last = model(input_ids=given["input_ids"][:, -1:], past_key_values=cache).logits
        torch.testing.assert_close(last[:, 0], whole, atol=1e-4, rtol=1e-4)

    def test_the_loss_trains_cross_tokens_of_both_parts(self) -> None:
        family = FAMILIES["LLaVA"]
        model, given = family.build(), family.inputs(2, 0)
        fit_llava(model, 3).train()
        with aligning_llava(model) as alignment:
            model(**given)
        image, text = alignment.crosses()
        assert image.shape == text.shape == (3, 2, 32)
        alignment.loss().backward()
        found = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert found == {n for n, _ in model.named_parameters() if ".crossget" in n}
        assert len(found) == 6

    def test_bad_input(self) -> None:
        with pytest.raises(HostError, match="multi_modal_projector"):
            fit_llava(clip())
        model = FAMILIES["LLaVA"].build()
        with pytest.raises(FitError, match="fit_llava"), aligning_llava(model):
            pass
        with pytest.raises(SettingsError):
            fit_llava(model, -1)
        assert not transom.fittings(model)


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


@pytest.mark.slow
@pytest.mark.parametrize("family", FITS)
def test_cross_tokens_on_the_zoo(family: str) -> None:
    """Every family has room for guests, or says that positions enter its attention."""
    model, inputs = FAMILIES[family].build(), FAMILIES[family].inputs(3, 0)
    with torch.no_grad():
        plain = tensors(model(**inputs))
        before = anatomy(model)
        if hosts.find(model).follows:
            with pytest.raises(FitError, match="have no position"):
                transom.apply(model, "crossget", r=2, cross=True)
            assert anatomy(model) == before
            return
        transom.apply(model, "crossget", r=2, cross=True)
        learn(model)
        with transom.trace(model) as trace:
            got = tensors(model(**inputs))
        assert trace.lengths[-1] <= trace.tokens[0].layout.count - 4
        assert [t.shape for t in got] == [t.shape for t in plain]
        assert any(not torch.allclose(a, b, atol=1e-4) for a, b in zip(got, plain, strict=True))
        alone = tensors(model(**{name: value[2:] for name, value in inputs.items()}))
        pairs = zip(got, alone, strict=True) if len(got) == len(alone) else ()
        for a, b in pairs:
            if a.dim() > 1 and a[2:].shape == b.shape:
                torch.testing.assert_close(a[2:], b, atol=1e-4, rtol=1e-4)
        transom.remove(model)
        assert all(torch.equal(a, b) for a, b in zip(tensors(model(**inputs)), plain, strict=True))
    assert anatomy(model) == before


@pytest.mark.parametrize("method", [{"cross": True}, {"importance": "received"}])
def test_padding_of_a_text_does_not_matter(method: dict[str, Any]) -> None:
    model, batch = FAMILIES["BLIP text encoder"].build(), told_images(4)
    transom.apply(model, "crossget", r=3, **method)
    learn(model)
    with torch.no_grad():
        together = model(**batch).last_hidden_state
        for item, length in enumerate(batch["attention_mask"].sum(1).tolist()):
            one = {name: x[item : item + 1] for name, x in batch.items()}
            one = {n: x if "encoder" in n else x[:, :length] for n, x in one.items()}
            alone = model(**one).last_hidden_state
            torch.testing.assert_close(together[item, :length], alone[0], atol=1e-5, rtol=1e-5)
