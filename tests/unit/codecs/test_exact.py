"""Rounding and sums against float64 and loops."""

from __future__ import annotations

import pytest
import torch

from loratools.codecs.columns import as_column, borrow, in_order_sum, ratio, replace
from loratools.codecs.exact import divide, nearest_int_, round_half_away_, square_root


def around(points: torch.Tensor) -> torch.Tensor:
    """Return the points and their two neighbours among float32 numbers."""
    up, down = torch.tensor(torch.inf), torch.tensor(-torch.inf)
    return torch.cat([points, points.nextafter(up), points.nextafter(down)])


def test_half_is_rounded_away_from_zero() -> None:
    values = around(torch.arange(-300, 301) / 2)
    exact = values.double()
    expected = exact.sign() * (exact.abs() + 0.5).floor()
    assert torch.equal(round_half_away_(values.clone()).double(), expected)


def test_nearest_int_rounds_half_to_even_and_wraps_as_c_does() -> None:
    values = around(torch.arange(-300, 301) / 2)
    assert torch.equal(nearest_int_(values.clone()), values.double().round().int())
    assert nearest_int_(torch.tensor([torch.inf, -torch.inf])).tolist() == [-(2**22)] * 2


@pytest.mark.parametrize("columns", [1, 2, 7, 64, 1000])
@pytest.mark.parametrize("rows", [16, 32])
def test_sums_add_rows_from_first_to_last(rows: int, columns: int) -> None:
    values = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(columns)
    for row in values:
        expected = expected + row
    for view in (as_column, lambda tensor: tensor):
        found = torch.empty(columns)
        in_order_sum(view(values), view(found))
        assert torch.equal(found, expected)
    assert rows == 16 or columns < 64 or not torch.equal(values.sum(0), expected)


def test_quotients_and_roots_are_correctly_rounded() -> None:
    values = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 0.1
    exact = values.double()
    out = torch.empty_like(values)
    for view in (as_column, lambda tensor: tensor):
        ratio(63.0, view(values), view(out))
        assert torch.equal(out, (63.0 / exact).float())
    assert torch.equal(divide(63.0, values), (63.0 / exact).float())
    assert torch.equal(divide(values, 63.0), (exact / 63.0).float())
    assert torch.equal(square_root(values), exact.sqrt().float())


def test_replacing_where_a_mask_is_set() -> None:
    mask = torch.tensor([True, False, True])
    for view in (as_column, lambda tensor: tensor):
        target = torch.zeros(3)
        replace(view(target), view(mask), view(torch.arange(3.0) + 1))
        assert target.tolist() == [1, 0, 3]
        replace(view(target), view(mask), 9.0)
        assert target.tolist() == [9, 0, 9]
        index = torch.zeros(3, dtype=torch.int8)
        replace(view(index), view(mask), 7)
        assert index.tolist() == [7, 0, 7]


def test_borrowed_memory_is_one_thread_s_own() -> None:
    from concurrent.futures import ThreadPoolExecutor

    mine = borrow(torch.empty(0), 4, 8)
    with ThreadPoolExecutor(1) as pool:
        theirs = pool.submit(borrow, torch.empty(0), 4, 8).result()
    assert mine.shape == theirs.shape == (4, 8)
    assert mine.data_ptr() != theirs.data_ptr()
    assert borrow(torch.empty(0), 32).data_ptr() == mine.data_ptr()
