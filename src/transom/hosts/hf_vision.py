"""Vision (and audio) encoders of Hugging Face transformers, found by structure.

An encoder is a module with embeddings that hold patch embeddings, and one stack of pre-norm
layers. Names of parts are known by role; a part, parameter or attention with another structure is
refused by name. See :mod:`transom.hosts.hf_attention` for the attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import ExportError, HostError, TokensError
from transom.hosts.base import Change, Host, Modality, Reads, example_pixels, parts, put
from transom.hosts.hf_attention import RELATIVE, register
from transom.hosts.hf_block import HfBlock
from transom.hosts.hf_common import ATTENTION, arguments, encoders, first, role, stack, unpadded
from transom.ops import attention
from transom.slots import Ask, Part

# Names a part of the block may have, by role.
NORM1 = ("layernorm_before", "norm1", "layer_norm1", "attention_norm", "rms_norm1")
NORM2 = ("layernorm_after", "norm2", "layer_norm2", "ffn_norm", "rms_norm2")
FFN = ("mlp", "feed_forward", "ffn")
SPLIT = ("intermediate", "output")
# What a block does to a branch before it is added, in this order.
BRANCH1 = ("dropout", "layer_scale1", "lambda_1", "drop_path")
BRANCH2 = ("dropout", "layer_scale2", "lambda_2", "drop_path")
# Embeddings: parts, parameters that do not change the sequence, those that lead it, those behind.
PATCHES = ("patch_embeddings", "patch_embedding", "patch_embed")
EMBEDDINGS = (
    *PATCHES,
    "position_embedding",
    "position_embeddings",
    "dropout",
    "rms_norm",
    "norm",
    "layernorm",
    "interpolation",
)
EMBEDDING = ("position_embeddings", "position_embedding", "mask_token")
PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
SUFFIX = ("detection_tokens",)
# Parameters of the encoder itself that add no token.
ROOT = ("class_pos_emb",)

# Models whose output is made of the prefix tokens alone, and those that average the others.
# All other models may show tokens one by one.
CLASS_TOKEN_ONLY = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
    "ViTMSNForImageClassification",
    "VivitForVideoClassification",
    "ASTForAudioClassification",
)
AVERAGE = (
    "IJepaForImageClassification",
    "SiglipForImageClassification",
    "VideoMAEForVideoClassification",
)
# Parts of models that make maps of the features between the blocks.
DENSE = ("neck", "decode_head", "fpn1", "auxiliary_head")


class PreNormBlock(HfBlock):
    """View of a pre-norm layer with one ffn module."""

    native = True

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name)
        children = dict(module.named_children())
        self.norm1_name = role(children, NORM1, "norm1", name, module)
        self.norm2_name = role(children, NORM2, "norm2", name, module)
        self.ffn_names: tuple[str, ...] = SPLIT
        self.adds = False  # whether the ffn's second half adds the stream
        if all(part in children for part in SPLIT):
            self.adds = bool(arguments(children["output"])[0])
        else:
            self.ffn_names = (role(children, FFN, "ffn", name, module),)
        own = [n for n, _ in module.named_parameters(recurse=False)]
        unknown = set(own) - {*BRANCH1, *BRANCH2}
        if unknown:
            raise HostError(
                f"{name} ({type(module).__name__}) has a parameter {sorted(unknown)[0]!r} that "
                f"transom does not know; known are {[*BRANCH1, *BRANCH2]}"
            )
        known = (*NORM1, *NORM2, *ATTENTION, *self.ffn_names, *BRANCH1, *BRANCH2)
        parts(module, (*known, "relative_position_bias"), name)
        there = {*children, *own}
        self.before = [n for n in BRANCH1 if n in there]
        self.after = [n for n in BRANCH2 if n in there]
        if hasattr(self.reach.modules(module)[0], "projection_dropout"):
            # then the dropout of the block is that of its ffn alone
            self.before = [n for n in self.before if n != "dropout"]
        self.shared_bias = False

    def part(self, name: Part) -> nn.Module | None:
        if name == "ffn":
            return getattr(self.module, self.ffn_names[0]) if len(self.ffn_names) == 1 else None
        places = {
            "norm1": self.norm1_name,
            "norm2": self.norm2_name,
            "attention": self.reach.outer,
        }
        return getattr(self.module, places[name])

    def norm1(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.norm1_name)(x)

    def residual1(self, y: Tensor) -> Tensor:
        return self._through(self.before, y)

    def norm2(self, x: Tensor) -> Tensor:
        return getattr(self.module, self.norm2_name)(x)

    def ffn(self, h: Tensor) -> Tensor:
        for name in self.ffn_names[:1] if self.adds else self.ffn_names:
            h = first(getattr(self.module, name)(h))
        return h

    def residual2(self, y: Tensor) -> Tensor:
        return self._through(self.after, y)

    def join2(self, x: Tensor, y: Tensor) -> Tensor:
        module: Any = self.module
        return module.output(y, x) if self.adds else x + y

    def _through(self, names: list[str], y: Tensor) -> Tensor:
        for name in names:
            part = getattr(self.module, name)
            y = part(y) if isinstance(part, nn.Module) else part * y
        return y

    def bias(self, given: dict[str, Any], mask: Tensor | None) -> Tensor | None:
        shared = mask if self.shared_bias else given.get(RELATIVE[0])
        owner = self.relative_owner()
        if owner is None:
            return shared
        height, width = given["resolution"]
        size = owner.patch_size if hasattr(owner, "patch_size") else owner.config.patch_size
        window = (height // size, width // size)
        stretch = given.get("interpolate_pos_encoding", False)
        bias = owner.relative_position_bias(window, stretch, dim_size=window[0] * window[1] + 1)
        return bias if shared is None else bias + shared

    def relative_owner(self) -> Any:
        """The layer, or its attention, if it holds a table of relative positions; else None."""
        for part in (self.module, self.reach.modules(self.module)[1]):
            if getattr(part, RELATIVE[0], None) is not None:
                return part
        return None

    def mask(self, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
        if bias is None or self.shared_bias:
            return mask if bias is None else bias
        return bias if mask is None else bias + mask

    def valid(self, *args: Any, **kwargs: Any) -> Tensor | None:
        if self.shared_bias:
            return None
        return super().valid(*args, **kwargs)


class TrailingTokensBlock(PreNormBlock):
    """A layer whose sequence ends with tokens that no method may touch: they go to the front.

    Attributes:
        front, behind: numbers of leading and of trailing tokens.
    """

    native = False

    front = 0
    behind = 0

    def arrive(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        front, middle, end = x.tensor_split((self.front, x.shape[1] - self.behind), 1)
        return torch.cat([front, end, middle], 1)

    def depart(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().depart(self._back(x))

    def _back(self, x: Tensor) -> Tensor:
        front, end, middle = x.tensor_split((self.front, self.front + self.behind), 1)
        return torch.cat([front, middle, end], 1)

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        if not ask.plain:
            return super().attend(h, ask, *args, **kwargs)
        # in the host's own order, so that nothing changes where nothing is asked, not even rounding
        return self.arrive(super().attend(self._back(h), ask, *args, **kwargs))


class PackedBlock(PreNormBlock):
    """A layer that gets the images of a batch in one sequence, each closed to the others.

    Inside, they are a batch again: of the shape that they have, or padded to the largest. Images
    of different size that lost tokens stay a batch between the blocks.
    """

    native = False

    def arrive(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        images = self.given(args, kwargs).get("attention_mask")
        return images.batch(x) if isinstance(images, Images) and len(x) == 1 else x

    def depart(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        images = self.given(args, kwargs).get("attention_mask")
        return super().depart(images.sequence(x) if isinstance(images, Images) else x)

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        given = self.given(args, kwargs)
        images = given.get("attention_mask")
        if isinstance(images, Images):
            given["attention_mask"] = None
            if ask.plain and images.valid is not None:
                ask.bias = attention.key_bias(None, images.valid, h.dtype)
            tables = given["position_embeddings"]
            given["position_embeddings"] = tuple(images.batch(x[None]) for x in tables)
        return super().attend(h, ask, **given)

    def valid(self, *args: Any, **kwargs: Any) -> Tensor | None:
        images = self.given(args, kwargs).get("attention_mask")
        return images.valid if isinstance(images, Images) else super().valid(*args, **kwargs)


class Images:
    """The lengths of the images in one sequence; stands in for the mask that kept them apart."""

    def __init__(self, mask: Tensor) -> None:
        start = (mask[0, 0] == 0).int().argmax(-1)  # first place that a token sees
        self.lengths: list[int] = torch.unique_consecutive(start, return_counts=True)[1].tolist()
        most = max(self.lengths)
        self.valid: Tensor | None = None
        if min(self.lengths) < most:
            lengths = torch.tensor(self.lengths, device=mask.device)
            self.valid = torch.arange(most, device=mask.device) < lengths[:, None]

    def batch(self, x: Tensor) -> Tensor:
        """(1, total, D) -> (B, N, D)."""
        if self.valid is None or x.shape[1] != sum(self.lengths):
            return x.reshape(len(self.lengths), -1, x.shape[-1])
        return nn.utils.rnn.pad_sequence(list(x[0].split(self.lengths)), batch_first=True)

    def sequence(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (1, total, D) if nothing is missing, and where no padding is left over."""
        if self.valid is None:
            return x.reshape(1, -1, x.shape[-1])
        return x[self.valid][None] if x.shape[1] == self.valid.shape[1] else x


class PackedForward:
    """Forward of a stack's module that hands the layers the lengths instead of a mask."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(
        self, inputs_embeds: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        if attention_mask is None:
            raise TokensError(
                "a fitted method needs the mask that keeps the images of a sequence apart; call "
                "the vision model as a whole"
            )
        if torch.compiler.is_exporting():
            raise ExportError(
                f"{type(self.module).__name__} gets the images of a batch in one sequence; which "
                "tokens belong together is read from a mask, and an exported graph cannot look "
                "into one. Remove the method before the export"
            )
        images: Any = Images(attention_mask)
        forward = type(self.module).forward
        return forward(self.module, inputs_embeds, attention_mask=images, **kwargs)


def find(model: nn.Module) -> Iterator[Host]:
    """Every vision encoder of transformers in `model`.

    Args:
        model: any module.

    Yields:
        A host for each module that owns patch embeddings and a stack of layers.

    Raises:
        HostError: such an encoder holds a part that is not known.
    """
    for name, module in encoders(model):
        if _patches(module) or _packs(module):
            yield _host(module, name, model)


def _patches(module: nn.Module) -> bool:
    embeddings = getattr(module, "embeddings", None)
    if not isinstance(embeddings, nn.Module):
        return False
    return any(name in dict(embeddings.named_children()) for name in PATCHES)


def _packs(module: nn.Module) -> bool:
    children = dict(module.named_children())
    return {"patch_conv", "patch_positional_embedding", "transformer"} <= set(children)


def _counts(embeddings: nn.Module) -> tuple[int, int, bool]:
    """Number of tokens before and behind the patches, and whether the first is a class token."""
    parts(embeddings, EMBEDDINGS, type(embeddings).__name__)
    before, behind, class_token = 0, 0, False
    for name, parameter in embeddings.named_parameters(recurse=False):
        count = parameter.shape[1] if parameter.dim() == 3 else 1
        if name in PREFIX:
            before += count
            class_token |= name in ("cls_token", "class_embedding")
        elif name in SUFFIX:
            behind += count
        elif name not in EMBEDDING:
            raise HostError(
                f"{type(embeddings).__name__} has a parameter {name!r} that transom does not know; "
                f"it may add tokens. Known are {[*EMBEDDING, *PREFIX, *SUFFIX]}"
            )
    return before, behind, class_token


def _host(root: Any, name: str, model: nn.Module) -> Host:
    stack_name, layers = stack(root)
    unknown = {n for n, _ in root.named_parameters(recurse=False)} - set(ROOT)
    if unknown:
        raise HostError(
            f"{type(root).__name__} has a parameter {sorted(unknown)[0]!r} that transom does not "
            f"know; it may add tokens. Known are {list(ROOT)}"
        )
    packed = _packs(root)
    before, behind, class_token = (0, 0, False) if packed else _counts(root.embeddings)
    kind = PackedBlock if packed else TrailingTokensBlock if behind else PreNormBlock
    views: list[PreNormBlock] = []
    for i, layer in enumerate(layers._modules.values()):
        assert layer is not None
        view = kind(layer, f"{stack_name}.{i}")
        if isinstance(view, TrailingTokensBlock):
            view.front, view.behind = before, behind
        # tables may cover the patches only, or every token
        view.bare = 0 if hasattr(root, "class_pos_emb") else before + behind
        view.shared_bias = getattr(root, "shared_position_bias", None) is not None
        views.append(view)
    config = root.config
    relative = any(hasattr(root, n) for n in ("rope_embeddings", "vision_rotary_embedding"))
    bias = any(RELATIVE[0] in v.own or v.relative_owner() is not None for v in views)
    modality, grid, example = _input(root)

    return Host(
        family=f"transformers {config.model_type}",
        root=root,
        name=name,
        stack=layers,
        stack_name=stack_name,
        views=list(views),
        width=config.hidden_size,
        prefix=before + behind,
        class_token=class_token,
        grid=grid,
        reads=_reads(root, model),
        architecture=config.model_type,
        example=example,
        install=partial(_install, root, views),
        follows=packed or relative or bias or any(v.shared_bias for v in views),
        modality=modality,
    )


def _reads(root: Any, model: nn.Module) -> Reads:
    """What is made of the tokens, as far as the classes of the model tell."""
    encoder = getattr(root, "encoder", None)
    between = getattr(encoder, "interpolation", None) is not None  # adds positions between blocks
    for module in model.modules():
        children = dict(module.named_children())
        layer = getattr(getattr(module, "config", None), "vision_feature_layer", None)
        if any(n in children for n in DENSE) or layer not in (None, -1):
            between = True
    if between or any(base.__name__ == "BackboneMixin" for base in type(root).__mro__):
        return "maps"
    kind = type(model).__name__
    if kind in CLASS_TOKEN_ONLY:
        return "class token"
    return "pooled" if kind in AVERAGE else "tokens"


def _install(root: Any, views: list[PreNormBlock]) -> Iterator[Change]:
    register()
    for view in views:
        yield from view.reach.install(view.module)
    if isinstance(views[0], PackedBlock):
        yield put(root.transformer, "forward", PackedForward(root.transformer))
    else:
        yield from unpadded(root)


def _input(root: Any) -> tuple[Modality, tuple[int, int] | None, Any]:
    """Modality, grid at the host's own size, and what makes an example."""
    config = root.config
    if getattr(root, "main_input_name", "") == "input_values":
        grid = root.embeddings.get_shape(config)
        return "audio", grid, partial(_noise, root, (1, config.max_length, config.num_mel_bins))
    if hasattr(config, "num_frames"):
        shape = (1, config.num_frames, config.num_channels, *_pair(config.image_size))
        return "video", None, partial(_noise, root, shape)
    patch = _pair(config.patch_size)
    if getattr(config, "image_size", None) is None:
        return "image", None, partial(_patched, root, patch)
    size = _pair(config.image_size)
    grid = (size[0] // patch[0], size[1] // patch[1])
    if hasattr(getattr(root, "embeddings", None), "random_masking"):
        return "image", None, partial(_masked, root, size, grid)
    channels = getattr(config, "num_channels", 3)  # BLIP's configuration does not say
    return "image", grid, partial(example_pixels, root, channels, size)


def _noise(root: nn.Module, shape: tuple[int, ...]) -> Tensor:
    like = next(root.parameters())
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    return noise.to(device=like.device, dtype=like.dtype)


def _patched(root: Any, patch: tuple[int, int]) -> Mapping[str, Tensor]:
    """Two images of different size as rows of patches, the smaller one padded."""
    side = max(2, int(root.config.num_patches**0.5))
    x = _noise(root, (2, side * side, root.config.num_channels * patch[0] * patch[1]))
    shapes = torch.tensor([[side, side], [side, side - 1]], device=x.device)
    place = torch.arange(side * side, device=x.device)
    mask = (place < shapes.prod(-1)[:, None]).long()
    name = (
        "pixel_attention_mask" if "pixel_attention_mask" in arguments(root)[0] else "attention_mask"
    )
    return {"pixel_values": x, name: mask, "spatial_shapes": shapes}


def _masked(root: Any, size: tuple[int, int], grid: tuple[int, int]) -> Mapping[str, Tensor]:
    """An image with the noise that decides which patches are masked."""
    x = example_pixels(root, root.config.num_channels, size)
    return {"pixel_values": x, "noise": _noise(root, (1, grid[0] * grid[1]))}


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))
