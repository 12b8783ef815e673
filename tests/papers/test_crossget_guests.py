"""CrossGET on a fitted host: cross tokens are guests of its blocks."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

import transom
from tests.common.cases import anatomy
from tests.common.hosts import HOSTS, call, images, tensors
from tests.papers.crossget_models import learn
from tests.zoo.hf_inputs import told_images
from tests.zoo.hf_zoo import FAMILIES, FITS
from transom import hosts
from transom.errors import FitError, SettingsError
from transom.hosts import Host
from transom.registry import Method
from transom.slots import Fill


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
