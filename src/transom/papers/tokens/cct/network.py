"""The network of CCT, CVT and ViT-Lite; see the room's own docstring for its equations."""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn

from transom.errors import SettingsError
from transom.networks import Isotropic, narrow, rising

Positions = Literal["learnable", "sine", "none"]


class Tokenizer(nn.Module):
    """Images (B, 3, H, W) to tokens (B, N, D), row by row.

    Args:
        kernel: side of the convolutions.
        stride: of the convolutions.
        padding: of the convolutions.
        layers: convolutions, each with activation and pooling.
        width: D.
        hidden: channels between convolutions.
        in_chans: channels of the image.
        bias: whether the convolutions have one.
        relu: whether they are followed by a ReLU.
        pool: (side, stride, padding) of the max-pooling; None for none.
    """

    def __init__(
        self,
        kernel: int,
        stride: int,
        padding: int,
        *,
        layers: int = 1,
        width: int = 256,
        hidden: int = 64,
        in_chans: int = 3,
        bias: bool = False,
        relu: bool = True,
        pool: tuple[int, int, int] | None = (3, 2, 1),
    ) -> None:
        super().__init__()
        channels = [in_chans, *[hidden] * (layers - 1), width]
        self.conv_layers = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(a, b, kernel, stride, padding, bias=bias),
                    nn.ReLU() if relu else nn.Identity(),
                    nn.Identity() if pool is None else nn.MaxPool2d(*pool),
                )
                for a, b in pairwise(channels)
            )
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def maps(self, image: Tensor) -> Tensor:
        """The tokens as a map (B, D, h, w)."""
        y: Tensor = self.conv_layers(image)
        return y

    def forward(self, image: Tensor) -> Tensor:
        return self.maps(image).flatten(2).mT

    @property
    def reduction(self) -> int:
        """Pixels a token stands for, in each direction."""
        steps = [m.stride for m in self.modules() if isinstance(m, (nn.Conv2d, nn.MaxPool2d))]
        return math.prod(s if isinstance(s, int) else s[0] for s in steps)


class SelfAttention(nn.Module):
    """Multi-head self-attention (B, N, D) -> (B, N, D), scale (D/H)^-½.

    Args:
        dim: D.
        heads: H.
        qkv_bias: whether q, k, v have a bias.
        attn_drop: dropout of the weights.
        proj_drop: dropout of the result.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        qkv_bias: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % heads:
            raise SettingsError(f"width {dim} cannot be split into {heads} heads")
        self.heads, self.attn_drop = heads, attn_drop
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.attn_drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return self.proj_drop(self.proj(y.transpose(1, 2).flatten(2)))


class Layer(nn.Module):
    """Encoder layer (B, N, D) -> (B, N, D), see the room's docstring.

    Args:
        dim: D.
        heads: H.
        hidden: width of the MLP.
        qkv_bias: whether q, k, v have a bias.
        eps: of the norms.
        drop: dropout of projection and MLP.
        attn_drop: dropout of the attention weights.
        drop_path: stochastic depth of both residuals.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        hidden: int,
        *,
        qkv_bias: bool = False,
        eps: float = 1e-5,
        drop: float = 0.0,
        attn_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.pre_norm = nn.LayerNorm(dim, eps)
        self.self_attn = SelfAttention(dim, heads, qkv_bias, attn_drop, drop)
        self.linear1 = nn.Linear(dim, hidden)
        self.norm1 = nn.LayerNorm(dim, eps)
        self.linear2 = nn.Linear(hidden, dim)
        self.dropout = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x + self.drop_path(self.self_attn(self.pre_norm(x))))
        y = self.linear2(self.dropout(F.gelu(self.linear1(h))))
        out: Tensor = h + self.drop_path(self.dropout(y))
        return out


def sines(count: int, dim: int) -> Tensor:
    """Table (1, N, D) of sin (even i) and cos (odd i) of n / 10000^(2⌊i/2⌋/D)."""
    i = torch.arange(dim)
    angle = torch.arange(count)[:, None] / 10000 ** (2 * (i // 2) / dim)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos())[None]


class Encoder(nn.Module):
    """What the network has behind its tokenizer; the official `classifier`.

    The network around it runs the layers and brings the last linear map, `fc`.

    Args:
        grid: (h, w) of the tokens.
        dim: D.
        depth: layers.
        heads: H.
        mlp_ratio: width of the MLP over D.
        positions: kind of position table.
        seq_pool: pool the sequence instead of reading a class token.
        drop: dropout.
        attn_drop: dropout of the attention weights.
        drop_path: stochastic depth of the last layer; it rises linearly from 0.
    """

    fc: nn.Module

    def __init__(
        self,
        grid: tuple[int, int],
        dim: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        *,
        positions: Positions = "learnable",
        seq_pool: bool = True,
        drop: float = 0.0,
        attn_drop: float = 0.1,
        drop_path: float = 0.1,
    ) -> None:
        super().__init__()
        self.grid, self.seq_pool = grid, seq_pool
        self.prefix = 0 if seq_pool else 1
        count = grid[0] * grid[1] + self.prefix
        if seq_pool:
            self.attention_pool = nn.Linear(dim, 1)
        else:
            self.class_emb = nn.Parameter(torch.zeros(1, 1, dim))
        if positions == "learnable":
            self.positional_emb: nn.Parameter | None = nn.Parameter(torch.empty(1, count, dim))
            trunc_normal_(self.positional_emb, std=0.2)
        elif positions == "sine":
            self.positional_emb = nn.Parameter(sines(count, dim), requires_grad=False)
        elif positions == "none":
            self.register_parameter("positional_emb", None)
        else:
            raise SettingsError(
                f"positions are {positions!r}; expected 'learnable', 'sine' or 'none'"
            )
        self.dropout = nn.Dropout(drop)
        self.blocks = nn.ModuleList(
            Layer(
                dim,
                heads,
                int(dim * mlp_ratio),
                drop=drop,
                attn_drop=attn_drop,
                drop_path=rate,
            )
            for rate in rising(drop_path, depth)
        )
        self.norm = nn.LayerNorm(dim)

    def embed(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Tokens with class token and positions."""
        if self.prefix:
            x = torch.cat([self.class_emb.expand(x.shape[0], -1, -1), x], 1)
        if self.positional_emb is not None:
            x = x + self._positions(self.positional_emb, grid)
        y: Tensor = self.dropout(x)
        return y

    def _positions(self, table: Tensor, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return table
        old = table[:, self.prefix :].mT.unflatten(2, self.grid)
        new = F.interpolate(old, grid, mode="bilinear", align_corners=False)
        return torch.cat([table[:, : self.prefix], new.flatten(2).mT], 1)

    def pool(self, x: Tensor) -> Tensor:
        """Normed tokens (B, N, D) to one vector (B, D)."""
        if not self.seq_pool:
            return x[:, 0]
        weight = self.attention_pool(x).softmax(1)  # (B, N, 1)
        return (weight.mT @ x)[:, 0]


class CompactTransformer(Isotropic):
    """ViT-Lite, CVT and CCT with timm's interface.

    Args:
        img_size: side of the images, or (H, W), in pixels.
        kernel: side of the convolutions; of the patches without `convolutional`.
        conv_layers: convolutions of the tokenizer.
        stride: of the convolutions; max(1, kernel // 2 - 1) by default.
        padding: of the convolutions; max(1, kernel // 2) by default.
        convolutional: tokens from convolution, ReLU and pooling; otherwise from patches.
        hidden: channels between convolutions.
        embed_dim: D.
        depth: layers.
        num_heads: H.
        mlp_ratio: width of the MLP over D.
        num_classes: C; 0 for none.
        in_chans: channels of the image.
        positions: "learnable", "sine" or "none".
        seq_pool: pool the sequence instead of reading a class token.
        drop_rate: dropout.
        attn_drop_rate: dropout of the attention weights.
        drop_path_rate: stochastic depth of the last layer.
    """

    # "own" is the sequence pooling or the class token, whichever the network was made with
    pools: ClassVar[tuple[str, ...]] = ("own", "")

    def __init__(
        self,
        img_size: int | tuple[int, int] = 32,
        kernel: int = 3,
        conv_layers: int = 1,
        stride: int | None = None,
        padding: int | None = None,
        convolutional: bool = True,
        hidden: int = 64,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        num_classes: int = 10,
        in_chans: int = 3,
        positions: Positions = "learnable",
        seq_pool: bool = True,
        drop_rate: float = 0.0,
        attn_drop_rate: float = 0.1,
        drop_path_rate: float = 0.1,
    ) -> None:
        size = (img_size, img_size) if isinstance(img_size, int) else (img_size[0], img_size[1])
        tokenizer = Tokenizer(
            kernel,
            (max(1, kernel // 2 - 1) if stride is None else stride) if convolutional else kernel,
            (max(1, kernel // 2) if padding is None else padding) if convolutional else 0,
            layers=conv_layers if convolutional else 1,
            width=embed_dim,
            hidden=hidden,
            in_chans=in_chans,
            bias=not convolutional,
            relu=convolutional,
            pool=(3, 2, 1) if convolutional else None,
        )
        reduction = tokenizer.reduction
        info = [
            {"num_chs": embed_dim, "reduction": reduction, "module": f"classifier.blocks.{i}"}
            for i in range(depth)
        ]
        super().__init__(num_classes, "own", info)
        self.tokenizer = tokenizer
        self.classifier = Encoder(
            _grid_of(tokenizer, size),
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            positions=positions,
            seq_pool=seq_pool,
            drop=drop_rate,
            attn_drop=attn_drop_rate,
            drop_path=drop_path_rate,
        )
        self.img_size, self.num_prefix_tokens = size, self.classifier.prefix
        self.reset_classifier(num_classes)
        self.classifier.apply(narrow)

    @property
    def body(self) -> Encoder:
        return self.classifier

    def heads(self) -> dict[str, nn.Module | None]:
        width, classes = self.head_hidden_size, self.num_classes
        return {"fc": nn.Linear(width, classes) if classes else nn.Identity()}

    def trunk(self, x: Tensor, count: int, take: Collection[int] = ()) -> tuple[Any, list[Any]]:
        maps = self.tokenizer.maps(x)
        grid = (maps.shape[2], maps.shape[3])
        x = self.classifier.embed(maps.flatten(2).mT, grid)
        found = []
        for i, block in enumerate(self.classifier.blocks[:count]):
            x = self.run(block, x)
            if i in take:
                found.append((x, grid))
        return (x, grid), found

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, C) of normed tokens; the pooled vector (B, D) with `pre_logits`."""
        x = self.classifier.pool(x) if self.global_pool else x
        y: Tensor = x if pre_logits else self.classifier.fc(x)
        return y

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.classifier.fc

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer decay."""
        return {
            "stem": r"^tokenizer|^classifier\.(?:positional_emb|class_emb)",
            "blocks": [(r"^classifier\.blocks\.(\d+)", None), (r"^classifier\.norm", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Parameters that are not decayed."""
        return {"classifier.positional_emb", "classifier.class_emb"}


def _grid_of(tokenizer: Tokenizer, size: tuple[int, int]) -> tuple[int, int]:
    """(h, w) of the tokens of images of this size, by the arithmetic of convolution and pooling."""
    h, w = size
    for module in tokenizer.modules():
        if isinstance(module, (nn.Conv2d, nn.MaxPool2d)):
            side, step, pad = (_one(v) for v in (module.kernel_size, module.stride, module.padding))
            h, w = ((n + 2 * pad - side) // step + 1 for n in (h, w))
    return h, w


def _one(value: Any) -> int:
    return int(value if isinstance(value, int) else value[0])
