"""Vision encoders of Hugging Face transformers, found by structure.

One adapter for ViT, DeiT, DINOv2 (with and without registers), CLIP vision and SigLIP vision.
Attention is reached through the library's attention interface: each fitted attention module gets
its own copy of the configuration that names transom's function, so the model's configuration and
every other layer stay as they are. Tested with transformers 5.23.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.hosts.base import Change, Host, Reads, example_pixels, parts, put
from transom.slots import Ask, FittedStack

# Names a part of the block may have, by role.
ROLES = {
    "norm1": ("layernorm_before", "norm1", "layer_norm1"),
    "attention": ("attention", "self_attn"),
    "norm2": ("layernorm_after", "norm2", "layer_norm2"),
    "ffn": ("mlp",),
}
BRANCH = ("layer_scale1", "layer_scale2", "drop_path", "dropout")
# Parameters of the embeddings that do not change the sequence, and those that lead it.
EMBEDDING = ("position_embeddings", "position_embedding", "mask_token")
PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")

# Models whose output is made of the class (and distillation) token alone; all others may show
# or average the other tokens.
CLASS_TOKEN_ONLY = (
    "ViTForImageClassification",
    "DeiTForImageClassification",
    "DeiTForImageClassificationWithTeacher",
)


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | Ask | None,
    *,
    base: Callable[..., Any],
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the attention interface calls for a fitted layer."""
    if not isinstance(attention_mask, Ask):
        return base(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    ask = attention_mask
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = ask.attend(query, key, value, dropout=dropout, scale=scale)
    return out.transpose(1, 2).contiguous(), None


def sdpa(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Registered with the attention interface for hosts that run SDPA."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return _attention(module, *args, base=ALL_ATTENTION_FUNCTIONS["sdpa"], **kwargs)


def eager(module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
    """Registered with the attention interface for hosts that run their eager attention."""
    base = sys.modules[type(module).__module__].__dict__["eager_attention_forward"]
    return _attention(module, *args, base=base, **kwargs)


FUNCTIONS = {"sdpa": sdpa, "eager": eager}


class HfBlock:
    """View of a pre-norm transformers layer."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        children = dict(module.named_children())
        self.names = {role: _role(children, role, name, module) for role in ROLES}
        self.before = tuple(n for n in ("dropout", "layer_scale1", "drop_path") if n in children)
        self.after = tuple(n for n in ("dropout", "layer_scale2", "drop_path") if n in children)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _register()  # a fitted model may be unpickled where nothing was fitted yet

    def _part(self, role: str) -> nn.Module:
        return getattr(self.module, self.names[role])

    @property
    def attention(self) -> nn.Module:
        """The host's attention module."""
        return self._part("attention")

    def norm1(self, x: Tensor) -> Tensor:
        return self._part("norm1")(x)

    def attend(
        self, h: Tensor, ask: Ask, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        # some layers swallow keyword arguments; the mask is what all of them hand on untouched
        carried = attention_mask if ask.plain else ask
        return self.attention(h, attention_mask=carried, **kwargs)[0]

    def residual1(self, y: Tensor) -> Tensor:
        for name in self.before:
            y = getattr(self.module, name)(y)
        return y

    def norm2(self, x: Tensor) -> Tensor:
        return self._part("norm2")(x)

    def ffn(self, h: Tensor) -> Tensor:
        return self._part("ffn")(h)

    def residual2(self, y: Tensor) -> Tensor:
        for name in self.after:
            y = getattr(self.module, name)(y)
        return y

    def valid(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        if attention_mask is None:
            return None
        same = attention_mask == attention_mask[:, :, :1]
        if not torch.compiler.is_compiling() and not same.all():
            raise TokensError(
                "the attention mask of this call differs between queries; a fitted method can "
                "only carry a padding mask along, which is the same for all of them"
            )
        row = attention_mask[:, 0, 0]
        return row if row.dtype == torch.bool else row >= 0

    def checkpoint(self) -> Callable[..., Any] | None:
        module: Any = self.module
        if module.training and getattr(module, "gradient_checkpointing", False):
            return module._gradient_checkpointing_func
        return None


def _role(children: dict[str, nn.Module], role: str, name: str, module: nn.Module) -> str:
    found = [n for n in ROLES[role] if n in children]
    if len(found) != 1:
        raise HostError(
            f"{name} ({type(module).__name__}) has {len(found)} parts that could be its {role}; "
            f"expected exactly one of {list(ROLES[role])} among {sorted(children)}"
        )
    return found[0]


def find(model: nn.Module) -> Iterator[Host]:
    """Every vision encoder of transformers in `model`.

    Args:
        model: any module.

    Yields:
        A host for each module that owns patch embeddings and a stack of layers.

    Raises:
        HostError: such an encoder holds a part that is not known.
    """
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        embeddings = getattr(module, "embeddings", None)
        if not isinstance(module, PreTrainedModel) or not isinstance(embeddings, nn.Module):
            continue
        children = dict(embeddings.named_children())
        if "patch_embeddings" in children or "patch_embedding" in children:
            yield _host(module, name, model)


def _stack(root: nn.Module) -> tuple[str, nn.Module]:
    stacks = [
        (name, module)
        for name, module in root.named_modules()
        if isinstance(module, nn.ModuleList | FittedStack)
        and len(module._modules)
        and all(
            any(n in dict(layer.named_children()) for n in ROLES["attention"])
            for layer in module._modules.values()
            if layer is not None
        )
    ]
    if len(stacks) != 1:
        raise HostError(
            f"{type(root).__name__} has {len(stacks)} stacks of layers with attention "
            f"({[name for name, _ in stacks]}); expected exactly one nn.ModuleList"
        )
    return stacks[0]


def _prefix(embeddings: nn.Module) -> tuple[int, bool]:
    """Number of prefix tokens, and whether the first is a class token."""
    count, class_token = 0, False
    for name, parameter in embeddings.named_parameters(recurse=False):
        if name in PREFIX:
            count += parameter.shape[1] if parameter.dim() == 3 else 1
            class_token |= name in ("cls_token", "class_embedding")
        elif name not in EMBEDDING:
            raise HostError(
                f"{type(embeddings).__name__} has a parameter {name!r} that transom does not know; "
                f"it may add tokens. Known are {[*EMBEDDING, *PREFIX]}"
            )
    return count, class_token


def _host(root: Any, name: str, model: nn.Module) -> Host:
    from transformers.backbone_utils import BackboneMixin

    stack_name, stack = _stack(root)
    views: list[HfBlock] = []
    for i, layer in enumerate(stack._modules.values()):
        assert layer is not None
        place = f"{stack_name}.{i}"
        view = HfBlock(layer, place)
        parts(layer, (*view.names.values(), *BRANCH), place)
        _check_attention(view.attention, f"{place}.{view.names['attention']}")
        views.append(view)
    prefix, class_token = _prefix(root.embeddings)
    config = root.config
    size, patch = _pair(config.image_size), _pair(config.patch_size)
    reads: Reads = "class token" if type(model).__name__ in CLASS_TOKEN_ONLY else "tokens"
    if isinstance(root, BackboneMixin):
        reads = "maps"

    return Host(
        family=f"transformers {config.model_type}",
        root=root,
        name=name,
        stack=stack,
        stack_name=stack_name,
        views=list(views),
        width=config.hidden_size,
        prefix=prefix,
        class_token=class_token,
        grid=(size[0] // patch[0], size[1] // patch[1]),
        reads=reads,
        architecture=config.model_type,
        example=partial(example_pixels, root, config.num_channels, size),
        install=partial(_install, views),
    )


def _install(views: list[HfBlock]) -> Iterator[Change]:
    _register()
    for view in views:
        attention: Any = view.attention
        own = copy.copy(attention.config)
        own._attn_implementation_internal = f"transom_{_implementation(attention)}"
        yield put(attention, "config", own)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (int(value[0]), int(value[1]))


def _implementation(attention: Any) -> str:
    return attention.config._attn_implementation or "eager"


def _check_attention(attention: Any, name: str) -> None:
    wanted = ("q_proj", "k_proj", "v_proj", "config")
    if not all(hasattr(attention, part) for part in wanted):
        raise HostError(
            f"{name} is a {type(attention).__name__}; expected an attention of transformers 5 "
            f"with {list(wanted)} that goes through the attention interface"
        )
    parts(attention, ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"), name)
    implementation = _implementation(attention).removeprefix("transom_")
    if implementation not in FUNCTIONS:
        raise HostError(
            f"{name} runs the attention implementation {implementation!r}; transom fits "
            f"{sorted(FUNCTIONS)}. Call model.set_attn_implementation('sdpa') first"
        )


def _register() -> None:
    """Make transom's functions known to the attention interface (again, if somebody removed them)."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    for name, function in FUNCTIONS.items():
        ALL_ATTENTION_FUNCTIONS.register(f"transom_{name}", function)
