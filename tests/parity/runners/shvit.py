"""SHViT against ysj9909/SHViT."""

from __future__ import annotations

from torch import Tensor, nn

from transom.papers.attention.shvit.attention import SHSA
from transom.papers.attention.shvit.backbone import BasicBlock, PatchMerging, SHViT

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    made = SHSA(config["dim"], config["qk_dim"], config["partial_dim"])
    made.pre_norm.eps = config["groupnorm_eps"]
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = config["bn_eps"]
    return _run(golden, made.train(config["mode"] == "train"))


def block(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    made = BasicBlock(config["dim"], config["qk_dim"], config["partial_dim"], config["type"])
    return _run(golden, made.eval())


def downsample(golden: Golden) -> dict[str, Tensor]:
    config = golden.config
    made = PatchMerging(config["dim"], config["out_dim"], config["se_ratio"])
    return _run(golden, made.eval())


def _run(golden: Golden, made: nn.Module) -> dict[str, Tensor]:
    golden.load(made)
    return {"y": made(golden.inputs["x"])}


def model(golden: Golden) -> dict[str, Tensor]:
    config = dict(golden.config)
    config.pop("img_size")
    made = SHViT(**config).eval()
    golden.load(made)
    return {"logits": made(golden.inputs["x"])}


KINDS = {"attention": attention, "block": block, "downsample": downsample, "model": model}
