"""The families of transformers that an adapter may meet, one or more small models of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import transformers
from torch import Tensor, nn

from tests.zoo.hf_builders import (
    BLIP_TEXT,
    BLIP_WORDS,
    CLIP,
    DEPTH,
    HEADS,
    IMAGE_TOKEN,
    LANGUAGE,
    LLAMA,
    PATCH,
    QUERIES,
    SIZE,
    WIDTH,
    WORDS,
    blip_2,
    joint,
    one,
)
from tests.zoo.hf_inputs import (
    images,
    masked_images,
    pairs,
    patches,
    prompt,
    questions,
    several,
    sound,
    text,
    told_images,
    video,
)


@dataclass(frozen=True)
class Family:
    """One family of models.

    Attributes:
        build: makes a small random model in evaluation mode.
        inputs: makes arguments for the model from a batch size and a seed.
        refused: part of the error that `transom.apply` must raise; "" when the family fits.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[[int, int], dict[str, Tensor]]
    refused: str = ""


MAPS = {"neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8}

FAMILIES: dict[str, Family] = {
    "ViT": Family(partial(one, "ViTForImageClassification", "ViTConfig"), images),
    "ViT (features)": Family(partial(one, "ViTModel", "ViTConfig"), images),
    "DeiT": Family(partial(one, "DeiTForImageClassificationWithTeacher", "DeiTConfig"), images),
    "DINOv2": Family(
        partial(one, "Dinov2ForImageClassification", "Dinov2Config", use_swiglu_ffn=True), images
    ),
    "DINOv2 with registers": Family(
        partial(
            one, "Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", num_register_tokens=3
        ),
        images,
    ),
    "DINOv2 backbone": Family(
        partial(one, "Dinov2Backbone", "Dinov2Config", out_features=["stage1", "stage2", "stage3"]),
        images,
    ),
    "DINOv3": Family(
        partial(
            one, "DINOv3ViTModel", "DINOv3ViTConfig", num_register_tokens=2, use_gated_mlp=True
        ),
        images,
    ),
    "DINOv3 backbone": Family(
        partial(one, "DINOv3ViTBackbone", "DINOv3ViTConfig", out_features=["stage1", "stage3"]),
        images,
    ),
    "CLIP vision": Family(
        partial(one, "CLIPVisionModelWithProjection", "CLIPVisionConfig"), images
    ),
    "CLIP": Family(
        partial(
            joint,
            "CLIPModel",
            "CLIPConfig",
            {"text_config": CLIP, "vision_config": "CLIPVisionConfig"},
        ),
        pairs,
    ),
    "SigLIP": Family(
        partial(
            joint,
            "SiglipForImageClassification",
            "SiglipConfig",
            {"vision_config": "SiglipVisionConfig"},
            num_labels=10,
        ),
        images,
    ),
    "SigLIP2": Family(
        partial(one, "Siglip2VisionModel", "Siglip2VisionConfig", num_patches=16), patches
    ),
    "BEiT": Family(
        partial(
            one,
            "BeitForImageClassification",
            "BeitConfig",
            use_relative_position_bias=True,
            layer_scale_init_value=0.5,
        ),
        images,
    ),
    "BEiT with shared bias": Family(
        partial(one, "BeitModel", "BeitConfig", use_shared_relative_position_bias=True), images
    ),
    "data2vec vision": Family(
        partial(
            one,
            "Data2VecVisionModel",
            "Data2VecVisionConfig",
            use_relative_position_bias=True,
            use_shared_relative_position_bias=True,
            layer_scale_init_value=0.5,
        ),
        images,
    ),
    "I-JEPA": Family(partial(one, "IJepaForImageClassification", "IJepaConfig"), images),
    "ViT-MAE": Family(partial(one, "ViTMAEModel", "ViTMAEConfig", mask_ratio=0.25), masked_images),
    "ViT-MAE pretraining": Family(
        partial(
            one,
            "ViTMAEForPreTraining",
            "ViTMAEConfig",
            mask_ratio=0.25,
            decoder_hidden_size=16,
            decoder_num_hidden_layers=2,
            decoder_num_attention_heads=2,
            decoder_intermediate_size=32,
        ),
        masked_images,
    ),
    "ViT-MSN": Family(partial(one, "ViTMSNForImageClassification", "ViTMSNConfig"), images),
    "VideoMAE": Family(
        partial(
            one, "VideoMAEForVideoClassification", "VideoMAEConfig", num_frames=4, tubelet_size=2
        ),
        video,
    ),
    "ViViT": Family(
        partial(
            one,
            "VivitForVideoClassification",
            "VivitConfig",
            num_frames=4,
            tubelet_size=[2, PATCH, PATCH],
        ),
        video,
    ),
    "DPT": Family(
        partial(
            one,
            "DPTForDepthEstimation",
            "DPTConfig",
            num_hidden_layers=4,
            backbone_out_indices=[0, 1, 2, 3],
            is_hybrid=False,
            **MAPS,
        ),
        images,
    ),
    "AIMv2": Family(partial(one, "Aimv2VisionModel", "Aimv2VisionConfig"), images),
    "MLCD": Family(partial(one, "MLCDVisionModel", "MLCDVisionConfig"), images),
    "Chinese-CLIP": Family(
        partial(
            joint,
            "ChineseCLIPModel",
            "ChineseCLIPConfig",
            {
                "text_config": ("ChineseCLIPTextConfig", WORDS),
                "vision_config": "ChineseCLIPVisionConfig",
            },
        ),
        pairs,
    ),
    # one image a row instead of one sequence, so dropout would draw other numbers
    "Pixtral": Family(
        partial(one, "PixtralVisionModel", "PixtralVisionConfig", attention_dropout=0.0), images
    ),
    "AST": Family(
        partial(
            one,
            "ASTForAudioClassification",
            "ASTConfig",
            max_length=48,
            num_mel_bins=32,
            frequency_stride=6,
            time_stride=6,
        ),
        sound,
    ),
    "YOLOS": Family(
        partial(
            one,
            "YolosForObjectDetection",
            "YolosConfig",
            image_size=[SIZE, SIZE],
            num_detection_tokens=5,
            hidden_dropout_prob=0.0,  # it would fall on tokens in another order
            use_mid_position_embeddings=False,
        ),
        images,
    ),
    "YOLOS with mid positions": Family(
        partial(
            one,
            "YolosModel",
            "YolosConfig",
            image_size=[SIZE, SIZE],
            num_detection_tokens=5,
            hidden_dropout_prob=0.0,  # it would fall on tokens in another order
            use_mid_position_embeddings=True,
        ),
        images,
    ),
    "InternVL": Family(
        partial(
            joint,
            "InternVLForConditionalGeneration",
            "InternVLConfig",
            {
                "vision_config": (
                    "InternVLVisionConfig",
                    {
                        "image_size": [SIZE, SIZE],
                        "patch_size": [PATCH, PATCH],
                        "use_qk_norm": True,
                        "projection_dropout": 0.1,
                    },
                ),
                "text_config": LLAMA,
            },
            image_token_id=IMAGE_TOKEN,
        ),
        partial(prompt, 4),
    ),
    "Idefics3": Family(
        partial(
            joint,
            "Idefics3ForConditionalGeneration",
            "Idefics3Config",
            {"vision_config": "Idefics3VisionConfig", "text_config": LLAMA},
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
        ),
        partial(several, 4),
    ),
    "SmolVLM": Family(
        partial(
            joint,
            "SmolVLMForConditionalGeneration",
            "SmolVLMConfig",
            {"vision_config": "SmolVLMVisionConfig", "text_config": LLAMA},
            image_token_id=IMAGE_TOKEN,
            scale_factor=2,
        ),
        partial(several, 4),
    ),
    "LLaVA": Family(
        partial(
            joint,
            "LlavaForConditionalGeneration",
            "LlavaConfig",
            {"vision_config": "CLIPVisionConfig", "text_config": LLAMA},
            image_token_id=IMAGE_TOKEN,
            vision_feature_layer=-2,
        ),
        partial(prompt, 16),
    ),
    "BLIP vision": Family(partial(one, "BlipVisionModel", "BlipVisionConfig"), images),
    "BLIP matching": Family(
        partial(
            joint,
            "BlipForImageTextRetrieval",
            "BlipConfig",
            {"vision_config": "BlipVisionConfig", "text_config": BLIP_TEXT},
            image_text_hidden_size=16,
        ),
        questions,
    ),
    "BLIP captions": Family(
        partial(
            joint,
            "BlipForConditionalGeneration",
            "BlipConfig",
            {"vision_config": "BlipVisionConfig", "text_config": BLIP_TEXT},
            image_text_hidden_size=16,
        ),
        questions,
    ),
    "BLIP text encoder": Family(
        partial(one, "BlipTextModel", "BlipTextConfig", **BLIP_WORDS),
        told_images,
    ),
    "BLIP-2 vision": Family(partial(one, "Blip2VisionModel", "Blip2VisionConfig"), images),
    "BLIP-2": Family(blip_2, partial(prompt, QUERIES)),
    "InstructBLIP vision": Family(
        partial(one, "InstructBlipVisionModel", "InstructBlipVisionConfig"), images
    ),
    "MetaCLIP 2": Family(partial(one, "MetaClip2VisionModel", "MetaClip2VisionConfig"), images),
    "CLIPSeg": Family(partial(one, "CLIPSegVisionModel", "CLIPSegVisionConfig"), images),
    "OWL-ViT": Family(partial(one, "OwlViTVisionModel", "OwlViTVisionConfig"), images),
    "Pixio": Family(partial(one, "PixioModel", "PixioConfig"), images),
    "VitPose backbone": Family(
        partial(
            one,
            "VitPoseBackbone",
            "VitPoseBackboneConfig",
            image_size=[SIZE, SIZE],
            patch_size=[PATCH, PATCH],
            out_features=["stage1", "stage3"],
        ),
        images,
    ),
    "OWLv2": Family(partial(one, "Owlv2VisionModel", "Owlv2VisionConfig"), images),
    "FLAVA": Family(partial(one, "FlavaImageModel", "FlavaImageConfig"), images),
    "Sapiens2": Family(partial(one, "Sapiens2Model", "Sapiens2Config"), images),
    "BERT": Family(partial(one, "BertModel", "BertConfig", **WORDS), text),
    "BERT classifier": Family(
        partial(one, "BertForSequenceClassification", "BertConfig", **WORDS), text
    ),
    "DistilBERT": Family(
        partial(
            one,
            "DistilBertModel",
            "DistilBertConfig",
            dim=WIDTH,
            n_layers=DEPTH,
            n_heads=HEADS,
            hidden_dim=64,
            vocab_size=64,
            max_position_embeddings=48,
            pad_token_id=1,
        ),
        text,
    ),
    "RoBERTa": Family(partial(one, "RobertaModel", "RobertaConfig", **WORDS), text),
    "XLM-RoBERTa": Family(partial(one, "XLMRobertaModel", "XLMRobertaConfig", **WORDS), text),
    "MPNet": Family(partial(one, "MPNetModel", "MPNetConfig", **WORDS), text),
    "ELECTRA": Family(
        partial(one, "ElectraModel", "ElectraConfig", embedding_size=16, **WORDS), text
    ),
    "ERNIE": Family(partial(one, "ErnieModel", "ErnieConfig", **WORDS), text),
    "LayoutLM": Family(partial(one, "LayoutLMModel", "LayoutLMConfig", **WORDS), text),
    "Swin": Family(
        partial(
            one,
            "SwinModel",
            "SwinConfig",
            image_size=64,
            patch_size=4,
            embed_dim=16,
            depths=[2, 2],
            num_heads=[2, 4],
            window_size=4,
        ),
        images,
        "stages or windows",
    ),
    "SAM": Family(
        partial(
            one,
            "SamVisionModel",
            "SamVisionConfig",
            image_size=64,
            window_size=2,
            global_attn_indexes=[1],
            output_channels=16,
            mlp_ratio=2.0,
        ),
        images,
        "patch embeddings",
    ),
    "X-CLIP": Family(
        partial(one, "XCLIPVisionModel", "XCLIPVisionConfig", num_frames=4), images, "message_attn"
    ),
    "ViLT": Family(partial(one, "ViltModel", "ViltConfig"), images, "text_embeddings"),
    "EoMT": Family(
        partial(one, "EomtForUniversalSegmentation", "EomtConfig", num_blocks=1, num_queries=4),
        images,
        "changes the sequence",
    ),
    "TimeSformer": Family(
        partial(one, "TimesformerModel", "TimesformerConfig", num_frames=4, drop_path_rate=None),
        video,
        "pos_drop",
    ),
    "ConvNeXt": Family(
        partial(one, "ConvNextModel", "ConvNextConfig"), images, "0 stacks of layers"
    ),
    "DeBERTa": Family(
        partial(one, "DebertaModel", "DebertaConfig", vocab_size=64), text, "separate projections"
    ),
    "ALBERT": Family(
        partial(one, "AlbertModel", "AlbertConfig", embedding_size=16, **WORDS), text, "LayerNorm"
    ),
    "BigBird": Family(
        partial(one, "BigBirdModel", "BigBirdConfig", **WORDS),
        text,
        "does not go through the attention interface",
    ),
    "Longformer": Family(
        partial(one, "LongformerModel", "LongformerConfig", attention_window=4, **WORDS),
        text,
        "key_global",
    ),
    "ESM": Family(
        partial(one, "EsmModel", "EsmConfig", vocab_size=64, pad_token_id=1, mask_token_id=3),
        text,
        "LayerNorm",
    ),
    "RoFormer": Family(
        partial(one, "RoFormerModel", "RoFormerConfig", **WORDS),
        text,
        "does not go through the attention interface",
    ),
    "ModernBERT": Family(
        partial(one, "ModernBertModel", "ModernBertConfig", **WORDS), text, "word embeddings"
    ),
    "BERT as a decoder": Family(
        partial(one, "BertModel", "BertConfig", is_decoder=True, **WORDS), text, "decoder"
    ),
    "T5 encoder": Family(
        partial(
            one,
            "T5EncoderModel",
            "T5Config",
            vocab_size=64,
            d_model=32,
            num_layers=2,
            num_heads=4,
            d_kv=8,
            d_ff=64,
        ),
        text,
        "word embeddings",
    ),
    "Llama": Family(partial(one, "LlamaModel", "LlamaConfig", **LANGUAGE), text, "word embeddings"),
}

# What the oldest supported transformers does not have.
NEWER = {"Sapiens2": "Sapiens2Model"}
FAMILIES = {
    name: family
    for name, family in FAMILIES.items()
    if name not in NEWER or hasattr(transformers, NEWER[name])
}

FITS = [name for name, family in FAMILIES.items() if not family.refused]
REFUSED = [name for name, family in FAMILIES.items() if family.refused]
TEXT = [name for name in FITS if FAMILIES[name].inputs is text]
