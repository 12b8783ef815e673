"""The families of timm, torchvision and open_clip, built small and with every parameter drawn anew.

FITS are hosts; REFUSED are families that cannot be, each with a word of the reason.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from tests.common.hosts import compact, randomised, timm_gated

SIDE, PATCH, WIDTH, DEPTH, HEADS = 48, 8, 32, 3, 4
GRID = SIDE // PATCH

Build = Callable[[], nn.Module]
T = TypeVar("T")


def timm_class(module: str, name: str) -> Any:
    """A class of timm's models, or of its layers."""
    return getattr(importlib.import_module(f"timm.{module}"), name)


def plain(module: str, name: str, **changes: Any) -> nn.Module:
    """A transformer of timm with one width and one grid; the rest are timm's own arguments."""
    settings = {
        "img_size": SIDE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": 10,
        **changes,
    }
    return randomised(timm_class(f"models.{module}", name)(**settings))


def vit(block: str = "Block", **changes: Any) -> nn.Module:
    block_fn = changes.pop("block_fn", None) or timm_class("models.vision_transformer", block)
    return plain("vision_transformer", "VisionTransformer", block_fn=block_fn, **changes)


def gated() -> nn.Module:
    if "gated" not in inspect.signature(timm_class("layers", "Attention")).parameters:
        raise TypeError("attention has no gate")
    return timm_gated(img_size=SIDE)


def parallel_scaling(**changes: Any) -> nn.Module:
    """A block with options of its own that VisionTransformer does not hand on."""
    block = timm_class("models.vision_transformer", "ParallelScalingBlock")
    return vit(block_fn=partial(block, **changes), qkv_bias=not changes, qk_norm=True)


def differential_dual() -> nn.Module:
    """The form of differential attention with two numbers instead of four vectors."""
    model: Any = vit(attn_layer="diff")
    attention = timm_class("layers", "DiffAttention")
    for i, block in enumerate(model.blocks):
        block.attn = attention(WIDTH, HEADS, qkv_bias=True, depth=i, dual_lambda=True)
    return randomised(model)


def hybrid() -> nn.Module:
    """Patches made by a small convolutional network, as in ViTamin and the ResNet hybrids."""
    stem = timm_class("models.vision_transformer_hybrid", "ConvStem")
    embed = partial(
        timm_class("layers", "HybridEmbed"),
        backbone=stem(depth=3, channels=(8, 16, WIDTH)),
        proj=False,
    )
    return vit(embed_layer=embed, patch_size=1)


eva = partial(plain, "eva", "Eva", head_init_scale=1.0)
beit = partial(plain, "beit", "Beit", init_values=0.1, head_init_scale=1.0)
relpos = partial(plain, "vision_transformer_relpos", "VisionTransformerRelPos", init_values=0.1)
ROPE: dict[str, Any] = {"use_rot_pos_emb": True, "use_abs_pos_emb": False}


def naflex(**changes: Any) -> nn.Module:
    settings: dict[str, Any] = {
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "pos_embed_grid_size": (GRID, GRID),
        "init_values": 0.1,
        **changes,
    }
    cls = timm_class("models.naflexvit", "NaFlexVit")
    return randomised(cls(num_classes=10, **settings))


def encoder(module: str, name: str, **changes: Any) -> nn.Module:
    """An image encoder made for a language model; it has no classes."""
    settings = {"embed_dim": WIDTH, "depth": DEPTH, "num_heads": 4, "img_size": SIDE}
    cls = timm_class(f"models.{module}", name)
    return randomised(cls(patch_size=PATCH, out_features=16, **settings, **changes))


def torchvision_vit() -> nn.Module:
    from torchvision.models.vision_transformer import VisionTransformer

    return randomised(
        VisionTransformer(
            image_size=SIDE,
            patch_size=PATCH,
            num_layers=DEPTH,
            num_heads=HEADS,
            hidden_dim=WIDTH,
            mlp_dim=64,
            num_classes=10,
        )
    )


def open_clip_tower(**changes: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    return randomised(
        VisionTransformer(
            image_size=SIDE,
            patch_size=PATCH,
            width=WIDTH,
            layers=DEPTH,
            heads=HEADS,
            mlp_ratio=2.0,
            output_dim=16,
            **changes,
        )
    )


def open_clip_both() -> nn.Module:
    """Both towers of CLIP."""
    from open_clip.model import CLIP, CLIPTextCfg, CLIPVisionCfg

    vision = CLIPVisionCfg(
        layers=DEPTH, width=WIDTH, head_width=8, patch_size=PATCH, image_size=SIDE
    )
    text = CLIPTextCfg(context_length=8, vocab_size=64, width=WIDTH, heads=HEADS, layers=2)
    return randomised(CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text))


class ResidualAttentionBlock(nn.Module):
    """A block as in OpenAI's CLIP: its attention takes (N, B, D), and it may hold a mask."""

    def __init__(self, mask: Tensor | None = None, batch_first: bool = False) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first)
        self.ln_1 = nn.LayerNorm(WIDTH)
        layers = [
            ("c_fc", nn.Linear(WIDTH, 64)),
            ("gelu", nn.GELU()),
            ("c_proj", nn.Linear(64, WIDTH)),
        ]
        self.mlp = nn.Sequential(OrderedDict(layers))
        self.ln_2 = nn.LayerNorm(WIDTH)
        self.attn_mask = mask

    def forward(self, x: Tensor) -> Tensor:
        h = self.ln_1(x)
        x = x + self.attn(h, h, h, need_weights=False, attn_mask=self.attn_mask)[0]
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, mask: Tensor | None = None, batch_first: bool = False) -> None:
        super().__init__()
        blocks = [ResidualAttentionBlock(mask, batch_first) for _ in range(DEPTH)]
        self.resblocks = nn.Sequential(*blocks)

    def forward(self, x: Tensor) -> Tensor:
        return self.resblocks(x)


class ImageTower(nn.Module):
    """The image tower that goes with it."""

    def __init__(self, mask: Tensor | None = None, batch_first: bool = False) -> None:
        super().__init__()
        self.order = (0, 1, 2) if batch_first else (1, 0, 2)
        self.input_resolution = SIDE
        self.conv1 = nn.Conv2d(3, WIDTH, PATCH, PATCH, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(WIDTH))
        self.positional_embedding = nn.Parameter(torch.randn(GRID**2 + 1, WIDTH))
        self.ln_pre = nn.LayerNorm(WIDTH)
        self.transformer = Transformer(mask, batch_first)
        self.ln_post = nn.LayerNorm(WIDTH)
        self.proj = nn.Parameter(torch.randn(WIDTH, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x], 1)
        x = self.ln_pre(x + self.positional_embedding).permute(self.order)
        x = self.transformer(x).permute(self.order)
        return self.ln_post(x[:, 0]) @ self.proj


FITS: dict[str, Build] = {
    # VisionTransformer and its blocks
    "vit": vit,
    "vit-registers": partial(vit, reg_tokens=4, no_embed_class=True),
    "vit-average": partial(vit, class_token=False, global_pool="avg"),
    "vit-map": partial(vit, class_token=False, global_pool="map"),
    "vit-gated": gated,
    "clip": partial(vit, pre_norm=True, act_layer="quick_gelu"),
    "beit3": partial(vit, scale_attn_norm=True, scale_mlp_norm=True, global_pool="avg"),
    "dinov2": partial(vit, init_values=0.1, reg_tokens=2, no_embed_class=True),
    "deit": partial(plain, "deit", "VisionTransformerDistilled"),
    "deit3": partial(vit, init_values=0.1, no_embed_class=True),
    "vit-res-post-norm": partial(vit, "ResPostBlock", init_values=0.5, qkv_bias=False),
    "vit-parallel-scaling": parallel_scaling,
    "vit-parallel-fused": partial(parallel_scaling, fuse_out_proj=True),
    "vit-parallel-things": partial(vit, "ParallelThingsBlock", init_values=0.1),
    "vit-differential": partial(vit, attn_layer="diff", qk_norm=True),
    "vit-differential-dual": differential_dual,
    "vit-parallel-differential": partial(vit, "DiffParallelScalingBlock", init_values=0.1),
    "vit-things-differential": partial(vit, "ParallelThingsBlock", attn_layer="diff"),
    "vit-hybrid": hybrid,
    # rotary positions
    "eva": eva,
    "eva02": partial(
        eva,
        qkv_fused=False,
        swiglu_mlp=True,
        scale_mlp=True,
        scale_attn_inner=True,
        use_rot_pos_emb=True,
        ref_feat_shape=(4, 4),
    ),
    "eva-post-norm": partial(eva, use_post_norm=True, use_rot_pos_emb=True, global_pool="token"),
    "dinov3": partial(
        eva,
        **ROPE,
        rope_type="dinov3",
        rope_rotate_half=True,
        num_reg_tokens=4,
        init_values=0.1,
        dynamic_img_size=True,
        qkv_bias=False,
        use_fc_norm=False,
    ),
    "rope-mixed": partial(eva, **ROPE, attn_type="rope", rope_type="mixed", global_pool="token"),
    "perception-encoder": partial(
        eva,
        use_rot_pos_emb=True,
        attn_type="rope",
        use_pre_transformer_norm=True,
        global_pool="map",
        rope_grid_indexing="xy",
        rope_grid_offset=1.0,
    ),
    "sapiens2": partial(
        eva,
        **ROPE,
        rope_type="dinov3",
        attn_type="rope",
        qkv_fused=False,
        num_kv_heads=2,
        qk_norm=True,
        swiglu_mlp=True,
        init_values=0.1,
        attn_only_layer_scale=True,
    ),
    "qwen3-encoder": partial(encoder, "qwen3_vit", "Qwen3VitEncoder", pos_embed_grid_size=GRID),
    "deepseek-encoder": partial(encoder, "deepseek_vit", "DeepseekVitEncoder"),
    # relative positions
    "beit": partial(beit, use_rel_pos_bias=True, use_abs_pos_emb=False),
    "beit-shared": partial(beit, use_shared_rel_pos_bias=True, swiglu_mlp=True, scale_mlp=True),
    "beit-both": partial(beit, use_rel_pos_bias=True, use_shared_rel_pos_bias=True),
    "relpos-mlp": partial(relpos, rel_pos_dim=16),
    "relpos-bias": partial(relpos, rel_pos_type="bias", class_token=True, global_pool="token"),
    "relpos-shared": partial(relpos, shared_rel_pos=True, rel_pos_dim=16, qk_norm=True),
    "relpos-swin": partial(relpos, rel_pos_type="mlp_swin", rel_pos_dim=16, class_token=True),
    # variable size
    "naflex": partial(naflex, class_token=True, global_pool="token"),
    "naflex-map": partial(naflex, reg_tokens=1),
    "naflex-rope": partial(naflex, pos_embed="none", rope_type="axial", global_pool="avg"),
    "naflex-mixed": partial(naflex, pos_embed="none", rope_type="mixed", global_pool="avg"),
    # heads mixed
    "cait": partial(plain, "cait", "Cait", init_values=0.1),
    # nn.MultiheadAttention
    "torchvision-vit": torchvision_vit,
    "openai-clip-form": lambda: randomised(ImageTower()),
}

# registered with timm by transom itself
OURS: dict[str, Build] = {
    "cct": partial(compact, img_size=SIDE, conv_layers=3),
    "vit-lite": partial(compact, img_size=SIDE, kernel=PATCH, convolutional=False, seq_pool=False),
}
FITS |= OURS

if importlib.util.find_spec("open_clip"):
    FITS |= {
        "open-clip": partial(open_clip_tower, ls_init_value=0.1),
        "open-clip-average": partial(open_clip_tower, pool_type="avg"),
        "open-clip-pooler": partial(
            open_clip_tower, attentional_pool=True, attn_pooler_heads=4, attn_pooler_queries=3
        ),
        "open-clip-custom": partial(
            open_clip_tower,
            qk_norm=True,
            scale_heads=True,
            scale_attn_inner=True,
            scale_attn=True,
            scale_fc=True,
        ),
        "open-clip-both-towers": open_clip_both,
    }


NEWEST = (1, 0, 31)


def own(call: Callable[[], T]) -> T:
    """What timm does by itself; skips where an earlier timm does not or cannot."""
    import timm

    earlier = tuple(int(part) for part in timm.__version__.split(".")[:3]) < NEWEST
    try:
        return call()
    except (AttributeError, ImportError, RuntimeError, TypeError) as error:
        if not earlier:
            raise
        pytest.skip(f"timm {timm.__version__}: {error}")


def of(module: str, name: str, *args: Any, **settings: Any) -> Build:
    """Builds a class of timm from its own arguments."""
    return lambda: timm_class(f"models.{module}", name)(*args, **settings)


def created(name: str) -> Build:
    """Builds one of timm's own models."""

    def build() -> nn.Module:
        import timm

        return timm.create_model(name, pretrained=False)

    return build


def causal() -> nn.Module:
    mask = torch.full((GRID**2 + 1, GRID**2 + 1), float("-inf")).triu(1)
    return ImageTower(mask)


def stranger() -> nn.Module:
    """A host whose attention only looks like one that is known."""

    class Attention(timm_class("layers", "Attention")):  # type: ignore[misc]
        def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Tensor:
            return super().forward(x.flip(0), attn_mask=attn_mask, is_causal=is_causal)

    return vit(attn_layer=Attention)


def torchvision_swin() -> nn.Module:
    from torchvision.models.swin_transformer import SwinTransformer

    return SwinTransformer([4, 4], 16, [1, 1], [1, 2], [4, 4], num_classes=10)


FOUR: dict[str, Any] = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}

REFUSED: dict[str, tuple[Build, str]] = {
    "swin": (
        of(
            "swin_transformer",
            "SwinTransformer",
            img_size=SIDE,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(1, 2),
            window_size=4,
        ),
        "windows",
    ),
    "swin-v2": (
        of(
            "swin_transformer_v2",
            "SwinTransformerV2",
            img_size=SIDE,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(1, 2),
            window_size=4,
        ),
        "windows",
    ),
    "swin-v2-cr": (
        of(
            "swin_transformer_v2_cr",
            "SwinTransformerV2Cr",
            img_size=(32, 32),
            window_size=4,
            embed_dim=16,
            depths=(1, 1),
            num_heads=(1, 2),
        ),
        "windows",
    ),
    "torchvision-swin": (torchvision_swin, "windows"),
    "maxvit": (created("maxvit_rmlp_pico_rw_256"), "windows"),
    "gcvit": (created("gcvit_xxtiny"), "windows"),
    "nest": (
        of("nest", "Nest", 64, embed_dims=(8, 16, 32), num_heads=(1, 2, 4), depths=(1, 1, 1)),
        "windows",
    ),
    "davit": (of("davit", "DaVit", **FOUR, depths=(1, 1, 1, 1)), "windows"),
    "tiny-vit": (of("tiny_vit", "TinyVit", **FOUR, depths=(1, 1, 1, 1)), "windows"),
    "sam": (
        of(
            "vision_transformer_sam",
            "VisionTransformerSAM",
            img_size=SIDE,
            embed_dim=WIDTH,
            depth=2,
            num_heads=2,
            use_rel_pos=True,
            window_size=2,
            neck_chans=8,
        ),
        "windows",
    ),
    "sam2-hiera": (
        of("hieradet_sam2", "HieraDet", embed_dim=16, stages=(1, 1, 1, 1), global_att_blocks=(2,)),
        "windows",
    ),
    "twins": (of("twins", "Twins", **FOUR, depths=(1, 1, 1, 1), wss=(7, 7, 7, 7)), "windows"),
    "pit": (
        of(
            "pit",
            "PoolingVisionTransformer",
            base_dims=(8, 8, 8),
            depth=(1, 1, 1),
            heads=(1, 2, 4),
        ),
        "shrinks its token grid",
    ),
    "levit": (created("levit_128s"), "shrinks its token grid"),
    "mvit-v2": (created("mvitv2_tiny"), "shrinks its token grid"),
    "hiera": (
        of("hiera", "Hiera", embed_dim=16, stages=(1, 1, 1, 1)),
        "shrinks its token grid",
    ),
    "pvt-v2": (
        of("pvt_v2", "PyramidVisionTransformerV2", **FOUR, depths=(1, 1, 1, 1)),
        "shrinks its token grid",
    ),
    "efficientformer": (created("efficientformer_l1"), "shrinks its token grid"),
    "visformer": (created("visformer_tiny"), "shrinks its token grid"),
    "fastvit": (created("fastvit_t8"), "shrinks its token grid"),
    "xcit": (
        of("xcit", "Xcit", img_size=64, embed_dim=WIDTH, depth=2, num_heads=2),
        "over channels",
    ),
    "coat": (created("coat_tiny"), "convolutions"),
    "volo": (created("volo_d1_224"), "folds neighbourhoods"),
    "convit": (
        of("convit", "ConVit", img_size=64, embed_dim=WIDTH, depth=4, num_heads=4),
        "positional softmax",
    ),
    "crossvit": (created("crossvit_tiny_240"), "two sequences"),
    "tnt": (
        of(
            "tnt",
            "TNT",
            img_size=64,
            embed_dim=WIDTH,
            inner_dim=16,
            depth=2,
            num_heads_outer=2,
            num_heads_inner=2,
        ),
        "pixel tokens",
    ),
    "mixer": (
        of("mlp_mixer", "MlpMixer", img_size=64, num_blocks=2, embed_dim=WIDTH),
        "no attention",
    ),
    "gemma4-encoder": (
        of(
            "gemma4_vit",
            "Gemma4VitEncoder",
            embed_dim=WIDTH,
            depth=2,
            num_heads=2,
            head_dim=16,
            intermediate_size=64,
            position_embedding_size=64,
        ),
        "pooler",
    ),
    "resnet": (created("resnet10t"), "not a supported host"),
    "causal-tower": (causal, "transformer.resblocks.0 holds an attention mask"),
    "stranger": (stranger, "blocks.0.attn is a tests.zoo.timm_zoo.Attention"),
}
