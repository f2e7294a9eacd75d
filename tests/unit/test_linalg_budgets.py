"""Budgets over several matrices against every choice there is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.linalg.budgets import Ladder, reach_share, spend_budget

GAINS = st.lists(st.floats(0.01, 10), min_size=1, max_size=4).map(
    lambda found: torch.tensor(sorted(found, reverse=True), dtype=torch.float64)
)


def ladders(costs: st.SearchStrategy[float]) -> st.SearchStrategy[list[Ladder]]:
    return st.lists(st.builds(Ladder, GAINS, costs), min_size=1, max_size=4)


EQUAL = ladders(st.just(1.0))
UNEQUAL = ladders(st.integers(1, 9).map(float))


def gain(choice: tuple[int, ...], steps: list[Ladder]) -> float:
    return math.fsum(float(s.gains[:n].sum()) for n, s in zip(choice, steps, strict=True))


def cost(choice: tuple[int, ...], steps: list[Ladder]) -> float:
    return sum(n * s.cost for n, s in zip(choice, steps, strict=True))


def choices(steps: list[Ladder]) -> list[tuple[int, ...]]:
    """Return every choice of at least one step of each ladder."""
    return list(itertools.product(*(range(1, len(s.gains) + 1) for s in steps)))


def best(steps: list[Ladder], budget: float) -> float:
    return max(gain(c, steps) for c in choices(steps) if cost(c, steps) <= budget)


@given(EQUAL, st.integers(0, 12))
@settings(max_examples=60)
def test_equal_costs_are_spent_optimally(steps: list[Ladder], spare: int) -> None:
    budget = len(steps) + spare
    found = tuple(spend_budget(steps, budget))
    assert cost(found, steps) <= budget
    assert gain(found, steps) == pytest.approx(best(steps, budget))


@given(UNEQUAL, st.integers(0, 15))
@settings(max_examples=60)
def test_unequal_costs_miss_less_than_one_step(steps: list[Ladder], spare: int) -> None:
    budget = sum(s.cost for s in steps) + spare
    found = tuple(spend_budget(steps, budget))
    assert cost(found, steps) <= budget
    left_out = [float(s.gains[n]) for n, s in zip(found, steps, strict=True) if n < len(s.gains)]
    short = best(steps, budget) - gain(found, steps)
    assert short <= max(left_out, default=0.0) + 1e-9
    # What was spent before the first step that did not fit is spent as well as can be.
    prefix = tuple(_prefix(steps, budget))
    assert gain(prefix, steps) == pytest.approx(best(steps, cost(prefix, steps)))
    assert gain(found, steps) >= gain(prefix, steps) - 1e-12


def _prefix(steps: list[Ladder], budget: float) -> list[int]:
    """Take the densest step again and again, and stop at the first that does not fit."""
    taken = [1] * len(steps)
    while True:
        left = budget - cost(tuple(taken), steps)
        open_ = [n for n, s in enumerate(steps) if taken[n] < len(s.gains)]
        if not open_:
            return taken
        top = max(open_, key=lambda n: float(steps[n].gains[taken[n]]) / steps[n].cost)
        if steps[top].cost > left:
            return taken
        taken[top] += 1


@given(EQUAL, st.floats(0.05, 1))
@settings(max_examples=60)
def test_a_share_is_reached_at_the_least_cost(steps: list[Ladder], share: float) -> None:
    whole = gain(tuple(len(s.gains) for s in steps), steps)
    found = tuple(reach_share(steps, share))
    assert gain(found, steps) >= share * whole * (1 - 1e-9)
    cheaper = [c for c in choices(steps) if cost(c, steps) < cost(found, steps)]
    assert all(gain(c, steps) < share * whole * (1 + 1e-9) for c in cheaper)


@given(UNEQUAL, st.floats(0.05, 1))
@settings(max_examples=60)
def test_a_share_costs_at_most_one_step_too_much(steps: list[Ladder], share: float) -> None:
    whole = gain(tuple(len(s.gains) for s in steps), steps)
    found = tuple(reach_share(steps, share))
    enough = [c for c in choices(steps) if gain(c, steps) >= share * whole * (1 - 1e-9)]
    assert found in enough
    assert cost(found, steps) <= min(cost(c, steps) for c in enough) + max(s.cost for s in steps)


def test_gain_per_cost_decides() -> None:
    """The step of more gain costs nine times as much as each of four that gain more together."""
    dear = Ladder(torch.tensor([9.0, 8.0], dtype=torch.float64), 9.0)
    cheap = Ladder(torch.tensor([9.0, 4.0, 4.0, 4.0], dtype=torch.float64), 1.0)
    assert spend_budget([dear, cheap], 19) == [1, 4]
    assert spend_budget([dear, cheap], 22) == [2, 4]
    assert reach_share([dear, cheap], 30 / 38) == [1, 4]


def test_steps_without_gain_are_never_taken() -> None:
    still = Ladder(torch.zeros(3, dtype=torch.float64), 1.0)
    some = Ladder(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64), 1.0)
    assert spend_budget([still, some], 100) == [1, 2]
    assert reach_share([still, some], 1.0) == [1, 2]
    assert spend_budget([], 5) == []
