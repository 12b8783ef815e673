"""Compiled and exported, a fitted model computes what it computes in eager mode."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import transom
from tests.common.cases import DROPS, MERGES, METHODS, close, fitted, same
from tests.common.hosts import HOSTS, call, images, tensors
from tests.common.test_training import gradients

pytestmark = pytest.mark.filterwarnings(
    "ignore:While compiling, we found certain side effects:UserWarning"
)


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    """Every test compiles anew, and hits no limit of recompilations."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def matrix(*also: tuple[str, str]) -> list[Any]:
    """Every method on one timm and one transformers host, two methods on every host.

    Args:
        also: what is not slow beside every method on timm.
    """
    soon = {*also, *((method, "timm-class") for method in METHODS)}
    cases = [(method, host) for method in METHODS for host in ("timm-class", "hf-vit")]
    cases += [(m, host) for host in HOSTS for m in (MERGES, DROPS) if (m, host) not in cases]
    return [
        pytest.param(m, h, marks=() if (m, h) in soon else pytest.mark.slow, id=f"{m}-{h}")
        for m, h in cases
        if h != "hf-clip"  # its text tower is not ours to compile
    ]


@pytest.mark.parametrize(("method", "host"), matrix())
@torch.no_grad()
def test_compiles_to_one_graph(method: str, host: str) -> None:
    model, x = fitted(HOSTS[host](), method), images(host)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    close(call(compiled, x), call(model, x), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_compiles_with_inductor(method: str, host: str) -> None:
    model, x = fitted(HOSTS[host](), method), images(host)
    compiled = torch.compile(model, fullgraph=True)
    close(call(compiled, x), call(model, x), 1e-4)


@pytest.mark.parametrize("host", ["timm-class", pytest.param("hf-vit", marks=pytest.mark.slow)])
@torch.no_grad()
def test_a_compiled_model_notices_what_is_fitted(host: str) -> None:
    """Applying, adjusting and removing are never silently without effect."""
    model, x = HOSTS[host](), images(host)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    seen = []

    def agree() -> None:
        got = call(compiled, x)
        close(got, call(model, x), 1e-5)
        seen.append(got)

    agree()
    transom.apply(model, MERGES, r=4)
    agree()
    transom.adjust(model, r=2)
    agree()
    transom.remove(model)
    agree()
    assert same(seen[0], seen[3])
    assert not same(seen[0], seen[1])
    assert not same(seen[1], seen[2])


@pytest.mark.slow
@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@torch.no_grad()
def test_compiled_in_place(host: str) -> None:
    """torch.nn.Module.compile leaves no wrapper around the model."""
    model, x = HOSTS[host](), images(host)
    model.compile(backend="eager")
    plain = call(model, x)
    expected = call(fitted(HOSTS[host](), MERGES), x)
    fitted(model, MERGES)
    close(call(model, x), expected, 1e-5)
    transom.remove(model)
    close(call(model, x), plain, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
def test_a_compiled_training_step(method: str, host: str) -> None:
    model: Any = fitted(HOSTS[host]().train(), method)
    x = images(host)
    before = copy.deepcopy(model.state_dict())
    expected = gradients(model, x)
    model.load_state_dict(before)  # norms with statistics have moved on
    model.compile(fullgraph=True, backend="aot_eager")
    got = gradients(model, x)
    assert got.keys() == expected.keys()
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-4)


BATCH = {0: torch.export.Dim("batch", min=1, max=16)}


@pytest.mark.parametrize("strict", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("method", "host"), matrix((MERGES, "hf-vit"), (DROPS, "hf-vit")))
@torch.no_grad()
def test_exports_for_any_batch(method: str, host: str, strict: bool) -> None:
    model = fitted(HOSTS[host](), method)
    program = torch.export.export(
        model, (images(host),), dynamic_shapes=(BATCH,), strict=strict
    ).module()
    for count in (1, 5):
        x = images(host, count)
        close(tensors(program(x)), call(model, x), 1e-5)


def onnx_outputs(model: nn.Module, x: Tensor, inputs: list[Tensor], path: Path) -> list[Any]:
    """What onnxruntime makes of `inputs` with the graph exported for x and any batch."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    program = torch.onnx.export(model, (x,), dynamo=True, dynamic_shapes=(BATCH,), verbose=False)
    assert program is not None
    program.save(path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options)
    name = session.get_inputs()[0].name
    return [[torch.from_numpy(a) for a in session.run(None, {name: i.numpy()})] for i in inputs]


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize(("method", "host"), matrix())
@torch.no_grad()
def test_onnx(method: str, host: str, tmp_path: Path) -> None:
    model = fitted(HOSTS[host](), method)
    inputs = [images(host, 1), images(host, 5)]
    got = onnx_outputs(model, images(host), inputs, tmp_path / "model.onnx")
    for x, out in zip(inputs, got, strict=True):
        close(out, call(model, x), 1e-4)
