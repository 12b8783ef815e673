"""Padded hosts are exported with their padding mask, or refused before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import close
from tests.common.hosts import tensors
from tests.zoo.hf_inputs import text
from tests.zoo.hf_zoo import FAMILIES, TEXT
from transom.errors import ExportError, TokensError
from transom.export import export

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tome": ("tome", {"r": 3}),
    "tome-many": ("tome", {"r": 100}),
    "pitome": ("pitome", {"ratio": 0.6}),
    "pitome-pairs": ("pitome", {"ratio": 0.7, "matching": "pitome"}),
    "pitome-bipartite": ("pitome", {"ratio": 0.6, "matching": "bipartite", "prop_attn": True}),
    "pitome-prune": ("pitome", {"ratio": 0.6, "prune": True}),
    "evit": ("evit", {"keep_rate": 0.6, "fuse_token": True}),
    "evit-drop": ("evit", {"keep_rate": 0.6}),
    "evit-tokens": ("evit", {"tokens": 5}),
    "random": ("random", {"keep_rate": 0.6}),
    "random-counts": ("random", {"counts": (9, 6, 4)}),
    "none": ("none", {}),
}
SOON = ("tome", "pitome", "evit", "random")


def cases(soon: tuple[str, ...]) -> list[Any]:
    """Every case on BERT, two methods on every family."""
    return [
        pytest.param(
            case,
            family,
            marks=() if family == "BERT" and case in soon else pytest.mark.slow,
            id=f"{case}-{family}",
        )
        for family in TEXT
        for case in CASES
        if family == "BERT" or case in ("tome", "random")
    ]


def fitted(case: str, family: str = "BERT") -> nn.Module:
    method, settings = CASES[case]
    return transom.apply(FAMILIES[family].build(), method, check=False, **settings)


def batches() -> list[dict[str, Tensor]]:
    """Other texts, other lengths: padded, not padded, and as short as a text can be."""
    shorter, full, least = text(3, seed=1), text(2, seed=2), text(5, seed=3)
    full["attention_mask"][:] = 1
    lengths = torch.tensor([14, 1, 2, 3, 8])
    least["attention_mask"] = (torch.arange(14) < lengths[:, None]).long()
    single = {name: value[1:2] for name, value in text(2, seed=4).items()}
    return [shorter, full, least, single]


def dynamic(inputs: dict[str, Tensor]) -> dict[str, dict[int, Any]]:
    return {name: {0: torch.export.Dim("batch", min=1, max=16)} for name in inputs}


@pytest.mark.parametrize(("case", "family"), cases(SOON))
@torch.no_grad()
def test_pt2(case: str, family: str) -> None:
    """The exported program follows whatever mask it is called with."""
    model, example = fitted(case, family), text(4)
    program = torch.export.export(
        model, (), example, dynamic_shapes=dynamic(example), strict=False
    ).module()
    for inputs in (example, *batches()):
        close(tensors(program(**inputs)), tensors(model(**inputs)), 1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.slow
@pytest.mark.parametrize(("case", "family"), cases(("tome",)))
@torch.no_grad()
def test_onnx(case: str, family: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, example = fitted(case, family), text(4)
    program = torch.onnx.export(
        model, (), kwargs=example, dynamo=True, dynamic_shapes=dynamic(example), verbose=False
    )
    assert program is not None
    program.save(tmp_path / "model.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", options)
    for inputs in (example, *batches()):
        got = session.run(None, {name: value.numpy() for name, value in inputs.items()})
        close([torch.from_numpy(a) for a in got], tensors(model(**inputs)), 1e-4)


@pytest.mark.parametrize("to", ["pt2", pytest.param("onnx", marks=pytest.mark.slow)])
def test_export_takes_arguments_by_name(to: Any, tmp_path: Path) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
    done = export(fitted("tome"), tmp_path / f"model.{to}", text(3))
    assert done.path.exists()
    assert done.difference < 1e-4
    assert done.run()[0].shape == (3, 14, 32)


@torch.no_grad()
def test_without_a_mask_nothing_is_padded() -> None:
    """A reduction that has no form for padding is exported where no mask is given."""
    model = transom.apply(FAMILIES["BERT"].build(), "tome", kth=3, where=[1])
    words = text(2)["input_ids"]
    program = torch.export.export(model, (words,), strict=False).module()
    close(tensors(program(words)), tensors(model(words)), 1e-5)


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_what_has_no_form_for_padding_is_refused(to: Any, tmp_path: Path) -> None:
    """Before anything is written."""
    model = transom.apply(FAMILIES["BERT"].build(), "tome", kth=3, where=[1], check=False)
    with pytest.raises(TokensError, match=r"no form for a padded batch.*use r instead of kth"):
        export(model, tmp_path / "new" / f"model.{to}", text(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_a_model_that_looks_into_its_input_is_refused(to: Any, tmp_path: Path) -> None:
    class Looks(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1 if x.sum() > 0 else x

    if to == "onnx":
        pytest.importorskip("onnxscript")
    with pytest.raises(
        ExportError, match=f"cannot be exported to {'ONNX' if to == 'onnx' else to}"
    ):
        export(Looks(), tmp_path / f"model.{to}", torch.ones(2))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["pt2", "onnx"])
def test_images_packed_into_one_sequence_are_refused(to: Any, tmp_path: Path) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
    model = transom.apply(FAMILIES["Pixtral"].build(), "tome", r=2, check=False)
    pixels = FAMILIES["Pixtral"].inputs(2, 0)["pixel_values"]
    # with transformers 5.0 the model as it is cannot be exported either
    with pytest.raises(ExportError, match=r"images of a batch in one sequence|cannot be exported"):
        export(model, tmp_path / "new" / f"model.{to}", pixels)
    assert not list(tmp_path.iterdir())
