"""Which heads a token uses and how much: the learned router, and the one that reads query norms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transom.errors import SettingsError


class Gates(NamedTuple):
    """What a router decides for tokens (B, N).

    Attributes:
        gate: (B, N, H), the weight of each head; 0 for those that are not chosen.
        probability: (B, N, E) of the routed heads, which are the last E; None when none is routed.
        mask: (B, N, E) bool, the routed heads that are chosen; None likewise.
    """

    gate: Tensor
    probability: Tensor | None
    mask: Tensor | None


def check_heads(heads: int, shared: int, routed: int) -> None:
    """Refuse numbers of heads that do not fit each other.

    Raises:
        SettingsError: see the message.
    """
    if not 0 <= shared <= heads:
        raise SettingsError(f"{shared} heads are shared; expected 0 to {heads}, all there are")
    if routed == 0 and shared < heads:
        raise SettingsError(
            f"no head is routed, but {heads - shared} of {heads} are not shared, so nothing could "
            "choose them; share all heads or route at least 1"
        )
    if not 0 <= routed <= heads - shared:
        raise SettingsError(
            f"{routed} routed heads are active; expected at most {heads - shared}, those that are "
            "not shared"
        )


class Router(nn.Module):
    """Two-stage routing with weights that belong to the attention around it.

    Within a group the weights are a softmax, times the number of active heads of that group, and
    the groups are balanced by another softmax, times 2; with logits of zero every active head has
    the weight 1. It has no parameters, so that those have their official names; hooks on it see
    the :class:`Gates` of a call.

    Args:
        heads: H.
        shared: S, the first heads, which are always on.
        routed: K, of the other E = H - S, that a token uses.
    """

    def __init__(self, heads: int, shared: int, routed: int) -> None:
        super().__init__()
        check_heads(heads, shared, routed)
        self.heads, self.shared, self.routed = heads, shared, routed

    def extra_repr(self) -> str:
        return f"heads={self.heads}, shared={self.shared}, routed={self.routed}"

    def forward(
        self, x: Tensor, wg: nn.Module | None, wg_0: nn.Module | None, wg_1: nn.Module | None
    ) -> Gates:
        """Gates of tokens x (B, N, C).

        Args:
            x: what enters the projection to q, k and v.
            wg: C to E; None when no head is routed.
            wg_0: C to 2; None unless there are shared and routed heads.
            wg_1: C to S; None for S of 0 or 1.
        """
        parts, probability, mask = [], None, None
        group = None if wg_0 is None else 2 * wg_0(x).softmax(-1)
        if self.shared:
            even = x.new_ones(*x.shape[:-1], 1)
            share = even if wg_1 is None else self.shared * wg_1(x).softmax(-1)
            parts.append(share if group is None else group[..., :1] * share)
        if wg is not None:
            probability = wg(x).softmax(-1)
            mask = top(probability, self.routed)
            kept = probability * mask
            least = torch.finfo(kept.dtype).eps
            kept = self.routed * kept / kept.sum(-1, keepdim=True).clamp(min=least)
            parts.append(kept if group is None else group[..., 1:] * kept)
        return Gates(torch.cat(parts, -1), probability, mask)


class NormRouter(nn.Module):
    """Routing without parameters, for attention that was trained without any.

    A routed head is chosen where the norm of its query is among the K largest; weights are 0 and 1.
    The official score is that norm over its standard deviation among the heads of the token, in a
    softmax, which changes no order. Norms do not change under rotary embedding.

    Args:
        shared: S, the first heads, which are always on; or their part of all heads, a float.
        routed: K, of the others, that a token uses; or the part of the heads that is on, shared
            ones included, a float.
        straight_through: let the gradient of the softmax pass through the hard choice.
    """

    def __init__(self, shared: float, routed: float, straight_through: bool = False) -> None:
        super().__init__()
        self.shared, self.routed, self.straight_through = shared, routed, straight_through

    def extra_repr(self) -> str:
        return f"shared={self.shared}, routed={self.routed}"

    def forward(self, q: Tensor) -> Gates:
        """Gates of queries q (B, H, N, d)."""
        heads = q.shape[1]
        shared, routed = int(self.shared), int(self.routed)
        if isinstance(self.shared, float):
            shared, routed = head_counts(heads, self.shared, self.routed)
        check_heads(heads, shared, routed)
        ones = q.new_ones(q.shape[0], q.shape[2], shared)
        if not routed:
            return Gates(ones, None, None)
        norm = q[:, shared:].norm(dim=-1).transpose(1, 2)  # (B, N, E)
        if norm.shape[-1] > 1:
            norm = norm / norm.std(-1, keepdim=True).clamp(min=torch.finfo(norm.dtype).tiny)
        probability = norm.softmax(-1)
        # by the norms: in half precision a softmax has ties where they have none
        mask = top(norm, routed)
        hard = mask.to(q.dtype)
        if self.straight_through:
            hard = hard + (probability - probability.detach())
        return Gates(torch.cat([ones, hard], -1), probability, mask)

    @property
    def passes(self) -> bool:
        """Whether heads that are not chosen get a gradient now, and so have to be computed."""
        return self.straight_through and torch.is_grad_enabled()


def head_counts(heads: int, shared: float, active: float) -> tuple[int, int]:
    """S and K from parts of all heads; at least one head is routed unless all are shared.

    Args:
        heads: H.
        shared: part of the heads that is always on.
        active: part that is on for a token, shared ones included.
    """
    always = round(shared * heads)
    if always == heads:
        return heads, 0
    return always, max(round(active * heads) - always, 1)


def top(probability: Tensor, count: int) -> Tensor:
    """(…, E) bool: the `count` largest of each row."""
    places = probability.detach().topk(count, -1).indices
    return torch.zeros_like(probability, dtype=torch.bool).scatter(-1, places, True)


def add_router(owner: Any, dim: int, heads: int, shared: int, routed: int) -> None:
    """Give an attention its router and the linear maps of it, by their official names.

    Args:
        owner: a module without `wg`, `wg_0`, `wg_1` and `router`.
        dim: C of what enters it.
        heads, shared, routed: as for :class:`Router`.
    """
    owner.router = Router(heads, shared, routed)
    owner.wg = nn.Linear(dim, heads - shared, bias=False) if routed else None
    owner.wg_0 = nn.Linear(dim, 2, bias=False) if routed and shared else None
    owner.wg_1 = nn.Linear(dim, shared, bias=False) if shared > 1 else None


def route(owner: Any, x: Tensor) -> Gates:
    """Gates of an attention with :func:`add_router` for its input x (B, N, C)."""
    gates: Gates = owner.router(x, owner.wg, owner.wg_0, owner.wg_1)
    return gates


def load_balance(probability: Tensor, mask: Tensor) -> Tensor:
    """E² · mean over heads of (mean probability · part of tokens that chose the head).

    Perfect balance gives K. The official training adds 0.01 times the mean over layers.

    Args:
        probability: (B, N, E).
        mask: (B, N, E) bool.

    Returns:
        A scalar.
    """
    heads = probability.shape[-1]
    mean = probability.flatten(0, -2).mean(0)
    part = mask.to(mean.dtype).flatten(0, -2).mean(0)
    return heads**2 * (mean * part).mean()


@contextmanager
def routed(model: nn.Module) -> Iterator[list[Gates]]:
    """Collect the gates of every call inside this context, layer by layer.

    Args:
        model: with routers somewhere inside.

    Yields:
        A list that grows by one entry a layer and call.
    """
    seen: list[Gates] = []
    hooks = [router.register_forward_hook(_note(seen)) for router in routers(model)]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def _note(seen: list[Gates]) -> Any:
    def note(module: nn.Module, given: Any, gates: Gates) -> None:
        seen.append(gates)

    return note


def routers(model: nn.Module) -> list[Router | NormRouter]:
    """The routers in a model, in order."""
    return [m for m in model.modules() if isinstance(m, Router | NormRouter)]


@dataclass
class Usage:
    """How heads are used, over the calls that were counted.

    Attributes:
        tokens: number of them, by layer.
        chosen: (H,) a layer: part of the tokens that use each head.
        weight: (H,) a layer: mean gate of each head.
    """

    tokens: list[int] = field(default_factory=list)
    chosen: list[Tensor] = field(default_factory=list)
    weight: list[Tensor] = field(default_factory=list)

    def active(self) -> float:
        """Part of all (token, head) pairs that is used, over all layers."""
        pairs = sum(len(c) * n for c, n in zip(self.chosen, self.tokens, strict=True))
        used = sum(float(c.sum()) * n for c, n in zip(self.chosen, self.tokens, strict=True))
        return used / pairs

    def entropy(self) -> list[float]:
        """Evenness of the heads of each layer that not all tokens use; 1 is perfectly even."""
        found = []
        for chosen in self.chosen:
            part = chosen[chosen < 1]
            if len(part) < 2:
                found.append(1.0)
                continue
            p = (part / part.sum()).clamp(min=1e-12)
            even = torch.tensor(float(len(part))).log()
            found.append(float(-(p * p.log()).sum() / even))
        return found

    def table(self) -> list[list[str]]:
        """A line a layer: its number, the used part in percent a head, and its evenness."""
        rows = zip(self.chosen, self.entropy(), strict=True)
        return [
            [str(i), *(f"{100 * float(c):.0f}" for c in chosen), f"{even:.2f}"]
            for i, (chosen, even) in enumerate(rows)
        ]


@torch.no_grad()
def head_usage(model: nn.Module, batches: Sequence[Any]) -> Usage:
    """How a model with routers uses its heads on some inputs.

    Args:
        model: with routers somewhere inside; it is called as it is.
        batches: inputs of calls, at least one; a dictionary is passed by names.

    Returns:
        The report.

    Raises:
        SettingsError: the model has no routers, or there are no inputs.
    """
    layers = routers(model)
    if not layers or not batches:
        raise SettingsError(
            f"head_usage got a model with {len(layers)} routers and {len(batches)} inputs; "
            "expected a model with routed heads and at least one input"
        )
    usage = Usage()
    for _ in layers:
        usage.tokens.append(0)
        usage.chosen.append(torch.zeros(0))
        usage.weight.append(torch.zeros(0))
    hooks = [layer.register_forward_hook(_count(usage, i)) for i, layer in enumerate(layers)]
    try:
        for batch in batches:
            model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        for hook in hooks:
            hook.remove()
    for i, tokens in enumerate(usage.tokens):
        usage.chosen[i] /= max(tokens, 1)
        usage.weight[i] /= max(tokens, 1)
    return usage


def _count(usage: Usage, layer: int) -> Any:
    def count(module: nn.Module, given: Any, gates: Gates) -> None:
        gate = gates.gate.detach().flatten(0, -2).float().cpu()
        used = torch.ones_like(gate)
        if gates.mask is not None:
            mask = gates.mask.flatten(0, -2).float().cpu()
            used[:, -mask.shape[1] :] = mask
        first = not usage.tokens[layer]
        usage.tokens[layer] += len(gate)
        usage.chosen[layer] = used.sum(0) + (0 if first else usage.chosen[layer])
        usage.weight[layer] = gate.sum(0) + (0 if first else usage.weight[layer])

    return count
