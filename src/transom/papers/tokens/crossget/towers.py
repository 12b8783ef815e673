"""CLIP with a cross token in each tower: the trained, modality-independent form of CrossGET.

Parameters have CLIP's names (OpenAI's release), with `cross_image` (1, L, C) and `cross_text`
(1, L, C) beside the blocks. :func:`from_transformers` fills a :class:`CrossCLIP` from a CLIPModel.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import SettingsError, TokensError
from transom.ops import attention, matching, merging


class Encoded(NamedTuple):
    """What a tower returns.

    feature: (B, E), projected, not normalised.
    cross: (L·B, E) cross tokens of all layers, projected with detached weights; None in evaluation.
    size: (B, N, 1) original tokens each token stands for behind the last layer.
    ids: (B, N) merged token ids; None in the image tower.
    """

    feature: Tensor
    cross: Tensor | None
    size: Tensor
    ids: Tensor | None = None


class LayerNorm(nn.LayerNorm):
    """Layer norm that computes in float32 at least, as CLIP's does."""

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self.weight, self.bias, self.eps)


def normed(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last dimension, in float32 at least."""
    precise = torch.promote_types(x.dtype, torch.float32)
    out = F.layer_norm(x.to(precise), x.shape[-1:], weight.to(precise), bias.to(precise), eps)
    return out.to(x.dtype)


class QuickGELU(nn.Module):
    """x·σ(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class Mlp(nn.Sequential):
    """CLIP's feed-forward network: c_fc, gelu, c_proj."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.add_module("c_fc", nn.Linear(width, 4 * width))
        self.add_module("gelu", act)
        self.add_module("c_proj", nn.Linear(4 * width, width))


class SelfAttention(nn.Module):
    """Multi-head attention that hands out q and k as they are before the split into heads."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise SettingsError(f"heads is {heads}; expected a divisor of the width {width}")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(self, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mixed tokens, queries and keys, each (B, N, C); `bias` is added to the logits."""
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)

        def split(part: Tensor) -> Tensor:
            return part.unflatten(-1, (self.heads, -1)).transpose(1, 2)

        y = attention.attend(split(q), split(k), split(v), bias)
        return self.out_proj(y.transpose(1, 2).flatten(2)), q, k


class Block(nn.Module):
    """One layer of CLIP with the reduction between attention and ffn."""

    def __init__(self, width: int, heads: int, eps: float, act: nn.Module) -> None:
        super().__init__()
        self.attn = SelfAttention(width, heads)
        self.ln_1 = LayerNorm(width, eps)
        self.mlp = Mlp(width, act)
        self.ln_2 = LayerNorm(width, eps)

    def forward(
        self, x: Tensor, size: Tensor, ids: Tensor | None, r: int, *, causal: bool, stable: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Tokens, sizes and ids behind the layer.

        Args:
            x: (B, N, C), the cross token last.
            size: (B, N, 1).
            ids: (B, N) token ids, the largest of which ends the text; None for images.
            r: tokens to remove.
            causal: whether tokens see only those before them.
            stable: ties of the matching by position.
        """
        bias = attention.key_bias(size, None, x.dtype)
        assert bias is not None
        if causal:
            count = x.shape[1]
            later = torch.ones(count, count, dtype=torch.bool, device=x.device).triu(1)
            bias = bias.masked_fill(later, -torch.inf)
        y, q, k = self.attn(self.ln_1(x), bias)
        x = x + y
        if r > 0:
            x, size, ids = reduce(x, q.detach(), k.detach(), size, ids, r, stable=stable)
        return x + self.mlp(self.ln_2(x)), size, ids


def reduce(
    x: Tensor,
    query: Tensor,
    key: Tensor,
    size: Tensor,
    ids: Tensor | None,
    r: int,
    *,
    stable: bool = True,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cross-guided matching and ensemble of one layer.

    Args:
        x: (B, N, C).
        query, key: (B, N, c), all heads side by side. The guide is the query of the last token,
            or of the end of the text.
        size: (B, N, 1).
        ids: (B, N) token ids; their largest is the end of the text. None for images.
        r: tokens to remove.
        stable: ties of the matching by position; False is what the released code does, which
            matches in float32 and leaves ties to the sort of the machine.

    Returns:
        x, size and ids of N - r tokens in their old order.
    """
    found, importance = match(query, key, ids, r, stable=stable)
    total = merging.merged_size(size, found, size.dtype)
    shares = matching.guided_shares(found, importance)
    if ids is not None:
        # the mean over all a token stands for, so that the largest id stays where the text ends
        ids = merging.merge(ids[..., None].to(size.dtype), found, "mean", size, total)[..., 0]
    return merging.ensemble(x, found, shares, size, total), total, ids


def match(
    query: Tensor, key: Tensor, ids: Tensor | None, r: int, *, stable: bool = True
) -> tuple[matching.Matching, Tensor]:
    """The matching of :func:`reduce` and the importance (B, N) it is guided by."""
    if not stable:  # the sort of the machine is another one for another dtype
        query, key = query.float(), key.float()
    if ids is None:
        guide, end = query[:, -1:], None
    else:
        end = ids.argmax(-1)
        guide = query[torch.arange(len(ids), device=ids.device), end][:, None]
    importance = matching.guided_importance(key, guide)
    reserved = matching.Reserved(1, 1, end)
    return matching.complete(key, r, importance, reserved, stable=stable), importance


class Transformer(nn.Module):
    """The layers of a tower and its cross tokens.

    Attributes:
        r: tokens to remove in each layer; 0 keeps all, and the cross token is there all the same.
        stable: ties of the matching by position; False leaves them to the sort of the machine.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        cross: str,
        r: int = 0,
        eps: float = 1e-5,
        *,
        causal: bool = False,
        stable: bool = True,
        act: type[nn.Module] = QuickGELU,
    ) -> None:
        super().__init__()
        if isinstance(r, bool) or not isinstance(r, int) or r < 0:
            raise SettingsError(f"r is {r!r}; expected tokens to remove a layer: an integer >= 0")
        self.r, self.causal, self.stable, self._cross = r, causal, stable, cross
        self.resblocks = nn.ModuleList(Block(width, heads, eps, act()) for _ in range(layers))
        self.register_parameter(cross, nn.Parameter(torch.zeros(1, layers, width)))

    def forward(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor, Encoded]:
        """Tokens behind the last layer, cross tokens (L·B, C), and sizes and ids.

        Args:
            x: (B, N, C), whose last token is replaced by the cross token of each layer.
            ids: (B, N) token ids; None for images.
        """
        learned = self.get_parameter(self._cross)
        size = torch.ones_like(x[..., :1])
        item = torch.arange(x.shape[0], device=x.device)
        crosses = []
        for i, block in enumerate(self.resblocks):
            place = -1 if ids is None else ids.argmax(-1)
            cross = x[item, place].detach() + learned[:, i]
            crosses.append(cross)
            x = torch.cat([x[:, :-1], cross[:, None]], 1)
            x, size, ids = block(x, size, ids, self.r, causal=self.causal, stable=self.stable)
        return x, torch.cat(crosses), Encoded(x, None, size, ids)


class CrossVision(nn.Module):
    """CLIP's image tower with a cross token and r tokens fewer a layer.

    Raises:
        SettingsError: patch_size does not divide input_resolution, or r is no number of tokens.
    """

    def __init__(
        self,
        input_resolution: int,
        patch_size: int,
        width: int,
        layers: int,
        heads: int,
        output_dim: int,
        r: int = 0,
        norm_eps: float = 1e-5,
        *,
        stable: bool = True,
        act: type[nn.Module] = QuickGELU,
    ) -> None:
        super().__init__()
        if input_resolution % patch_size:
            raise SettingsError(
                f"patch_size is {patch_size}; expected a divisor of the image size "
                f"{input_resolution}"
            )
        patches = (input_resolution // patch_size) ** 2
        self.input_resolution = input_resolution
        self.conv1 = nn.Conv2d(3, width, patch_size, patch_size, bias=False)
        self.class_embedding = nn.Parameter(width**-0.5 * torch.randn(width))
        self.positional_embedding = nn.Parameter(width**-0.5 * torch.randn(patches + 1, width))
        self.ln_pre = LayerNorm(width, norm_eps)
        self.transformer = Transformer(
            width, layers, heads, "cross_image", r, norm_eps, stable=stable, act=act
        )
        self.ln_post = LayerNorm(width, norm_eps)
        self.proj = nn.Parameter(width**-0.5 * torch.randn(width, output_dim))

    def forward(self, image: Tensor) -> Encoded:
        """Features of images (B, 3, H, W).

        Raises:
            TokensError: the images have another size than the position table.
        """
        if image.shape[-2:] != (self.input_resolution,) * 2:
            raise TokensError(
                f"images are {tuple(image.shape[-2:])} pixels; the position table is made for "
                f"{self.input_resolution}x{self.input_resolution}: resize them"
            )
        patches = self.conv1(image).flatten(2).mT
        front = self.class_embedding.to(patches.dtype).expand(len(patches), 1, -1)
        x = torch.cat([front, patches], 1) + self.positional_embedding.to(patches.dtype)
        x = self.ln_pre(torch.cat([x, x[:, :1]], 1))
        x, cross, left = self.transformer(x)
        shown = None
        if self.training:
            # the released code norms with ln_pre here, not with ln_post
            shown = project(cross, self.ln_pre, self.proj)
        return Encoded(self.ln_post(x[:, 0]) @ self.proj, shown, left.size)


def project(cross: Tensor, norm: nn.LayerNorm, projection: Tensor) -> Tensor:
    """Cross tokens (L·B, C) in the joint space (L·B, E); no gradient to norm and projection."""
    weight, bias = norm.weight.detach(), norm.bias.detach()
    return normed(cross, weight, bias, norm.eps) @ projection.detach()


class CrossText(nn.Module):
    """CLIP's text tower with a cross token and r tokens fewer a layer.

    The end of a text is its largest token id, as in CLIP's vocabulary.
    """

    def __init__(
        self,
        context_length: int,
        vocab: int,
        width: int,
        layers: int,
        heads: int,
        embed_dim: int,
        r: int = 0,
        norm_eps: float = 1e-5,
        *,
        stable: bool = True,
        act: type[nn.Module] = QuickGELU,
    ) -> None:
        super().__init__()
        self.context_length = context_length
        self.token_embedding = nn.Embedding(vocab, width)
        self.positional_embedding = nn.Parameter(0.01 * torch.randn(context_length, width))
        self.transformer = Transformer(
            width, layers, heads, "cross_text", r, norm_eps, causal=True, stable=stable, act=act
        )
        self.ln_final = LayerNorm(width, norm_eps)
        self.text_projection = nn.Parameter(width**-0.5 * torch.randn(width, embed_dim))
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_text(self, text: Tensor) -> Encoded:
        """Features of texts.

        Args:
            text: (B, context_length) token ids, padded with ids below the end of the text.

        Raises:
            TokensError: the texts have another length.
        """
        if text.dim() != 2 or text.shape[1] != self.context_length:
            raise TokensError(
                f"text is {tuple(text.shape)}; expected (B, {self.context_length}): pad it"
            )
        x = self.token_embedding(text)
        x = x + self.positional_embedding.to(x.dtype)
        item = torch.arange(len(x), device=x.device)
        end = text.argmax(-1)
        x = torch.cat([x, x[item, end][:, None]], 1)
        # the cross token has the id of the first token, which never is the largest
        precise = torch.promote_types(x.dtype, torch.float32)
        ids = torch.cat([text, text[:, :1]], 1).to(precise)
        x, cross, left = self.transformer(x, ids)
        assert left.ids is not None
        feature = self.ln_final(x)[item, left.ids.argmax(-1)] @ self.text_projection
        shown = project(cross, self.ln_final, self.text_projection) if self.training else None
        return Encoded(feature, shown, left.size, left.ids)

    def forward(self, text: Tensor) -> Encoded:
        return self.encode_text(text)


class CrossCLIP(CrossText):
    """Both towers; their depth has to be the same for the alignment of cross tokens.

    Args:
        visual: the image tower.
        text: arguments of :class:`CrossText`.
    """

    def __init__(self, visual: CrossVision, **text: Any) -> None:
        super().__init__(**text)
        self.visual = visual
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, image: Tensor) -> Encoded:
        """Features of images (B, 3, H, W)."""
        encoded: Encoded = self.visual(image)
        return encoded

    def forward(self, image: Tensor, text: Tensor) -> tuple[Encoded, Encoded]:  # type: ignore[override]
        return self.encode_image(image), self.encode_text(text)

    def loss(
        self, image: Tensor, text: Tensor, same: Tensor | None = None, weight: float = 0.5
    ) -> Tensor:
        """Contrastive loss and alignment of the cross tokens: (1 - w)·L + w·L_kd.

        Args:
            image: (B, 3, H, W).
            text: (B, context_length).
            same: (B,) number of the picture each pair belongs to; pairs of one picture are all
                right. None when all differ.
            weight: w, of the alignment.

        Raises:
            TokensError: the model is in evaluation, where no cross tokens are kept.
        """
        pictures, texts = self(image, text)
        if pictures.cross is None or texts.cross is None:
            raise TokensError("cross tokens are kept only in training; call train() first")
        scale = self.logit_scale.clamp(0, 4.6052).exp()
        similar = scale * F.normalize(pictures.feature) @ F.normalize(texts.feature).mT
        ids = torch.arange(len(image), device=image.device) if same is None else same
        right = (ids[:, None] == ids).to(similar.dtype)
        right = right / right.sum(1, keepdim=True)
        contrast = (F.cross_entropy(similar, right) + F.cross_entropy(similar.mT, right)) / 2
        return (1 - weight) * contrast + weight * alignment_loss(pictures.cross, texts.cross)


def alignment_loss(image: Tensor, text: Tensor) -> Tensor:
    """Symmetric distance of the cross tokens of both towers from their mean distribution.

    With I, T the two softmaxes and q = (I + T)/2, not detached: [KL(q‖I) + KL(q‖T)]/2, summed
    over features and averaged over rows.

    Args:
        image, text: (L·B, E).

    Returns:
        A scalar.

    Raises:
        TokensError: the towers gave different numbers of cross tokens.
    """
    if image.shape != text.shape:
        raise TokensError(
            f"cross tokens are {tuple(image.shape)} and {tuple(text.shape)}; both towers need the "
            "same depth and joint width"
        )
    log_image, log_text = image.log_softmax(-1), text.log_softmax(-1)
    mean = (log_image.exp() + log_text.exp()) / 2
    parts = [F.kl_div(log, mean, reduction="batchmean") for log in (log_image, log_text)]
    return (parts[0] + parts[1]) / 2
