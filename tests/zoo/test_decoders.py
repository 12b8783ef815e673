"""Decoders as hosts: tokens leave while a prompt is read, and generation goes on correctly."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import pytest
import torch
import transformers
from torch import Tensor, nn

import transom
from tests.common.cases import anatomy
from transom import registry
from transom.errors import FitError, HostError
from transom.hosts import Host
from transom.ops import reference
from transom.registry import Method
from transom.slots import Ask, Fill
from transom.tokens import Record, Tokens

IMAGE = 60
LANGUAGE: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 63,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 12,
    "patch_size": 4,
}


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * 0.15 + (1.0 if parameter.dim() == 1 else 0.0))
    return model.eval()


def language(name: str, **changes: Any) -> nn.Module:
    config = getattr(transformers, f"{name}Config")(**{**LANGUAGE, **changes})
    return randomised(getattr(transformers, f"{name}ForCausalLM")(config))


def llava() -> nn.Module:
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=transformers.LlamaConfig(**LANGUAGE),
        image_token_id=IMAGE,
    )
    return randomised(transformers.LlavaForConditionalGeneration(config))


def llava_onevision() -> nn.Module:
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**VISION),
        text_config=transformers.Qwen2Config(**LANGUAGE),
        image_token_id=IMAGE,
        video_token_id=59,
        image_grid_pinpoints=[[12, 12]],
    )
    return randomised(transformers.LlavaOnevisionForConditionalGeneration(config))


def qwen_vl(version: str) -> nn.Module:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision: dict[str, Any] = {"depth": 2, "num_heads": 2, "patch_size": 4}
    if version == "2":
        vision |= {"embed_dim": 16, "hidden_size": 32}
    else:
        vision |= {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24}
        vision |= {"fullatt_block_indexes": [1], "window_size": 16}
    name = f"Qwen{version}VL" if version == "2" else "Qwen2_5_VL"
    config = getattr(transformers, f"{name}Config")(
        text_config={**LANGUAGE, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=59,
        vision_start_token_id=58,
        vision_end_token_id=57,
    )
    return randomised(getattr(transformers, f"{name}ForConditionalGeneration")(config))


TEXT = {
    "llama": partial(language, "Llama"),
    "qwen2": partial(language, "Qwen2"),
    "qwen3": partial(language, "Qwen3", head_dim=8),
    "mistral": partial(language, "Mistral", sliding_window=None),
}
SEEING = {
    "llava": llava,
    "llava-onevision": llava_onevision,
    "qwen2-vl": partial(qwen_vl, "2"),
    "qwen2.5-vl": partial(qwen_vl, "2.5"),
}
VISUAL = 9


def words(batch: int = 2, length: int = 14, seed: int = 0) -> dict[str, Tensor]:
    """Token ids and mask; the second text is padded on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :3] = 0
        ids[1, :3] = 1
    return {"input_ids": ids, "attention_mask": mask}


def seeing(name: str) -> dict[str, Tensor]:
    """A prompt with one picture a text."""
    given = words(length=20)
    if name.startswith("qwen"):
        ids = given["input_ids"]
        ids[:, 4], ids[:, 5:9], ids[:, 9] = 58, IMAGE, 57
        pixels = torch.randn(2 * 16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
        kinds = (ids == IMAGE).int()
        grid = torch.tensor([[1, 4, 4]] * 2)
        given = {**given, "pixel_values": pixels, "image_grid_thw": grid}
        # transformers 5.0 sees by the ids which tokens are images
        forward = inspect.signature(transformers.Qwen2VLForConditionalGeneration.forward)
        asked = "mm_token_type_ids" in forward.parameters
        return {**given, "mm_token_type_ids": kinds} if asked else given
    pixels = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    if name == "llava-onevision":
        # one patch of the picture as a whole, one of its only tile, rows closed by a new line
        count = 9 + 9 + 3
        given = words(length=count + 11)
        pixels = pixels[:, None].expand(-1, 2, -1, -1, -1)
        given["image_sizes"] = torch.tensor([[12, 12]] * 2)
    else:
        count = VISUAL
    given["input_ids"][:, 5 : 5 + count] = IMAGE
    return {**given, "pixel_values": pixels}


def inputs(name: str) -> dict[str, Tensor]:
    return seeing(name) if name in SEEING else words()


HOSTS = {**TEXT, **SEEING}


@dataclass(frozen=True)
class Leave:
    """Token step: tokens 5 to 5 + count leave, or only those that are visual."""

    count: int

    def __call__(self, tokens: Tokens, attended: Ask) -> Tokens:
        assert not attended.decoding
        places = torch.arange(tokens.count)
        keep = places[(places < 5) | (places >= 5 + self.count)]
        return tokens.keep(keep.expand(len(tokens.x), -1))


@dataclass(frozen=True)
class LeaveMethod(Method):
    """Drops `count` tokens at one block, between attention and ffn or behind it.

    Attributes:
        count: tokens that leave.
        block: where.
        after: whether behind the ffn.
    """

    count: int = 4
    block: int = 1
    after: bool = False
    slug: ClassVar[str] = "leave"
    takes = "decoder"

    def fit(self, host: Host) -> list[Fill]:
        step = Leave(self.count) if self.count else None
        fill = Fill(after=step, drops=True) if self.after else Fill(tokens=step, drops=True)
        return [fill if i == self.block else Fill() for i in range(host.depth)]


@dataclass(frozen=True)
class Written:
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
        ask: Ask,
    ) -> Tensor:
        return reference.attention(q, k, v, bias, scale)


@dataclass(frozen=True)
class WriteOut(Method):
    """The attention as its reference, in every block."""

    slug: ClassVar[str] = "written"
    takes = "decoder"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(attention=Written())] * host.depth


def own(found: dict[tuple[str, str], Any]) -> dict[tuple[str, str], Any]:
    """An anatomy without what a Qwen-VL remembers of its latest call."""
    return {key: value for key, value in found.items() if key[1] != "rope_deltas"}


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("method", [LeaveMethod(0), WriteOut()], ids=["empty", "written-out"])
@torch.no_grad()
def test_nothing_removed_is_the_plain_model(name: str, method: Method) -> None:
    model, given = HOSTS[name](), inputs(name)
    plain = model(**given).logits
    text = model.generate(**given, max_new_tokens=6, do_sample=False)
    torch.manual_seed(0)
    drawn = model.generate(**given, max_new_tokens=6, do_sample=True)
    before, keys = anatomy(model), list(model.state_dict())
    transom.apply(model, method)
    seen = given["attention_mask"].bool()
    torch.testing.assert_close(model(**given).logits[seen], plain[seen], atol=1e-5, rtol=1e-5)
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=False), text)
    torch.manual_seed(0)
    assert torch.equal(model.generate(**given, max_new_tokens=6, do_sample=True), drawn)
    transom.remove(model)
    assert own(anatomy(model)) == own(before)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**given).logits, plain)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", HOSTS)
@torch.no_grad()
def test_decoding_is_the_same_as_reading_again(name: str, after: bool) -> None:
    """With tokens gone in later layers, each step with the cache equals a whole new pass."""
    model, given = HOSTS[name](), inputs(name)
    plain = model(**given).logits[:, -1]
    transom.apply(model, LeaveMethod(block=1, after=after))
    with transom.trace(model) as trace:
        out = model(**given, use_cache=True)
    count = given["input_ids"].shape[1]
    assert trace.lengths == [count, count - 4, count - 4, count - 4]
    cache = out.past_key_values
    assert [cache.get_seq_length(i) for i in range(4)] == [count, count, count - 4, count - 4]
    assert not torch.allclose(out.logits[:, -1], plain)

    text = model.generate(**given, max_new_tokens=5, do_sample=False, output_logits=True,
                          return_dict_in_generate=True)  # fmt: skip
    for step, expected in enumerate(text.logits):
        longer = dict(given)
        longer["input_ids"] = text.sequences[:, : count + step]
        mask = given["attention_mask"]
        longer["attention_mask"] = torch.cat([mask, mask.new_ones(2, step)], 1)
        if "mm_token_type_ids" in longer:
            longer["mm_token_type_ids"] = (longer["input_ids"] == IMAGE).int()
        if name in TEXT:
            longer["position_ids"] = (longer["attention_mask"].cumsum(-1) - 1).clamp(min=0)
        got = model(**longer, use_cache=False).logits[:, -1]
        torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", TEXT)
@torch.no_grad()
def test_tokens_that_left_are_as_good_as_masked(name: str) -> None:
    """Leaving behind block 1 equals hiding the same keys from all others in blocks 2 and later."""
    model, given = HOSTS[name](), words()
    other = copy.deepcopy(model)
    transom.apply(model, LeaveMethod(block=1))
    transom.apply(other, HideMethod())
    seen = given["attention_mask"].bool()
    kept = torch.cat([torch.arange(5), torch.arange(9, 14)])
    got, expected = model(**given).logits, other(**given).logits[:, kept]
    torch.testing.assert_close(got[seen[:, kept]], expected[seen[:, kept]], atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Hidden:
    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
        ask: Ask,
    ) -> Tensor:
        assert bias is not None
        hidden = torch.zeros(k.shape[2], dtype=torch.bool)
        hidden[5:9] = True
        return reference.attention(q, k, v, bias.masked_fill(hidden, -1e30), scale)


@dataclass(frozen=True)
class HideMethod(Method):
    """Hides tokens 5 to 9 as keys in blocks 2 and later."""

    slug: ClassVar[str] = "hide"
    takes = "decoder"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(attention=Hidden() if i > 1 else None) for i in range(host.depth)]


@pytest.mark.parametrize("name", SEEING)
@torch.no_grad()
def test_visual_positions_are_told(name: str) -> None:
    model, given = HOSTS[name](), inputs(name)
    seen: list[Tensor | None] = []
    transom.apply(model, LookMethod(seen.append))
    model.generate(**given, max_new_tokens=3, do_sample=False)
    assert len(seen) == 3
    expected = given["input_ids"] == IMAGE
    for more, visual in enumerate(seen):
        assert visual is not None
        grown = torch.cat([expected, expected.new_zeros(2, more)], 1)
        assert torch.equal(visual, grown)


@dataclass(frozen=True)
class LookMethod(Method):
    """Tells what its ask says about visual keys, in the first block."""

    tell: Any = None
    slug: ClassVar[str] = "look"
    takes = "decoder"

    def fit(self, host: Host) -> list[Fill]:
        return [Fill(mixer=None, norms=(None, None), attention=self._look if i == 0 else None)
                for i in range(host.depth)]  # fmt: skip

    def _look(self, q: Tensor, k: Tensor, v: Tensor, **asked: Any) -> Tensor:
        self.tell(asked["ask"].visual)
        return reference.attention(q, k, v, asked["bias"], asked["scale"])


DECODING = sorted(slug for slug, cls in registry.methods().items() if cls.takes == "decoder")


@pytest.mark.parametrize("name", ["llama", "llava", "qwen2-vl"])
@pytest.mark.parametrize("method", DECODING)
@torch.no_grad()
def test_every_decoder_method_comes_out_again(method: str, name: str) -> None:
    model, given = HOSTS[name](), inputs(name)
    plain = model(**given).logits
    before, keys = anatomy(model), list(model.state_dict())
    torch.manual_seed(0)  # new parameters may be drawn
    transom.apply(model, method, **registry.methods()[method].grid(4, 9)[-1])
    assert any(fill.slots() for f in transom.fittings(model) for fill in f.fills)
    last = model(**given).logits[:, -1]
    assert last.isfinite().all()
    if name in SEEING:
        assert not torch.equal(last, plain[:, -1]), f"{method} fills slots and changes nothing"
    assert model.generate(**given, max_new_tokens=3, do_sample=False).shape[0] == 2
    transom.remove(model)
    assert own(anatomy(model)) == own(before)
    assert list(model.state_dict()) == keys
    assert torch.equal(model(**given).logits, plain)


def test_encoder_methods_take_the_eyes_and_decoder_methods_the_tongue() -> None:
    model, given = llava(), seeing("llava")
    with torch.no_grad():
        plain = model(**given).logits  # the first call hangs hooks of transformers into the model
    before = anatomy(model)
    with torch.no_grad():
        transom.apply(model, "tome", r=2)
        transom.apply(model, LeaveMethod())
        assert [f.slug for f in transom.fittings(model)] == ["tome", "leave"]
        assert model(**given).logits.shape[1] == plain.shape[1] - 4
    transom.remove(model, "tome")
    assert [f.slug for f in transom.fittings(model)] == ["leave"]
    transom.remove(model)
    assert anatomy(model) == before


def test_a_method_for_encoders_says_so_on_a_decoder() -> None:
    model = language("Llama")
    with pytest.raises(HostError):
        transom.apply(model, "tome")
    with pytest.raises(HostError, match="holds no decoder"):
        transom.apply(nn.Linear(2, 2), LeaveMethod())
    with pytest.raises(FitError):
        transom.remove(model)


@torch.no_grad()
def test_a_static_cache_is_refused_once_tokens_left() -> None:
    model = language("Llama")
    transom.apply(model, LeaveMethod())
    with pytest.raises(transom.errors.TokensError, match="default cache"):
        model.generate(**words(1), max_new_tokens=3, do_sample=False, cache_implementation="static")
