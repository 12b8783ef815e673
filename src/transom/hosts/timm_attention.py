"""The attention modules of timm's transformers, made to answer an :class:`~transom.slots.Ask`.

Each class below is put over one attention module as its forward. A plain call goes to the module's
own forward; everything else is computed with the module's own parts, in its own order. Positions
that enter the attention (rotary embeddings, relative position biases) are taken from where each
token stood in the original sequence. Tested with timm 1.0.31.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transom.errors import HostError, TokensError
from transom.hosts.base import parts
from transom.slots import Ask


class Answer:
    """Forward of an attention module that answers an ask.

    Attributes:
        module: whose parts are used.
        known: children and parameters the module may have.
        needed: attributes it must have.
    """

    known: ClassVar[tuple[str, ...]] = ()
    needed: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module

    def __call__(self, x: Tensor, *args: Any, transom: Ask | None = None, **kwargs: Any) -> Tensor:
        if transom is None or transom.plain:
            return type(self.module).forward(self.module, x, *args, **kwargs)
        return self.answer(x, transom, *args, **kwargs)

    def answer(self, x: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        """Attention over x (B, N, D) as asked, projection included."""
        raise NotImplementedError

    @property
    def dropout(self) -> float:
        """Probability of dropout on the attention weights now."""
        return self.module.attn_drop.p if self.module.training else 0.0

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v (B, H, N, d) of one fused projection, or of three."""
        m = self.module
        batch, count, _ = x.shape
        if m.qkv is None:
            q, k, v = (project(x) for project in (m.q_proj, m.k_proj, m.v_proj))
            width = q.shape[-1] // m.num_heads  # k and v may have fewer heads
            q, k, v = (t.unflatten(-1, (-1, width)).transpose(1, 2) for t in (q, k, v))
            return q, k, v
        if getattr(m, "q_bias", None) is None:
            qkv = m.qkv(x)
        else:
            bias = torch.cat((m.q_bias, m.k_bias, m.v_bias))
            apart = m.qkv_bias_separate
            qkv = m.qkv(x) + bias if apart else F.linear(x, m.qkv.weight, bias)
        q, k, v = qkv.reshape(batch, count, 3, m.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def project(self, out: Tensor, gate: Tensor | None = None) -> Tensor:
        """Heads (B, H, N, d) to features (B, N, D), through norm, gate and projection."""
        m = self.module
        out = out.transpose(1, 2).flatten(2)
        norm = getattr(m, "norm", None)
        if norm is not None:
            out = norm(out)
        if gate is not None:
            out = out * gate
        return m.proj_drop(m.proj(out))

    def gate(self, x: Tensor) -> Tensor | None:
        """Gate (B, N, D) of what leaves the attention; None without one."""
        gate = getattr(self.module, "gate", None)
        return None if gate is None else gate(x).sigmoid()


COMMON = ("qkv", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop")


class Standard(Answer):
    """Answers for timm's Attention."""

    known = COMMON
    needed = ("qkv", "q_norm", "k_norm", "proj", "num_heads", "scale")

    def answer(
        self, x: Tensor, ask: Ask, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        refuse_mask(attn_mask, is_causal)
        m = self.module
        q, k, v = self.split(x)
        q, k = m.q_norm(q), m.k_norm(k)
        out = ask.attend(q, k, v, dropout=self.dropout, scale=m.scale)
        return self.project(out, self.gate(x))


class Rotary(Answer):
    """Answers for AttentionRope and EvaAttention; rotations follow their tokens."""

    known = (*COMMON, "q_proj", "k_proj", "v_proj", "q_bias", "v_bias")
    needed = ("qkv", "q_norm", "k_norm", "proj", "num_heads", "scale", "num_prefix_tokens")

    def answer(
        self,
        x: Tensor,
        ask: Ask,
        rope: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        refuse_mask(attn_mask, is_causal)
        m = self.module
        q, k, v = self.split(x)
        q, k = m.q_norm(q), m.k_norm(k)
        if rope is not None:
            if ask.moved:
                rope = rotations_at(rope, _home(ask), m.num_prefix_tokens)
            q, k = (self._rotate(t, rope).type_as(v) for t in (q, k))
        groups = getattr(m, "num_kv_groups", 1)
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        out = ask.attend(q, k, v, dropout=self.dropout, scale=m.scale)
        return self.project(out, self.gate(x))

    def _rotate(self, t: Tensor, rope: Tensor) -> Tensor:
        from timm.layers import apply_rot_embed_cat

        front = self.module.num_prefix_tokens
        options = {"half": True} if getattr(self.module, "rotate_half", False) else {}
        turned = apply_rot_embed_cat(t[:, :, front:], rope, **options)
        return torch.cat([t[:, :, :front], turned], 2)


class Relative(Answer):
    """Answers for the attention of Beit and of RelPosBlock; biases follow their tokens."""

    known = (*COMMON, "rel_pos", "q_bias", "v_bias", "relative_position_bias_table")
    needed = ("qkv", "proj", "num_heads", "scale")

    def answer(
        self,
        x: Tensor,
        ask: Ask,
        shared_rel_pos: Tensor | None = None,
        shared_rel_pos_bias: Tensor | None = None,
    ) -> Tensor:
        m = self.module
        q, k, v = self.split(x)
        if hasattr(m, "q_norm"):
            q, k = m.q_norm(q), m.k_norm(k)
        bias = self._bias(shared_rel_pos, shared_rel_pos_bias)
        if bias is not None:
            bias = bias.unsqueeze(0) if bias.dim() == 3 else bias
            if ask.moved:
                bias = biases_at(bias, _home(ask))
        out = ask.attend(q, k, v, dropout=self.dropout, scale=m.scale, bias=bias)
        return self.project(out)

    def _bias(self, shared: Tensor | None, added: Tensor | None) -> Tensor | None:
        m = self.module
        if getattr(m, "rel_pos", None) is not None:
            return m.rel_pos.get_bias()  # RelPosAttention lets its own replace the shared one
        if getattr(m, "relative_position_bias_table", None) is not None:
            own = m._get_rel_pos_bias()
            return own if added is None else own + added
        return shared if added is None else added


class Differential(Answer):
    """Answers for DiffAttention: pairs of heads, the second subtracted from the first."""

    LAMBDAS = ("lambda_a", "lambda_b", "lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2")
    known = (*COMMON, "sub_norm", *LAMBDAS)
    needed = ("qkv", "q_norm", "k_norm", "sub_norm", "proj", "num_heads", "head_dim", "scale")

    def answer(
        self, x: Tensor, ask: Ask, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        refuse_mask(attn_mask, is_causal)
        q, k, v = self.module.qkv(x).chunk(3, -1)
        return self.project(differential(self.module, q, k, v, ask))


def differential(
    m: Any, q: Tensor, k: Tensor, v: Tensor, ask: Ask, bias: Tensor | None = None
) -> Tensor:
    """Differential attention with the parts of `m`.

    Args:
        m: a DiffAttention, or a block that holds its parts.
        q, k, v: (B, N, D) as projected.
        ask: what is asked; told how much each head counts.
        bias: a mask of the host, broadcastable to (B, H, N, N).

    Returns:
        (B, H, N, 2d), normed and scaled.
    """
    batch, count, _ = q.shape
    q, k = (
        norm(t.reshape(batch, count, 2 * m.num_heads, m.head_dim).transpose(1, 2))
        for norm, t in ((m.q_norm, q), (m.k_norm, k))
    )
    v = v.reshape(batch, count, m.num_heads, 2 * m.head_dim).transpose(1, 2)
    weight = m._compute_lambda().type_as(q)
    # what a token gets from another is the difference of the two maps
    ask.share = torch.stack([torch.ones_like(weight), -weight]).repeat(m.num_heads) / m.num_heads
    dropout = m.attn_drop.p if m.training else 0.0
    v = v.repeat_interleave(2, 1)
    out = ask.attend(q, k, v, dropout=dropout, scale=m.scale, bias=bias)
    out = out[:, ::2] - weight * out[:, 1::2]
    return m.sub_norm(out) * (1 - m.lambda_init)


class TalkingHeads(Answer):
    """Answers for TalkingHeadAttn: heads mixed before and behind the softmax.

    The mathematics is the matrix, so no fused kernel is left out. A key that stands for s tokens
    gets log s behind the first mixing; the bias of the second, which every key gets, counts s
    times.
    """

    known = ("qkv", "attn_drop", "proj", "proj_l", "proj_w", "proj_drop")
    needed = ("qkv", "proj", "proj_l", "proj_w", "num_heads", "scale")

    def answer(self, x: Tensor, ask: Ask) -> Tensor:
        m = self.module
        q, k, v = self.split(x)
        ask.answered = True
        if ask.keep:
            ask.q, ask.k, ask.scale = q, k, m.scale
        logits = m.proj_l(((q * m.scale) @ k.mT).permute(0, 2, 3, 1))  # (B, N, N, H)
        bias = None if ask.bias is None else ask.bias[:, 0, :, :, None]  # (B, 1, N, 1)
        if bias is not None:
            logits = logits + bias
        mixed = m.proj_w(logits.softmax(2))
        if bias is not None and m.proj_w.bias is not None:
            mixed = mixed + m.proj_w.bias * (bias.exp() - 1)
        out = m.attn_drop(mixed.permute(0, 3, 1, 2)) @ v
        return self.project(out)


ANSWERS: dict[str, type[Answer]] = {
    "Attention": Standard,
    "AttentionRope": Rotary,
    "EvaAttention": Rotary,
    "RelPosAttention": Relative,
    "DiffAttention": Differential,
    "TalkingHeadAttn": TalkingHeads,
}


def answer_for(module: nn.Module, name: str) -> Answer:
    """What is put over an attention module of timm.

    Args:
        module: the attention.
        name: its path, for messages.

    Raises:
        HostError: its class is not known, or it holds a part that is not.
    """
    cls = type(module)
    kind = ANSWERS.get(cls.__name__)
    if kind is Standard and hasattr(module, "relative_position_bias_table"):
        kind = Relative  # Beit calls its attention by the same name
    # a stranger of the same name may compute something else
    if kind is None or not cls.__module__.startswith("timm."):
        raise HostError(
            f"{name} is a {cls.__module__}.{cls.__name__}; transom knows the forward of timm's "
            f"{sorted(ANSWERS)}, and would have to guess what this one computes"
        )
    missing = [part for part in kind.needed if not hasattr(module, part)]
    if missing:
        raise HostError(f"{name} ({cls.__name__}) has no {missing[0]!r}; expected {kind.needed}")
    parts(module, kind.known, name, parameters=True)
    return kind(module)


def refuse_mask(mask: Tensor | None, is_causal: bool = False) -> None:
    """Refuse a mask that is left after padding was seen to.

    Args:
        mask: additive or boolean, of the original tokens.
        is_causal: whether the call asks for a causal mask.

    Raises:
        TokensError: tokens that a fitted method moves do not fit the mask.
    """
    if is_causal or mask is not None:
        raise TokensError(
            "this call has an attention mask that is no padding mask, but a fitted method reduces "
            "or reweights the tokens the mask was made for; call the model without a mask, or "
            "remove the method"
        )


def padding(mask: Tensor) -> Tensor | None:
    """The padding that an attention mask stands for.

    Args:
        mask: boolean (True is seen) or additive, (B, 1, 1, N), or (B, 1, N, N) in which padding
            neither sees nor is seen.

    Returns:
        (B, N) bool, False for padding; None when the mask is something else.
    """
    # a compiled call cannot look at values
    if mask.dim() != 4 or mask.shape[1] != 1 or torch.compiler.is_compiling():
        return None
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and (mask[~seen] > -1e4).any():
        return None  # what is neither seen nor hidden is a bias
    if seen.shape[2] == 1:
        return seen[:, 0, 0]
    valid = seen[:, 0].diagonal(dim1=-2, dim2=-1)
    pairs = valid[:, :, None] & valid[:, None]
    return valid if torch.equal(seen[:, 0], pairs) else None


def left_to_obey(mask: Tensor, ask: Ask) -> Tensor | None:
    """The mask that an attention still has to obey: padding travels with the tokens instead."""
    return mask if ask.plain or padding(mask) is None else None


def _home(ask: Ask) -> Tensor:
    if ask.home is None:
        raise HostError(
            "tokens moved, but where they stood was not recorded, so this host's positions "
            "cannot follow them; please report the model"
        )
    return ask.home


def rotations_at(rope: Tensor, home: Tensor, prefix: int) -> Tensor:
    """The rotations of the current patch tokens.

    Args:
        rope: (P, d), (H, P, d) or (B, 1 or H, P, d), of the original patches.
        home: (B, N) original positions, prefix included.
        prefix: leading tokens that are not rotated.

    Returns:
        (B, 1 or H, N - prefix, d).
    """
    place = home[:, prefix:] - prefix
    batch, count = place.shape
    if rope.dim() < 4:
        rows = rope.index_select(-2, place.reshape(-1))
        if rope.dim() == 2:
            return rows.view(batch, 1, count, -1)
        return rows.view(len(rope), batch, count, -1).transpose(0, 1)
    index = place[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[-1])
    return rope.expand(batch, -1, -1, -1).gather(2, index)


def biases_at(bias: Tensor, home: Tensor) -> Tensor:
    """The biases between the current tokens.

    Args:
        bias: (1, H, N0, N0) between the original tokens.
        home: (B, N) original positions.

    Returns:
        (B, H, N, N).
    """
    heads, total = bias.shape[1:3]
    batch, count = home.shape
    pairs = home[:, :, None] * total + home[:, None]  # (B, N, N)
    found = bias.reshape(heads, total * total).index_select(1, pairs.reshape(-1))
    return found.view(heads, batch, count, count).transpose(0, 1)
