"""Routed heads in the attention of a host."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from transom.errors import FitError, SettingsError
from transom.hosts.base import Host
from transom.hosts.projected import Projected, expect
from transom.papers.attention.moh.routing import (
    Gates,
    NormRouter,
    Router,
    add_router,
    head_counts,
    load_balance,
    route,
    routers,
)
from transom.papers.attention.moh.skipping import Path, attend
from transom.projections import Projections
from transom.registry import Method, Training
from transom.slots import Ask, Fill
from transom.tokens import Record


class RoutedMixer(Projected):
    """Mixer: the host's attention from its projections, with a learned router on the heads.

    Args:
        given: the host's projections.
        shared, active: as in :class:`MoH`.
        path: likewise.
        rng: what the router begins with is drawn from it.
    """

    def __init__(
        self, given: Projections, shared: float, active: float, path: Path, rng: torch.Generator
    ) -> None:
        super().__init__(given)
        self.path = path
        dim = given.q[0].shape[1]
        add_router(self, dim, given.heads, *head_counts(given.heads, shared, active))
        for linear in (self.wg, self.wg_0, self.wg_1):
            if isinstance(linear, nn.Linear):
                drawn = torch.randn(linear.weight.shape, generator=rng) * 0.02
                linear.weight.data = drawn.to(given.q[0])

    def forward(self, h: Tensor, ask: Ask) -> Tensor:
        """Mixed tokens (B, N, D) of normed ones."""
        gates = route(self, h)

        def gated(
            q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None, scale: float, **_: Any
        ) -> Tensor:
            return attend(q, k, v, gates, bias, scale, path=self.path)

        ask.operator = gated
        q, k, v = self.split(h)
        return self.join(ask.attend(q, k, v, dropout=0.0, scale=q.shape[-1] ** -0.5))


class QueryRouted(nn.Module):
    """Attention operator: heads are chosen by the norms of their queries.

    Args:
        shared, active, path, straight_through: as in :class:`MoH`.
    """

    def __init__(self, shared: float, active: float, path: Path, straight_through: bool) -> None:
        super().__init__()
        self.path = path
        self.router = NormRouter(shared, active, straight_through)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        bias: Tensor | None,
        scale: float,
        record: Record | None,
        ask: Ask | None = None,
    ) -> Tensor:
        """Heads (B, H, N, d) of q (B, H, N, d) and k, v (B, H, M, d)."""
        path: Path = "dense" if self.router.passes else self.path
        return attend(q, k, v, self.router(q), bias, scale, path=path)


class BalanceTraining(Training):
    """Adds the load-balance loss of all learned routers.

    Args:
        coefficient: of the mean over layers.
    """

    def __init__(self, coefficient: float = 0.01) -> None:
        if coefficient < 0:
            raise SettingsError(f"coefficient is {coefficient}; expected at least 0")
        self.coefficient = coefficient
        self.seen: list[Gates] = []
        self.hooks: list[Any] = []

    def at_step(self, model: nn.Module, step: int, total: int) -> Mapping[str, Any]:
        self.seen.clear()
        if step == total:
            for hook in self.hooks:
                hook.remove()
            self.hooks.clear()
        elif not self.hooks:
            own = [r for r in routers(model) if isinstance(r, Router)]
            self.hooks = [router.register_forward_hook(self._note) for router in own]
        return {}

    def extra_loss(self, model: nn.Module, outputs: Tensor) -> Tensor | None:
        terms = [
            load_balance(g.probability, g.mask)
            for g in self.seen
            if g.probability is not None and g.mask is not None
        ]
        self.seen.clear()
        return self.coefficient * torch.stack(terms).mean() if terms else None

    def _note(self, module: nn.Module, given: Any, gates: Gates) -> None:
        # not again when checkpointing recomputes a block in the backward pass
        if module.training and gates.gate.requires_grad:
            self.seen.append(gates)


@dataclass(frozen=True)
class MoH(Method):
    """Mixture of heads.

    Attributes:
        shared: part of the heads that is always on.
        active: part of the heads that is on for a token, shared ones included.
        router: "learned" weighs heads by what enters the attention, which is rebuilt from the
            host's projections; "query" switches them by the norms of their queries, without new
            parameters, between the host's own projections (the form for continued training).
        host: which part of a model is meant, an "encoder" or a "decoder" (router "query" only).
        path: whether heads that are not chosen are left out; "auto" where that is faster.
        straight_through: with router "query", let gradients pass through the hard choice.
        seed: of what learned routers begin with.
    """

    shared: float = 0.25
    active: float = 0.75
    router: Literal["learned", "query"] = "learned"
    host: Literal["encoder", "decoder"] = "encoder"
    path: Literal["auto", "dense", "skip"] = "auto"
    straight_through: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.shared <= self.active <= 1 or not self.active:
            raise SettingsError(
                f"shared is {self.shared} and active {self.active}; expected 0 ≤ shared ≤ active "
                "≤ 1 and some heads that are active"
            )
        if self.router == "learned" and (self.host == "decoder" or self.straight_through):
            raise SettingsError(
                "a learned router fits encoders and needs no straight-through gradient; give "
                "router='query' with host='decoder' or straight_through=True"
            )
        object.__setattr__(self, "takes", self.host)

    @property
    def needs_training(self) -> bool:
        """Whether routers are there to be trained."""
        return self.router == "learned"

    def fit(self, host: Host) -> list[Fill]:
        if self.router == "query":
            settings = float(self.shared), float(self.active), self.path, self.straight_through
            return [Fill(attention=QueryRouted(*settings)) for _ in range(host.depth)]
        instead = "fit it with router='query'"
        if host.follows:
            raise FitError(
                f"moh rebuilds attention from its projections, but positions enter every attention "
                f"of this {host.family} host; {instead}"
            )
        rng = torch.Generator().manual_seed(self.seed)
        given = [expect(view, "moh", instead) for view in host.views]
        return [
            Fill(mixer=RoutedMixer(one, self.shared, self.active, self.path, rng)) for one in given
        ]

    @classmethod
    def grid(cls, depth: int, patches: int) -> list[dict[str, Any]]:
        return [{"active": 0.75}, {"active": 0.5}, {"active": 0.5, "router": "query"}]

    @classmethod
    def neutral(cls) -> dict[str, Any]:
        return {"shared": 1.0, "active": 1.0, "router": "query"}

    def training(self, **options: Any) -> Training:
        """The load-balance loss; the option is its `coefficient`, 0.01 by default."""
        unknown = sorted(set(options) - {"coefficient"})
        if unknown:
            raise SettingsError(f"moh has no training option {unknown[0]!r}; it has 'coefficient'")
        return BalanceTraining(**options)
