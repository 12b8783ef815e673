"""CCT and CVT against SHI-Labs/Compact-Transformers."""

from __future__ import annotations

from torch import Tensor

from transom.papers.tokens.cct.network import CompactTransformer, Layer, Tokenizer

from ..golden import Golden


def tokenizer(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    pool = (
        config["pooling_kernel_size"],
        config["pooling_stride"],
        config["pooling_padding"],
    )
    module = Tokenizer(
        config["kernel_size"],
        config["stride"],
        config["padding"],
        layers=config["n_conv_layers"],
        width=config["n_output_channels"],
        hidden=config["in_planes"],
        in_chans=config["in_chans"],
        bias=config["conv_bias"],
        relu=config["activation"] is not None,
        pool=pool if config.get("max_pool", True) else None,
    )
    golden.load(module)
    return {"tokens": module(golden.inputs["image"])}


def block(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    module = Layer(
        config["d_model"],
        config["nhead"],
        config["dim_feedforward"],
        qkv_bias=config["qkv_bias"],
        eps=config["norm_eps"],
    ).eval()
    golden.load(module)
    return {"y": module(golden.inputs["x"])}


def model(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    module = CompactTransformer(
        config["img_size"],
        config["kernel_size"],
        config["n_conv_layers"],
        config["stride"],
        config["padding"],
        hidden=config["in_planes"],
        in_chans=config["in_chans"],
        seq_pool=config["seq_pool"],
        **_shared(config),
    ).eval()
    golden.load(module)
    return {"logits": module(golden.inputs["image"])}


def model_cvt(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    module = CompactTransformer(
        config["img_size"],
        config["patch"],
        convolutional=False,
        in_chans=config.get("in_chans", 3),
        seq_pool=config.get("seq_pool", True),
        **_shared(config),
    ).eval()
    golden.load(module)
    return {"logits": module(golden.inputs["image"])}


def _shared(config: dict) -> dict:
    return {
        "embed_dim": config["embedding_dim"],
        "depth": config["num_layers"],
        "num_heads": config["num_heads"],
        "mlp_ratio": config["mlp_ratio"],
        "num_classes": config["num_classes"],
        "positions": config["positional_embedding"],
    }


KINDS = {"tokenizer": tokenizer, "block": block, "model": model, "model_cvt": model_cvt}
