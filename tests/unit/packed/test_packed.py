"""Every scheme of several tensors, against a loop over its elements."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch

from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight

from .loops import CASES, Case


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    torch.manual_seed(len(request.param))
    return CASES[request.param]()


def ranges(weight: PackedWeight) -> Iterator[tuple[int, int]]:
    """Three ranges of rows that the weight allows."""
    step = weight.row_step
    middle = min(step * max(1, weight.rows // step // 2), weight.rows)
    yield from {(0, weight.rows), (0, middle), (middle, weight.rows)} - {(weight.rows,) * 2}


def test_decoding_agrees_with_a_loop(case: Case) -> None:
    weight, pick = case.weight, random.Random(0)
    whole = weight.decode(0, weight.rows)
    assert whole.shape == (weight.rows, weight.columns)
    assert whole.dtype == torch.float32
    places = [(r, c) for r in range(weight.rows) for c in range(weight.columns)]
    for row, column in pick.sample(places, min(400, len(places))):
        expected = case.element(row, column)
        assert float(whole[row, column]) == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_ranges_of_rows_are_the_rows_of_the_whole(case: Case) -> None:
    weight = case.weight
    whole = weight.decode(0, weight.rows)
    for start, stop in ranges(weight):
        assert torch.equal(weight.decode(start, stop), whole[start:stop])


def test_codes_and_grid_say_what_decoding_says(case: Case) -> None:
    weight = case.weight
    for start, stop in ranges(weight):
        grid, codes = weight.grid(start, stop), weight.codes(start, stop)
        assert codes.dtype == torch.uint8
        assert bool((grid.levels.diff() >= 0).all())
        assert_close(grid.values(codes), weight.decode(start, stop))


def test_storing_the_same_codes_changes_nothing(case: Case) -> None:
    weight = case.weight
    before = weight.decode(0, weight.rows)
    for start, stop in ranges(weight):
        for patch in weight.patches(weight.codes(start, stop), start):
            patch.apply(weight.parts)
    assert torch.equal(weight.decode(0, weight.rows), before)


def test_stored_codes_are_decoded_again(case: Case) -> None:
    weight = case.weight
    expected = weight.decode(0, weight.rows)
    for start, stop in ranges(weight):
        grid = weight.grid(start, stop)
        codes = random_codes(grid, weight, stop - start)
        expected[start:stop] = grid.values(codes)
        for patch in weight.patches(codes, start):
            patch.apply(weight.parts)
        assert_close(weight.decode(0, weight.rows), expected)


def random_codes(grid: Grid, weight: PackedWeight, rows: int) -> torch.Tensor:
    return torch.randint(0, len(grid.levels), (rows, weight.columns)).to(torch.uint8)


def assert_close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6)
