"""The plan that loses least influence within a budget of keys.

The official search is an integer programme for a commercial solver. Here each layer may use at
most two rules, so all pairs of rules are enumerated: given prices of a key at each length, a layer
takes the cheapest pair and each of its heads the cheaper rule of the two. Prices are raised until
the budget holds at every length (Lagrangian relaxation), and what is left of it then buys the best
single changes. Without the limit of two rules the relaxation alone would be within one head of the
optimum; with it the result is good, not proven best.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import torch
from torch import Tensor

from transom.errors import SettingsError
from transom.papers.attention.moa.spans import Plan, Rule, density, layout, lost


def search(
    importance: Mapping[int, Tensor],
    rules: Sequence[Rule],
    *,
    budget: float | Mapping[int, float] = 0.5,
    lengths: Sequence[int] | None = None,
    weights: Mapping[int, float] | None = None,
    block: int = 64,
) -> Plan:
    """One plan.

    Args:
        importance: by profiled length, (layers, heads, n, n) sums of influence over blocks.
        rules: to choose from.
        budget: mean part of all keys that a head may attend to, at every one of `lengths`; or by
            length, which then says where it holds.
        lengths: where the budget holds; the profiled ones by default.
        weights: of the losses at the profiled lengths; equal by default.
        block: side of a block in tokens.

    Returns:
        A rule for each head of each layer, at most two different ones in a layer.

    Raises:
        SettingsError: no choice of rules keeps the budget.
    """
    if isinstance(budget, Mapping):
        limits = dict(budget)
    else:
        limits = dict.fromkeys(importance if lengths is None else lengths, budget)
    if not limits or not all(0 < part <= 1 for part in limits.values()):
        raise SettingsError(f"budget is {budget}; expected above 0, at most 1")
    loss = torch.zeros(())
    for length, found in importance.items():
        kept = torch.stack([layout(rule, length, block) for rule in rules])
        each = torch.stack([lost(layer, kept) for layer in found.double()])  # (L, H, R)
        total = sum(float(layer.tril().sum()) for layer in found.double())
        loss = loss + (1.0 if weights is None else weights[length]) * each / max(total, 1e-30)
    cost = torch.stack(
        [density(torch.stack([layout(r, n, block) for r in rules])) for n in limits]
    ).double()  # (lengths, R)
    limit = torch.tensor(list(limits.values()), dtype=torch.float64)
    tightest = (cost / limit[:, None]).amax(0)
    if float(tightest.min()) > 1:
        raise SettingsError(
            f"the narrowest of {len(rules)} rules keeps {float(tightest.min()):.2f} times the keys "
            f"that the budget {budget} allows; add rules with a shorter span"
        )
    choice = _priced(loss, cost, limit)
    choice = _spent(choice, loss, cost, limit)
    return Plan.of([[rules[int(i)] for i in layer] for layer in choice])


def pareto(
    importance: Mapping[int, Tensor], rules: Sequence[Rule], *, points: int = 5, **options: object
) -> list[Plan]:
    """Plans for different weights of the profiled lengths; the caller keeps the best at another.

    Args:
        importance, rules: see :func:`search`.
        points: weights tried for each length.
        **options: of :func:`search`.

    Returns:
        Different plans, in no order.
    """
    steps = [i / (points - 1) for i in range(points)] if points > 1 else [1.0]
    found: dict[Plan, None] = {}
    for weights in product(steps, repeat=len(importance)):
        if abs(sum(weights) - 1) < 1e-9 or len(importance) == 1:
            given = dict(zip(importance, weights, strict=True))
            if any(given.values()):
                found[search(importance, rules, weights=given, **options)] = None  # type: ignore[arg-type]
    return list(found)


def _best_pairs(price: Tensor) -> Tensor:
    """The cheapest choice (L, H) for prices (L, H, R) with at most two rules a layer."""
    layers = []
    for each in price:  # (H, R)
        pair = torch.minimum(each[:, :, None], each[:, None, :]).sum(0)
        first, second = divmod(int(pair.argmin()), each.shape[1])
        layers.append(torch.where(each[:, first] <= each[:, second], first, second))
    return torch.stack(layers)


def _used(choice: Tensor, cost: Tensor) -> Tensor:
    """Mean density at each length."""
    return cost[:, choice.flatten()].mean(1)


def _priced(loss: Tensor, cost: Tensor, budget: Tensor) -> Tensor:
    """The best choice that prices of keys lead to; budgets (lengths,)."""
    share = torch.full((len(cost),), 1 / len(cost), dtype=torch.float64)
    cheapest = int((cost / budget[:, None]).amax(0).argmin())
    best = torch.full(loss.shape[:2], cheapest)
    for _ in range(10 if len(cost) > 1 else 1):
        low, high = 0.0, 1.0
        while True:
            choice = _best_pairs(loss + high * (share @ cost))
            if bool((_used(choice, cost) <= budget).all()) or high > 1e12:
                break
            high *= 4
        for _ in range(30):
            price = (low + high) / 2
            choice = _best_pairs(loss + price * (share @ cost))
            if bool((_used(choice, cost) <= budget).all()):
                high = price
                if _sum(choice, loss) < _sum(best, loss):
                    best = choice
            else:
                low = price
        # keys become dearer at the lengths where most of them are in use
        share = share * (4 * _used(choice, cost) / budget).exp()
        share = share / share.sum()
    return best


def _sum(choice: Tensor, loss: Tensor) -> float:
    return float(loss.gather(2, choice[..., None]).sum())


def _spent(choice: Tensor, loss: Tensor, cost: Tensor, budget: Tensor) -> Tensor:
    """Changes of one head's rule that lose less and still keep the budget, the best one first."""
    choice = choice.clone()
    heads = choice.numel()
    for _ in range(heads * 4):
        used = _used(choice, cost)
        now = loss.gather(2, choice[..., None])
        gain = now - loss  # (L, H, R)
        more = (cost[:, None, None, :] - cost[:, choice][..., None]) / heads
        fits = (used[:, None, None, None] + more <= budget[:, None, None, None] + 1e-12).all(0)
        gain = gain.masked_fill(~fits, 0)
        for i, layer in enumerate(choice):
            kinds = layer.unique()
            if len(kinds) > 1:
                other = torch.ones(loss.shape[2], dtype=torch.bool)
                other[kinds] = False
                gain[i][:, other] = 0
        best = int(gain.argmax())
        if float(gain.flatten()[best]) <= 0:
            break
        layer_, rest = divmod(best, loss.shape[1] * loss.shape[2])
        head, rule = divmod(rest, loss.shape[2])
        choice[layer_, head] = rule
    return choice
