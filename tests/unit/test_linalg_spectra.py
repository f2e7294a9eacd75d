"""Rank rules and measures against loops over plain numbers."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loratools.linalg import spectra

VALUES = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=8).map(
    lambda found: torch.tensor(sorted(found, reverse=True), dtype=torch.float64)
)
SHARES = st.floats(0.01, 1)


def least(weights: list[float], share: float) -> int:
    """Return the least k whose first k weights are ``share`` of all, to rounding."""
    whole = math.fsum(weights)
    return next(
        k
        for k in range(1, len(weights) + 1)
        if math.fsum(weights[:k]) >= share * whole * (1 - 1e-12)
    )


def near_a_step(weights: list[float], share: float) -> bool:
    whole = math.fsum(weights)
    return any(
        abs(math.fsum(weights[:k]) - share * whole) <= 1e-9 * whole
        for k in range(1, len(weights) + 1)
    )


@given(VALUES, SHARES)
def test_shares(values: torch.Tensor, share: float) -> None:
    singles, squares = values.tolist(), [value**2 for value in values.tolist()]
    cases = (
        (spectra.energy_rank, squares, share),
        (spectra.cumulative_rank, singles, share),
        (spectra.fro_rank, squares, share**2),
    )
    for rule, weights, wanted in cases:
        if not near_a_step(weights, wanted):
            assert rule(values, share) == least(weights, wanted)


@given(VALUES, st.floats(1, 1e4))
def test_ratio(values: torch.Tensor, ratio: float) -> None:
    found = [value for value in values.tolist() if value > values[0].item() / ratio]
    assert spectra.ratio_rank(values, ratio) == max(1, len(found))


def test_exact_steps_are_reached() -> None:
    """The rank that just reaches a share is enough: 3 of 4, not one more."""
    values = torch.tensor([2.0, 1, 1, 0], dtype=torch.float64)
    assert spectra.cumulative_rank(values, 0.5) == 1
    assert spectra.cumulative_rank(values, 0.75) == 2
    assert spectra.cumulative_rank(values, 1) == 3
    assert spectra.ratio_rank(values, 2) == 1
    assert spectra.ratio_rank(values, 2.0001) == 3


@given(VALUES, st.integers(1, 8))
def test_what_is_kept_and_lost(values: torch.Tensor, rank: int) -> None:
    squares = [value**2 for value in values.tolist()]
    kept = math.fsum(squares[:rank]) / math.fsum(squares)
    lost = math.sqrt(math.fsum(squares[rank:]) / math.fsum(squares))
    assert spectra.retained_energy(values, rank) == pytest.approx(kept)
    assert spectra.truncation_error(values, rank) == pytest.approx(lost)


@pytest.mark.parametrize("count", [1, 2, 7])
def test_equal_values_have_their_number_for_rank(count: int) -> None:
    values = torch.cat([torch.full((count,), 3.0), torch.zeros(4)])
    assert spectra.effective_rank(values) == pytest.approx(count, rel=1e-6)
    assert spectra.stable_rank(values) == pytest.approx(count, rel=1e-6)


@given(VALUES)
def test_effective_rank_is_the_exponential_of_the_entropy(values: torch.Tensor) -> None:
    whole = math.fsum(values.tolist())
    shares = [value / whole for value in values.tolist()]
    entropy = -math.fsum(share * math.log(share) for share in shares)
    assert spectra.effective_rank(values) == pytest.approx(math.exp(entropy))


def test_zero_spectra() -> None:
    zero = torch.zeros(3)
    rules = (spectra.energy_rank, spectra.cumulative_rank, spectra.fro_rank)
    assert [rule(zero, 0.9) for rule in rules] == [1, 1, 1]
    assert spectra.ratio_rank(zero, 10) == 1
    assert spectra.effective_rank(zero) == spectra.stable_rank(zero) == 0
    assert spectra.retained_energy(zero, 1) == 1
    assert spectra.truncation_error(zero, 1) == 0
