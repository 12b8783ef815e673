"""ILLaMA: two forms of the mask, the order of the tokens, rotation, start from a LLaMA."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import transom
from transom.errors import CheckpointError, FitError, SettingsError, TokensError
from transom.papers.attention.illama import ILLaMA, drop_schedule, from_llama, selected, soft_causal
from transom.papers.attention.illama.attention import rotary, rotate
from transom.papers.attention.illama.model import RmsNorm

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def plain(q: Tensor, k: Tensor, v: Tensor, rate: float, form: str, bias: Tensor | None) -> Tensor:
    """Row by row, as the formula is written."""
    logits = q @ k.mT / q.shape[-1] ** 0.5 + (0 if bias is None else bias)
    rows = []
    for i in range(q.shape[-2]):
        mask = q.new_tensor([1.0 if j <= i else rate for j in range(k.shape[-2])])
        weight = logits[..., i, :].exp()
        whole = (weight * mask if form == "before" else weight).sum(-1, keepdim=True)
        rows.append(weight * mask / whole)
    return torch.stack(rows, -2) @ v


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("form", ["after", "before"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-10), (torch.float32, 1e-5), (torch.bfloat16, 0.05)],
)
def test_both_forms_are_what_they_say(
    form: Any, rate: float, biased: bool, dtype: torch.dtype, tolerance: float
) -> None:
    q, k, v = torch.randn(3, 2, 3, 7, 4, dtype=dtype).requires_grad_()
    bias = torch.randn(2, 1, 1, 7, dtype=dtype) if biased else None
    inputs = torch.stack([q, k, v]).detach()
    one, other = inputs.clone().requires_grad_(), inputs.double().requires_grad_()
    got = soft_causal(*one, rate, form=form, bias=bias)
    expected = plain(*other, rate, form, None if bias is None else bias.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, atol=tolerance, rtol=tolerance)
    weight = torch.randn_like(expected)
    (got.double() * weight).sum().backward()
    (expected * weight).sum().backward()
    assert one.grad is not None and other.grad is not None
    torch.testing.assert_close(one.grad.double(), other.grad, atol=tolerance, rtol=tolerance)


def test_a_later_patch_reaches_earlier_ones_only_behind_the_softmax() -> None:
    q, k, v = torch.randn(3, 1, 1, 6, 4, dtype=torch.float64)
    changed = k.clone()
    changed[..., -1, :] += 1
    leak = soft_causal(q, k, v, 0.0) - soft_causal(q, changed, v, 0.0)
    assert (leak[..., :-1, :].abs().amax((0, 1, 3)) > 1e-3).all()
    strict = [soft_causal(q, each, v, 0.0, form="before") for each in (k, changed)]
    assert torch.equal(strict[0][..., :-1, :], strict[1][..., :-1, :])
    assert not torch.equal(strict[0], strict[1])


class Shapes(TorchDispatchMode):
    """Remembers the shape of everything that is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        several = out if isinstance(out, tuple) else (out,)
        self.seen |= {tuple(t.shape) for t in several if isinstance(t, Tensor)}
        return out


@pytest.mark.parametrize(("form", "square"), [("before", False), ("after", True)])
def test_only_the_released_form_makes_the_matrix(form: Any, square: bool) -> None:
    q, k, v = torch.randn(3, 1, 2, 50, 8)
    with torch.no_grad(), Shapes() as shapes:
        soft_causal(q, k, v, 0.0, form=form)
    assert any(s[-2:] == (50, 50) for s in shapes.seen) == square


def test_rotation_depends_on_the_distance_alone() -> None:
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64)
    table = rotary(12, 8, 10000.0, q)
    q, k = (rotate(t.expand(1, 1, 12, 8), table) for t in (q, k))
    logits = (q @ k.mT)[0, 0]
    for distance in range(-11, 12):
        diagonal = logits.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
    assert logits[0].std() > 1e-3


def vit() -> Any:
    model = timm.create_model("vit_tiny_patch16_224", img_size=64, num_classes=7).eval()
    return model.double()


def test_a_class_token_in_front_of_a_causal_mask_sees_nothing() -> None:
    model = vit()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    settings: dict[str, Any] = {"steps": ("mask",), "form": "before"}
    transom.apply(model, "illama", class_token="first", **settings)
    first = model(x)
    torch.testing.assert_close(first[0], first[1], rtol=0, atol=1e-12)
    transom.remove(model)
    transom.apply(model, "illama", class_token="last", **settings)
    last = model(x)
    assert (last[0] - last[1]).abs().max() > 1e-3


def test_the_rate_is_adjusted_while_it_is_fitted() -> None:
    model = vit()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    plain_logits = model(x)
    transom.apply(model, "illama", steps=("mask",), soft_mask_rate=1.0)
    torch.testing.assert_close(model(x), plain_logits)
    transom.adjust(model, soft_mask_rate=0.5)
    half = model(x)
    transom.adjust(model, soft_mask_rate=0.0)
    distances = [(y - plain_logits).abs().max() for y in (half, model(x))]
    assert 1e-6 < distances[0] < distances[1]


def test_norms_take_the_weights_of_the_host() -> None:
    model = vit()
    torch.nn.init.uniform_(model.blocks[1].norm2.weight, 0.5, 2)
    transom.apply(model, "illama", steps=("rmsnorm",))
    norm = transom.fittings(model)[0].fills[1].norms[1]
    assert isinstance(norm, RmsNorm)
    assert torch.equal(norm.weight, model.blocks[1].norm2.weight)


def test_a_host_that_turns_queries_itself_is_refused() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", img_size=56)
    with pytest.raises(FitError, match="leave 'rope' out of steps"):
        transom.apply(model, "illama", check=False)


def test_rate_of_a_backbone_is_no_part_of_its_state() -> None:
    model = ILLaMA(**SMALL, num_classes=5, soft_mask_rate=0.7).eval()
    assert not any("rate" in name for name in model.state_dict())
    x = torch.randn(1, 3, 32, 32)
    soft = model(x)
    model.soft_mask_rate = 0.0
    assert not torch.allclose(soft, model(x))


def test_only_the_strict_backbone_keeps_to_its_past() -> None:
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    changed = x.clone()
    changed[..., 24:, 24:] += 1  # the last patch
    for form, keeps in (("before", True), ("after", False)):
        torch.manual_seed(3)
        model = ILLaMA(**SMALL, form=form).double().eval()  # type: ignore[arg-type]
        a, b = model.forward_features(x), model.forward_features(changed)
        assert torch.equal(a[:, :15], b[:, :15]) == keeps
        assert not torch.allclose(a[:, 16], b[:, 16])


def test_other_image_sizes_interpolate_the_positions() -> None:
    model = ILLaMA(**SMALL, num_classes=5).eval()
    x = torch.randn(1, 3, 48, 40)
    expected = model(x)
    model.set_input_size((48, 40))
    assert model.pos_embed.shape == (1, 31, 32)
    torch.testing.assert_close(model(x), expected)
    with pytest.raises(TokensError, match="48 x 41"):
        model(torch.randn(1, 3, 48, 41))


def test_rates_of_dropout_can_follow_a_schedule() -> None:
    model = ILLaMA(**SMALL, drop_path_rate=0.4, attn_drop_rate=0.1)
    model.set_dropout(0.25)
    assert (model.pos_drop.p, model.head_drop.p) == (0.25, 0.25)
    assert {block.attn.dropout for block in model.blocks} == {0.25}
    model.set_drop_path(0.2)
    assert [block.drop_path.drop_prob for block in model.blocks] == [0.0, 0.2]
    late = drop_schedule(0.4, 3, 2, 1, "late").tolist()
    assert late == pytest.approx([0.0, 0.0, 0.4, 0.4, 0.4, 0.4])


def test_blocks_start_from_a_llama() -> None:
    from transformers import LlamaConfig, LlamaModel

    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 3}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 10}
    teacher = LlamaModel(LlamaConfig(**sizes, **heads)).state_dict()
    student = ILLaMA(**SMALL)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    started = from_llama(teacher, student.state_dict(), prefix="layers.")
    student.load_state_dict(started)
    qkv = torch.cat([teacher[f"layers.1.self_attn.{n}_proj.weight"] for n in "qkv"])
    assert torch.equal(student.blocks[1].attn.qkv.weight, qkv[::2, ::2])
    down = teacher["layers.0.mlp.down_proj.weight"]
    assert torch.equal(student.blocks[0].mlp.fc2.weight, down[::2, ::2])
    for name in ("pos_embed", "blocks.0.attn.proj.bias", "patch_embed.proj.weight"):
        assert torch.equal(started[name], before[name])
    with pytest.raises(CheckpointError, match=r"layers\.1\.input_layernorm"):
        from_llama({n: t for n, t in teacher.items() if ".1." not in n}, before, "layers.")


def test_what_is_out_of_range_is_refused() -> None:
    with pytest.raises(SettingsError, match="soft_mask_rate"):
        transom.apply(vit(), "illama", soft_mask_rate=1.5)
    with pytest.raises(SettingsError, match="each once"):
        transom.apply(vit(), "illama", steps=("mask", "mask"))
    with pytest.raises(SettingsError, match="even"):
        ILLaMA(embed_dim=33, num_heads=3)
    with pytest.raises(SettingsError, match="cutoff"):
        drop_schedule(0.1, 3, 4, 5)
    with pytest.raises(SettingsError, match="cannot be selected"):
        selected(torch.zeros(3, 4), (4, 4))
