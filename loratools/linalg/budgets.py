"""Which singular values of many matrices to keep when all of them share one budget.

A ladder is one matrix's choice: ``gains`` (k,), not increasing, is what each further rank adds
(σ², or σ² by a weight), and every step costs the same ``cost``. Keeping the steps of most gain per
cost, over all ladders pooled, is the greedy solution of a knapsack whose fractional relaxation it
solves exactly, because gains decrease along each ladder:

  * of all choices that cost no more than the steps taken before the first one that did not fit,
    none gains more (with equal costs, of all choices within the budget);
  * otherwise the optimum gains less than that one step more.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Ladder:
    """One matrix's steps.

    Attributes:
        gains: (k,), float64, not increasing, not negative.
        cost: of each step, positive.
    """

    gains: Tensor
    cost: float


def spend_budget(ladders: Sequence[Ladder], budget: float, least: int = 1) -> list[int]:
    """Return how many steps of each ladder to take so that their cost is at most ``budget``.

    The first ``least`` steps of every ladder are taken whatever they cost; steps without gain
    never are. A step that does not fit ends its ladder, and cheaper ones of others still may.
    """
    taken = [least] * len(ladders)
    left = budget - least * sum(ladder.cost for ladder in ladders)
    closed: set[int] = set()
    for number, _ in _by_density(ladders, least):
        cost = ladders[number].cost
        if number in closed or cost > left:
            closed.add(number)
            continue
        taken[number] += 1
        left -= cost
    return taken


def reach_share(ladders: Sequence[Ladder], share: float, least: int = 1) -> list[int]:
    """Return how many steps of each ladder reach ``share`` of all gains, at the least cost.

    No choice of at most its cost, less the last step's, reaches the share.
    """
    taken = [least] * len(ladders)
    whole = sum(float(ladder.gains.sum()) for ladder in ladders)
    reached = sum(float(ladder.gains[:least].sum()) for ladder in ladders)
    # Sums in another order differ in the last places.
    wanted = share * whole * (1 - 1e-12)
    for number, gain in _by_density(ladders, least):
        if reached >= wanted:
            break
        taken[number] += 1
        reached += gain
    return taken


def _by_density(ladders: Sequence[Ladder], least: int) -> Iterator[tuple[int, float]]:
    """Yield (ladder, gain) of every step beyond the first ones, most gain per cost first."""
    rest = [ladder.gains[least:] for ladder in ladders]
    if not rest:
        return
    gains = torch.cat(rest)
    counts = torch.tensor([len(steps) for steps in rest])
    numbers = torch.arange(len(ladders)).repeat_interleave(counts)
    costs = torch.tensor([ladder.cost for ladder in ladders], dtype=torch.float64)
    order = (gains / costs[numbers]).sort(descending=True, stable=True).indices
    order = order[gains[order] > 0]
    yield from zip(numbers[order].tolist(), gains[order].tolist(), strict=True)
