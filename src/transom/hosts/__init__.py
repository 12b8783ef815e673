"""Hosts: one adapter a family gives the engine one view of a user's model."""

from __future__ import annotations

from torch import nn

from transom.errors import HostError
from transom.hosts import (
    compact,
    hf_clip_text,
    hf_common,
    hf_decoder,
    hf_text,
    hf_vision,
    multihead,
    refused,
    timm_vit,
    timm_windows,
)
from transom.hosts.base import Change, Host, put

__all__ = ["ADAPTERS", "Change", "Host", "find", "put"]

ENCODERS = (timm_vit, timm_windows, compact, multihead, hf_vision, hf_text, hf_clip_text)
DECODERS = (hf_decoder,)
ADAPTERS = (*ENCODERS, *DECODERS)


def find(model: nn.Module, decodes: bool = False) -> Host:
    """The one host in a model.

    Args:
        model: a model of a supported family, or a module that contains exactly one.
        decodes: whether its decoder is meant, instead of an encoder.

    Returns:
        The adapter's view of it.

    Raises:
        HostError: `model` is not a module, no family is recognised, several hosts are inside, or
            the host has a part that its adapter does not know.
    """
    if not isinstance(model, nn.Module):
        raise HostError(
            f"got a {type(model).__name__}; expected a torch.nn.Module such as a timm "
            "VisionTransformer or a Hugging Face vision model"
        )
    if hasattr(model, "_orig_mod"):
        raise HostError(
            "got a compiled model; apply to the model itself and compile afterwards: "
            "torch.compile(transom.apply(model, ...))"
        )
    adapters = DECODERS if decodes else ENCODERS
    hosts = [host for adapter in adapters for host in adapter.find(model)]
    if not hosts and decodes:
        raise HostError(
            f"{type(model).__name__} holds no decoder that transom knows; expected one of "
            f"transformers with layers of the parts {list(hf_decoder.PARTS)}, such as Llama, "
            "Qwen2, Qwen3, or a vision-language model around one"
        )
    if not hosts:
        raise HostError(
            refused.reason(model)
            or hf_common.reason(model)
            or f"{type(model).__name__} is not a supported host. Supported are timm's "
            "VisionTransformer and what is built on it, Eva, Beit, Cait, NaFlexVit and relative-"
            "position ViTs, torchvision's VisionTransformer, the image towers of open_clip and "
            "CLIP, transom's compact transformers, and transformers' encoders of images, video, "
            "sound and text"
        )
    if len(hosts) > 1:
        names = [host.name or type(host.root).__name__ for host in hosts]
        raise HostError(
            f"{type(model).__name__} holds {len(hosts)} hosts ({', '.join(names)}); pass the one "
            f"you mean, e.g. transom.apply(model.{names[0]}, ...)"
        )
    return hosts[0]
