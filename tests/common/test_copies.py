"""A fitted model can be copied, sent to another process, shared by threads, saved and loaded."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import transom
from tests.common.cases import CORE, DROPS, MERGES, METHODS, anatomy, fitted, same, strongest
from tests.common.hosts import HOSTS, call, images

# Every method once on timm and once on transformers; every host with the two plain methods.
SOME = [(method, host) for method in METHODS for host in ("timm-class", "hf-vit")]
SOME += [(method, host) for host in HOSTS for method in (MERGES, DROPS) if host not in CORE]


@pytest.mark.parametrize(("method", "host"), SOME)
@torch.no_grad()
def test_deepcopy(method: str, host: str) -> None:
    model, x = HOSTS[host](), images(host)
    plain = call(model, x)
    expected = call(fitted(model, method), x)
    double = copy.deepcopy(model)
    assert same(call(double, x), expected)
    for parameter in model.parameters():
        parameter.zero_()
    assert same(call(double, x), expected), "the copy leans on the original"
    transom.remove(double)
    assert same(call(double, x), plain)
    assert not transom.fittings(double)
    assert transom.fittings(model)
    fitted(double, method)
    assert same(call(double, x), expected)


@pytest.mark.parametrize(("method", "host"), SOME)
@torch.no_grad()
def test_pickle(method: str, host: str) -> None:
    try:
        pickle.dumps(HOSTS[host]())
    except AttributeError as error:
        pytest.skip(f"the plain host cannot be pickled: {error}")
    model, x = fitted(HOSTS[host](), method), images(host)
    double = pickle.loads(pickle.dumps(model))  # noqa: S301 (our own bytes)
    assert same(call(double, x), call(model, x))
    transom.remove(double)
    assert same(call(double, x), call(HOSTS[host](), x))


@pytest.mark.slow
@pytest.mark.parametrize("host", ["timm-class", "hf-vit"])
@torch.no_grad()
def test_pickle_reaches_a_fresh_process(host: str, tmp_path: Path) -> None:
    """What spawned workers do: nothing of transom is imported before the model is."""
    model, x = HOSTS[host](), images(host)
    expected = call(fitted(model, MERGES), x)
    torch.save({"model": model, "x": x, "expected": expected}, tmp_path / "model.pt")
    code = (
        "import sys, torch\n"
        "seen = torch.load(sys.argv[1], weights_only=False)\n"
        "out = seen['model'](seen['x'])\n"
        "out = out if isinstance(out, torch.Tensor) else out.logits\n"
        "torch.testing.assert_close(out, seen['expected'][0])\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "model.pt")], check=True)


@pytest.mark.parametrize(("method", "host"), SOME)
@torch.no_grad()
def test_two_threads_share_a_model(method: str, host: str) -> None:
    model = fitted(HOSTS[host](), method)
    inputs = [images(host, 1, seed=1), images(host, 3, seed=2)]
    expected = [call(model, x) for x in inputs]
    wrong: list[str] = []
    start = threading.Barrier(2)

    def work(mine: int) -> None:
        with torch.no_grad():
            start.wait()
            for _ in range(5):
                if not same(call(model, inputs[mine]), expected[mine]):
                    wrong.append(f"thread {mine}")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_trace_belongs_to_its_thread() -> None:
    model = transom.apply(HOSTS["timm-class"](), MERGES, r=2)
    with transom.trace(model) as trace:
        thread = threading.Thread(target=call, args=(model, images("timm-class", 5)))
        thread.start()
        thread.join()
        assert trace.lengths == []
        call(model, images("timm-class", 2))
    assert trace.lengths == [15, 13, 11]
    assert trace.tokens[0].index is not None
    assert len(trace.tokens[0].index) == 2


@pytest.mark.parametrize(("method", "host"), SOME)
@torch.no_grad()
def test_saved_and_loaded(method: str, host: str, tmp_path: Path) -> None:
    model, x = HOSTS[host](), images(host)
    before = anatomy(model)
    expected = call(fitted(model, method, where=slice(1, None), restore="every"), x)
    path = tmp_path / "fitting.safetensors"
    transom.save(model, path)
    assert [f.name for f in tmp_path.iterdir()] == [path.name]

    transom.remove(model)
    assert transom.load(model, path) is model
    assert same(call(model, x), expected)
    assert transom.fittings(model)[0].method.settings().items() >= strongest(method).items()
    transom.remove(model)
    assert anatomy(model) == before


@torch.no_grad()
def test_a_copy_has_an_example_of_its_own() -> None:
    model: Any = transom.apply(HOSTS["timm-class"](), MERGES, r=2)
    double = copy.deepcopy(model).double()
    x: Tensor = transom.fittings(double)[0].host.example()
    assert x.dtype == torch.float64
