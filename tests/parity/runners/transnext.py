"""TransNeXt against DaiShiResearch/TransNeXt."""

from __future__ import annotations

from torch import Tensor

from transom.ops.neighborhood import unfused
from transom.papers.attention.transnext import backbone
from transom.papers.attention.transnext.geometry import Geometry, geometry
from transom.papers.attention.transnext.mixer import (
    AggregatedAttention,
    ConvGLU,
    Cosine,
    GlobalAttention,
)

from ..golden import Golden


def attention(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    coords, index = golden.inputs["relative_coords_table"], golden.inputs["relative_pos_index"]
    grid = tuple(c["input_resolution"])
    window = c.get("window_size")
    made: Cosine
    if window is None:
        made = GlobalAttention(c["dim"], c["num_heads"], c["qkv_bias"])
        tables = Geometry(coords, index, None, grid)
    else:
        made = AggregatedAttention(c["dim"], c["num_heads"], window, c["qkv_bias"])
        made.norm.eps = c["norm_eps"]
        tables = Geometry(coords, index, unfused.inside(grid, window), tuple(c["pooled"]))
    golden.load(made)
    _check_tables(made, golden, tables)
    return {"y": made(golden.inputs["x"], grid, tables)}


def _check_tables(made: Cosine, golden: Golden, given: Geometry) -> None:
    """Our own tables give the same bias as those in the file."""
    c = golden.config
    grid, pretrained = tuple(c["input_resolution"]), tuple(c["pretrain_size"])
    own = geometry(grid, given.pooled, pretrained, None)
    queries = grid[0] * grid[1]
    expected = made.bias(given.coords, given.pair, queries)
    golden._close("bias", made.bias(own.coords, own.pair, queries).detach(), expected.detach())


def ffn(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    made = ConvGLU(c["in_features"], c["hidden_features"])
    golden.load(made)
    return {"y": made(golden.inputs["x"], (c["H"], c["W"]))}


def model(golden: Golden) -> dict[str, Tensor]:
    c = golden.config
    given = (
        *(
            "img_size",
            "pretrain_size",
            "patch_size",
            "embed_dims",
            "num_heads",
            "depths",
            "mlp_ratios",
        ),
        *("sr_ratios", "window_size", "fixed_pool_size", "num_classes", "qkv_bias"),
    )
    made = backbone.TransNeXt(**{name: c[name] for name in given}).eval()
    golden.load(made)
    maps = made.forward_features(golden.inputs["x"])
    return {"features": maps.mean((1, 2)), "logits": made.forward_head(maps)}


KINDS = {"attention": attention, "ffn": ffn, "model": model}
