"""Small hosts with random weights, one of each form that an adapter has to understand.

Width 32, 3 or 4 blocks, patches of 8 pixels. Every parameter is drawn anew, so that a part which a
fitted block leaves out (a bias, a layer scale, a norm) shows in the output.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from timm.layers import Attention
from torch import Tensor, nn

WIDTH, PATCH, DEPTH = 32, 8, 3


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """`model` in evaluation mode with every parameter drawn from a seeded generator."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if not parameter.numel():
            continue
        if parameter.dim() > 1:
            # one image must not look like the next: patches speak louder than what is learned
            parameter.data = noise * parameter[0].numel() ** -0.5
        else:
            constant = bool((parameter == parameter.flatten()[0]).all())
            parameter.data = 0.2 * noise + (parameter.data if constant else 0.0)
    return model.eval()


def timm_vit(architecture: type[nn.Module] | None = None, **changes: Any) -> nn.Module:
    """timm's VisionTransformer, or one derived from it; keyword arguments are timm's own."""
    from timm.models.vision_transformer import VisionTransformer

    settings: dict[str, Any] = {
        "img_size": 32,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": 4,
        "num_classes": 10,
    }
    return randomised((architecture or VisionTransformer)(**{**settings, **changes}))


def timm_rich(**changes: Any) -> nn.Module:
    """Everything optional that a pre-norm block of timm may hold, gated attention aside."""
    from timm.layers import RmsNorm, SwiGLU

    return timm_vit(
        depth=4,
        pre_norm=True,
        qk_norm=True,
        scale_attn_norm=True,
        init_values=0.5,
        mlp_layer=SwiGLU,
        norm_layer=RmsNorm,
        **changes,
    )


def timm_gated(**changes: Any) -> nn.Module:
    """timm's Attention can be gated, but its VisionTransformer has no argument for that."""
    model: Any = timm_vit(**changes)
    for block in model.blocks:
        block.attn.gate = nn.Linear(WIDTH, WIDTH)
    return randomised(model)


def timm_distilled(**changes: Any) -> nn.Module:
    from timm.models.deit import VisionTransformerDistilled

    return timm_vit(VisionTransformerDistilled, **changes)


def timm_block(name: str, **changes: Any) -> nn.Module:
    """A VisionTransformer made of another of timm's blocks."""
    from timm.models import vision_transformer

    return timm_vit(block_fn=getattr(vision_transformer, name), **changes)


def timm_rotary(**changes: Any) -> nn.Module:
    """timm's Eva: positions enter each attention."""
    from timm.models.eva import Eva

    return timm_vit(Eva, use_rot_pos_emb=True, use_abs_pos_emb=False, **changes)


def compact(**changes: Any) -> nn.Module:
    """A compact transformer of 4 x 4 tokens."""
    from transom.papers.tokens.cct.network import CompactTransformer

    size = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "hidden": 8, "num_classes": 10}
    return randomised(CompactTransformer(**{**size, **changes}))


def hf(model: str, config: str, **changes: Any) -> nn.Module:
    """A vision model of transformers by the names of its classes; the rest is its configuration."""
    import transformers

    settings = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "mlp_ratio": 2,
        "image_size": 32,
        "patch_size": PATCH,
        "num_labels": 10,
        "projection_dim": 16,
    }
    known = getattr(transformers, config)
    names = {*inspect.signature(known).parameters, "num_labels"}
    own = {name: value for name, value in settings.items() if name in names}
    return randomised(getattr(transformers, model)(known(**{**own, **changes})))


def hf_clip(**changes: Any) -> Any:
    """CLIP with both towers."""
    from transformers import CLIPConfig, CLIPModel

    tower = {
        "hidden_size": WIDTH,
        "num_hidden_layers": DEPTH,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    words = {"vocab_size": 64, "max_position_embeddings": 16, "bos_token_id": 0, "eos_token_id": 1}
    config = CLIPConfig(
        text_config={**tower, **words},
        vision_config={**tower, "image_size": 32, "patch_size": PATCH, **changes},
        projection_dim=16,
    )
    return randomised(CLIPModel(config))


def hf_siglip(**changes: Any) -> nn.Module:
    """SigLIP's classifier, which averages over the patches."""
    from transformers import SiglipConfig, SiglipForImageClassification

    vision: Any = hf("SiglipVisionModel", "SiglipVisionConfig", **changes).config
    config = SiglipConfig(vision_config=vision.to_dict(), num_labels=10)
    return randomised(SiglipForImageClassification(config))


VIT = ("ViTForImageClassification", "ViTConfig")
DEIT = ("DeiTForImageClassificationWithTeacher", "DeiTConfig")
DINOV2 = ("Dinov2Model", "Dinov2Config")
BACKBONE = ("Dinov2Backbone", "Dinov2Config")
REGISTERS = ("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig")
CLIP_VISION = ("CLIPVisionModelWithProjection", "CLIPVisionConfig")
SIGLIP_VISION = ("SiglipVisionModel", "SiglipVisionConfig")
BLIP_VISION = ("BlipVisionModel", "BlipVisionConfig")
BLIP_2_VISION = ("Blip2VisionModel", "Blip2VisionConfig")

HOSTS: dict[str, Callable[..., nn.Module]] = {
    "timm-class": timm_vit,
    "timm-registers": partial(timm_vit, reg_tokens=4, no_embed_class=True),
    "timm-average": partial(timm_vit, class_token=False, global_pool="avg"),
    "timm-map": partial(timm_vit, class_token=False, global_pool="map", img_size=48),
    "timm-rich": timm_rich,
    "timm-gated": timm_gated,
    "timm-distilled": timm_distilled,
    "timm-dynamic": partial(timm_vit, dynamic_img_size=True),
    "timm-post-norm": partial(timm_block, "ResPostBlock", init_values=0.5),
    "timm-parallel": partial(timm_block, "ParallelScalingBlock", init_values=0.5),
    "timm-rotary": timm_rotary,
    "timm-wide": partial(timm_vit, img_size=(32, 48), num_classes=0, global_pool=""),
    "compact-convolution": partial(compact, conv_layers=3),
    "compact-class": partial(compact, kernel=PATCH, convolutional=False, seq_pool=False),
    "hf-vit": partial(hf, *VIT),
    "hf-deit": partial(hf, *DEIT),
    "hf-dinov2": partial(hf, *DINOV2, use_swiglu_ffn=True),
    "hf-dinov2-registers": partial(hf, *REGISTERS, num_register_tokens=4),
    "hf-dinov2-backbone": partial(hf, *BACKBONE, out_features=["stage1", "stage2", "stage3"]),
    "hf-clip-vision": partial(hf, *CLIP_VISION),
    "hf-clip": hf_clip,
    "hf-siglip-vision": partial(hf, *SIGLIP_VISION),
    "hf-siglip": hf_siglip,
    "hf-blip": partial(hf, *BLIP_VISION),
    "hf-blip-2": partial(hf, *BLIP_2_VISION),
}

if "gated" not in inspect.signature(Attention).parameters:
    del HOSTS["timm-gated"]  # the oldest supported timm has no such attention

SIZES = {"timm-map": (48, 48), "timm-wide": (32, 48)}
"""Sizes of the images of hosts that do not take 32 x 32."""


def images(host: str, count: int = 2, seed: int = 0) -> Tensor:
    """Images (count, 3, h, w) for one of HOSTS."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, *SIZES.get(host, (32, 32)), generator=generator)


def call(model: nn.Module, x: Tensor, **options: Any) -> list[Tensor]:
    """Every tensor of what a host returns for the images x (B, 3, h, w)."""
    if type(model).__name__ == "CLIPModel":
        words = torch.tensor([[0, 5, 9, 1]])
        return tensors(model(input_ids=words, pixel_values=x, **options))
    return tensors(model(x, **options))


def tensors(output: Any) -> list[Tensor]:
    """The tensors in a nest of sequences and mappings, in order."""
    if isinstance(output, Tensor):
        return [output]
    parts = output.values() if isinstance(output, Mapping) else output
    return [t for part in parts if part is not None for t in tensors(part)]
