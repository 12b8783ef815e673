"""The blocks of timm's transformers as the flow sees them.

Everything a block may hold is listed with its view; a part that is not listed is refused by name.
Tested with timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transom.errors import HostError
from transom.hosts.base import parts
from transom.hosts.timm_attention import (
    Relative,
    Rotary,
    Standard,
    answer_for,
    differential,
    left_to_obey,
    padding,
    refuse_mask,
)
from transom.projections import Projections, affine, fused
from transom.slots import Ask, BlockView, Part


class TimmBlock(BlockView):
    """View of a pre-norm block.

    Block, EvaBlock, RelPosBlock, Beit's Block, LayerScaleBlock, DeepseekVitBlock. What scales a
    branch is a module (`ls1`) or a parameter (`gamma_1`), or nothing.

    Attributes:
        module: the block.
        parallel: whether `attend` holds the ffn as well.
    """

    native = True
    parallel: ClassVar[bool] = False
    known: ClassVar[tuple[str, ...]] = (
        *("norm1", "attn", "ls1", "gamma_1", "drop_path1", "drop_path"),
        *("norm2", "mlp", "ls2", "gamma_2", "drop_path2"),
    )
    needed: ClassVar[tuple[str, ...]] = ("norm1", "attn", "norm2", "mlp")

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module: Any = module
        missing = [part for part in self.needed if not hasattr(module, part)]
        if missing:
            raise HostError(
                f"{name} ({type(module).__name__}) has no {missing[0]!r}; expected the parts "
                f"{list(self.needed)}"
            )
        parts(module, self.known, name, parameters=True)
        self.answers = [answer_for(m, f"{name}.{path}") for path, m in self._attentions()]
        self.drop = [self._first(f"drop_path{i}", "drop_path") for i in (1, 2)]
        self.scale = [self._first(f"ls{i}", f"gamma_{i}") for i in (1, 2)]

    def _attentions(self) -> Iterator[tuple[str, nn.Module]]:
        yield "attn", self.module.attn

    def _first(self, *names: str) -> str | None:
        return next((n for n in names if getattr(self.module, n, None) is not None), None)

    def _branch(self, y: Tensor, i: int) -> Tensor:
        """What block does to branch i before it is added."""
        scale, drop = self.scale[i], self.drop[i]
        if scale is not None:
            by = getattr(self.module, scale)
            y = by(y) if isinstance(by, nn.Module) else by * y
        return y if drop is None else getattr(self.module, drop)(y)

    def norm1(self, x: Tensor) -> Tensor:
        return self.module.norm1(x)

    def attend(
        self, h: Tensor, ask: Ask, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        if attn_mask is not None:
            kwargs["attn_mask"] = left_to_obey(attn_mask, ask)
        return self._attend(h, ask, *args, **kwargs)

    def _attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        return self.module.attn(h, *args, transom=ask, **kwargs)

    def residual1(self, y: Tensor) -> Tensor:
        return self._branch(y, 0)

    def norm2(self, x: Tensor) -> Tensor:
        return self.module.norm2(x)

    def ffn(self, h: Tensor) -> Tensor:
        return self.module.mlp(h)

    def residual2(self, y: Tensor) -> Tensor:
        return self._branch(y, 1)

    def part(self, name: Part) -> nn.Module | None:
        return getattr(self.module, {"attention": "attn", "ffn": "mlp"}.get(name, name), None)

    def projections(self) -> Projections | None:
        m = getattr(self.module, "attn", None)
        if m is None or type(self.answers[0]) not in (Standard, Rotary, Relative):
            return None
        if m.qkv is None:
            q, k, v = (affine(linear) for linear in (m.q_proj, m.k_proj, m.v_proj))
        else:
            bias = m.qkv.bias
            if getattr(m, "q_bias", None) is not None:
                bias = torch.cat((m.q_bias, m.k_bias, m.v_bias))
            q, k, v = fused(m.qkv.weight, bias)
        return Projections(m.num_heads, q, k, v, affine(m.proj))

    def refuse(
        self, *args: Any, attn_mask: Tensor | None = None, is_causal: bool = False, **kwargs: Any
    ) -> None:
        padded = attn_mask is not None and padding(attn_mask) is not None
        refuse_mask(None if padded else attn_mask, is_causal)

    def valid(self, *args: Any, attn_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        valid = None if attn_mask is None else padding(attn_mask)
        return None if valid is None or valid.all() else valid


class ResPostBlock(TimmBlock):
    """View of a block that norms what attention and ffn return, not what they get."""

    def part(self, name: Part) -> nn.Module | None:
        return None if name.startswith("norm") else super().part(name)

    def norm1(self, x: Tensor) -> Tensor:
        return x

    def residual1(self, y: Tensor) -> Tensor:
        return self._branch(self.module.norm1(y), 0)

    def norm2(self, x: Tensor) -> Tensor:
        return x

    def residual2(self, y: Tensor) -> Tensor:
        return self._branch(self.module.norm2(y), 1)


class ParallelThingsBlock(TimmBlock):
    """View of a block with several attentions side by side, and then several ffns.

    The heads of all attentions count as heads of one.
    """

    known = ("attns", "ffns")
    needed = ("attns", "ffns")

    def _attentions(self) -> Iterator[tuple[str, nn.Module]]:
        for i, branch in enumerate(self.module.attns):
            parts(branch, ("norm", "attn", "ls", "drop_path"), f"attns.{i}", parameters=True)
            yield f"attns.{i}.attn", branch.attn

    def norm1(self, x: Tensor) -> Tensor:
        return x

    def _attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        outs = []
        heads: dict[str, list[Tensor]] = {"q": [], "k": [], "share": []}
        for branch in self.module.attns:
            out = branch.attn(branch.norm(h), *args, transom=ask, **kwargs)
            outs.append(branch.drop_path(branch.ls(out)))
            for name, seen in heads.items():
                if getattr(ask, name) is not None:
                    seen.append(getattr(ask, name))
        if ask.keep:
            ask.q, ask.k = torch.cat(heads["q"], 1), torch.cat(heads["k"], 1)
            ask.share = torch.cat(heads["share"]) / len(outs) if heads["share"] else None
        return torch.stack(outs).sum(0)

    def residual1(self, y: Tensor) -> Tensor:
        return y

    def norm2(self, x: Tensor) -> Tensor:
        return x

    def ffn(self, h: Tensor) -> Tensor:
        return torch.stack([branch(h) for branch in self.module.ffns]).sum(0)

    def residual2(self, y: Tensor) -> Tensor:
        return y


class ParallelScalingBlock(TimmBlock):
    """View of a block whose attention and ffn read the same tokens and are added together.

    Nothing lies between them, so the token step comes behind the sum: the tokens that leave the
    block are reduced by the keys of its attention. ParallelScalingBlock and
    DiffParallelScalingBlock hold their attention themselves.
    """

    parallel = True
    known = (
        *("in_norm", "in_proj", "mlp_bias", "q_norm", "k_norm", "attn_drop", "mlp_drop"),
        *("mlp_act", "out_proj", "attn_out_proj", "mlp_out_proj", "ls", "drop_path"),
        *("sub_norm", "lambda_a", "lambda_b"),
        *("lambda_q1", "lambda_k1", "lambda_q2", "lambda_k2"),
    )
    needed = ("in_norm", "in_proj", "in_split", "q_norm", "k_norm", "ls", "drop_path")

    def _attentions(self) -> Iterator[tuple[str, nn.Module]]:
        return iter(())

    def norm1(self, x: Tensor) -> Tensor:
        return self.module.in_norm(x)

    def _attend(
        self,
        h: Tensor,
        ask: Ask,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if not ask.plain:
            refuse_mask(attn_mask, is_causal)
        elif is_causal:
            attn_mask = h.new_ones(h.shape[1], h.shape[1], dtype=torch.bool).tril()
        m = self.module
        hidden, q, k, v = m.in_proj(h).split(m.in_split, -1)
        if m.mlp_bias is not None:
            hidden = hidden + m.mlp_bias
        out = self._heads(q, k, v, ask, attn_mask).transpose(1, 2).flatten(2)
        hidden = m.mlp_drop(m.mlp_act(hidden))
        if getattr(m, "out_proj", None) is not None:
            return m.out_proj(torch.cat([out, hidden], -1))
        return m.attn_out_proj(out) + m.mlp_out_proj(hidden)

    def _heads(self, q: Tensor, k: Tensor, v: Tensor, ask: Ask, mask: Tensor | None) -> Tensor:
        m = self.module
        if hasattr(m, "sub_norm"):
            return differential(m, q, k, v, ask, mask)
        q, k, v = (t.unflatten(-1, (m.num_heads, -1)) for t in (q, k, v))  # (B, N, H, d)
        q, k, v = (t.transpose(1, 2) for t in (m.q_norm(q), m.k_norm(k), v))
        dropout = m.attn_drop.p if m.training else 0.0
        return ask.attend(q, k, v, dropout=dropout, scale=m.scale, bias=mask)

    def residual1(self, y: Tensor) -> Tensor:
        return self.module.drop_path(self.module.ls(y))


VIEWS: dict[str, type[TimmBlock]] = {
    "Block": TimmBlock,
    "EvaBlock": TimmBlock,
    "RelPosBlock": TimmBlock,
    "LayerScaleBlock": TimmBlock,
    "DeepseekVitBlock": TimmBlock,
    "ResPostBlock": ResPostBlock,
    "ResPostRelPosBlock": ResPostBlock,
    "EvaBlockPostNorm": ResPostBlock,
    "ParallelThingsBlock": ParallelThingsBlock,
    "ParallelScalingBlock": ParallelScalingBlock,
    "DiffParallelScalingBlock": ParallelScalingBlock,
}


def view_of(block: nn.Module, name: str) -> TimmBlock:
    """The view of one of timm's blocks.

    Args:
        block: the block.
        name: its path, for messages.

    Raises:
        HostError: its class is not known, or a part of it is not.
    """
    kind = VIEWS.get(type(block).__name__)
    if kind is None:
        raise HostError(
            f"{name} is a {type(block).__name__}; of timm's blocks transom fits {sorted(VIEWS)}, "
            "and cannot know in which order another one runs its parts"
        )
    return kind(block, name)
