"""View of a layer of Hugging Face transformers; see :mod:`transom.hosts.hf_attention`."""

from __future__ import annotations

import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from transom.errors import TokensError
from transom.hosts.hf_attention import OUTPUTS, RELATIVE, Carried, Reach, affines, follow, register
from transom.hosts.hf_common import arguments, first
from transom.ops import rows
from transom.projections import Projections, affine
from transom.slots import Ask, BlockView


class HfBlock(BlockView):
    """View of a transformers layer: everything but the order of its norms.

    Attributes:
        module: the layer.
        reach: its attention.
        bare: leading tokens that the host's rotary tables leave out.
        causal: whether a token sees only those before it.
    """

    causal: ClassVar[bool] = False

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.reach = Reach(module, name, self.causal)
        self.own, _ = arguments(module)
        self.bare = 0
        self.returns_tuple = _returns_tuple(module)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        register()  # a fitted model may be unpickled where nothing was fitted yet

    def projections(self) -> Projections | None:
        outer: Any
        outer, inner = self.reach.modules(self.module)
        to_q, to_k, to_v = affines(inner)
        outs = [getattr(inner, n) for n in OUTPUTS if hasattr(inner, n)]
        outs += [outer.output.dense] if hasattr(getattr(outer, "output", None), "dense") else []
        width = getattr(inner, "head_dim", None) or getattr(inner, "attention_head_size", None)
        if width is None or len(outs) != 1 or to_q[0].shape != to_k[0].shape:
            return None
        return Projections(to_q[0].shape[0] // width, to_q, to_k, to_v, affine(outs[0]))

    def given(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """The arguments of the block by their names in its own signature."""
        return {**dict(zip(self.own, args, strict=False)), **kwargs}

    def attend(self, h: Tensor, ask: Ask, *args: Any, **kwargs: Any) -> Tensor:
        given = self.given(args, kwargs)
        mask = given.pop("attention_mask", None)
        # what the block hands on: arguments it shares with its attention, and those it only passes
        reach, taken = self.reach, set(self.reach.takes)
        passed = {k: v for k, v in given.items() if k in taken or k not in self.own}
        attention = getattr(self.module, reach.outer)
        tables = given.get("position_embeddings")
        made = given.get(RELATIVE[0])
        if made is not None and ask.record is not None:
            total = ask.record.layout.count
            if made.shape[-1] != total:
                raise TokensError(
                    f"the host made positions for {made.shape[-1]} tokens where they are reduced, "
                    f"but those of all {total} are needed; leave interpolate_pos_encoding out"
                )
        bias = self.bias(given, mask)
        if ask.plain and (tables is None or tables[0].dim() == 2):
            if reach.masks:
                passed["attention_mask"] = self.mask(bias, mask)
            return first(attention(h, **passed))
        if given.get("output_attentions"):
            raise TokensError(
                "a fitted block never makes its attention map, so output_attentions=True cannot be "
                "answered; remove the method first"
            )
        carried = Carried(ask, None if bias is None else follow(bias, ask.home))
        passed.pop("position_bias", None)
        if tables is not None and (ask.home is not None or tables[0].dim() == 3):
            passed["position_embeddings"], carried.rotary = self._rotary(tables, ask.home, h)
        passed[reach.carrier] = carried
        return first(attention(h, **passed))

    def bias(self, given: dict[str, Any], mask: Tensor | None) -> Tensor | None:
        """(B or 1, H, N0, N0) that this block adds to its logits; None for none."""
        return given.get("position_bias")

    def mask(self, bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
        """The mask that the host's own attention gets."""
        return mask

    def _rotary(
        self, tables: tuple[Tensor, Tensor], home: Tensor | None, h: Tensor
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]]:
        """Tables that rotate by nothing, for the host, and those of the current tokens, for us."""
        _, inner = self.reach.modules(self.module)
        half = sys.modules[type(inner).__module__].__dict__["rotate_half"]
        cos, sin = tables
        if self.bare:
            still = cos.new_ones(*cos.shape[:-2], self.bare, cos.shape[-1])
            cos = torch.cat([still, cos], -2)
            sin = torch.cat([torch.zeros_like(still), sin], -2)
        if home is not None:
            batched = cos.dim() == 3
            cos, sin = (rows.take(x, home) if batched else x[home] for x in (cos, sin))
        else:
            cos, sin = (x if x.dim() == 3 else x[None] for x in (cos, sin))
        one = cos.new_ones(h.shape[1], cos.shape[-1])
        return (one, torch.zeros_like(one)), (cos[:, None], sin[:, None], half)

    def depart(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return (x,) if self.returns_tuple else x

    def valid(self, *args: Any, **kwargs: Any) -> Tensor | None:
        mask = self.given(args, kwargs).get("attention_mask")
        if mask is None or mask.shape[-1] == 1:  # one number for all keys masks none of them
            return None
        same = mask == mask[:, :1, :1]
        if not torch.compiler.is_compiling() and not same.all():
            raise TokensError(
                "the attention mask of this call differs between queries; a fitted method can "
                "only carry a padding mask along, which is the same for all of them"
            )
        row = mask[:, 0, 0]
        return row if row.dtype == torch.bool else row >= 0

    def checkpoint(self) -> Callable[..., Any] | None:
        module: Any = self.module
        if module.training and getattr(module, "gradient_checkpointing", False):
            return module._gradient_checkpointing_func
        return None


def _returns_tuple(block: nn.Module) -> bool:
    """Whether the source of a block's forward ends by returning a tuple.

    Annotations do not tell: some promise a tuple and return a tensor.
    """
    try:
        source = inspect.getsource(inspect.unwrap(type(block).forward))
    except (OSError, TypeError):
        return False  # the run inside apply will tell
    names: dict[str, bool] = {}
    answer = False
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            names[name] = names.get(name, False) or _is_tuple(node.value)
    for node in ast.walk(ast.parse(textwrap.dedent(source))):
        if isinstance(node, ast.Return) and node.value is not None:
            value = node.value
            answer = names.get(value.id, False) if isinstance(value, ast.Name) else _is_tuple(value)
    return answer


def _is_tuple(value: ast.expr) -> bool:
    if isinstance(value, ast.BinOp):
        return _is_tuple(value.left) or _is_tuple(value.right)
    return isinstance(value, ast.Tuple)
