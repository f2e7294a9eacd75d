"""The SVD of a product from its factors against the dense SVD in float64."""

from __future__ import annotations

import pytest
import torch

from loratools.errors import NonFiniteError
from loratools.linalg.factored import core_svd, factored_svd
from tests.strategies import make_tensor

SHAPES = [(40, 8, 30), (5, 8, 30), (40, 8, 3), (1, 4, 1), (16, 16, 16), (7, 1, 9)]


@pytest.mark.parametrize(("rows", "rank", "columns"), SHAPES)
@pytest.mark.parametrize("batch", [(), (3,)])
def test_is_the_dense_svd(rows: int, rank: int, columns: int, batch: tuple[int, ...]) -> None:
    up = make_tensor(1, *batch, rows, rank).double()
    down = make_tensor(2, *batch, rank, columns).double()
    dense = torch.linalg.svdvals(up @ down)
    for found in (core_svd(up, down).leading(up, down, rank), factored_svd(up, down)):
        count = min(rows, rank, columns)
        assert found.values.shape == (*batch, count)
        assert torch.allclose(found.values, dense[..., :count], rtol=1e-12)
        rebuilt = (found.left * found.values[..., None, :]) @ found.right
        assert torch.allclose(rebuilt, up @ down, atol=1e-12)
        unit = torch.eye(count, dtype=torch.float64).expand(*batch, -1, -1)
        assert torch.allclose(found.left.mT @ found.left, unit, atol=1e-10)
        assert torch.allclose(found.right @ found.right.mT, unit, atol=1e-10)


def test_more_triplets_and_the_transpose_are_of_the_same_product() -> None:
    up, down = make_tensor(1, 9, 3).double(), make_tensor(2, 3, 7).double()
    found = factored_svd(up, down)
    padded, turned = found.padded(5), found.transposed
    assert (padded.left.shape, padded.values.shape, padded.right.shape) == ((9, 5), (5,), (5, 7))
    assert torch.allclose((padded.left * padded.values) @ padded.right, up @ down, atol=1e-12)
    assert torch.allclose((turned.left * turned.values) @ turned.right, (up @ down).T, atol=1e-12)


def test_small_values_keep_their_digits() -> None:
    """Singular values down to 1e-9 of the largest, where float32 has none left at 1e-7."""
    wanted = torch.logspace(0, -9, 10, dtype=torch.float64)
    left = torch.linalg.qr(make_tensor(3, 50, 10).double()).Q
    right = torch.linalg.qr(make_tensor(4, 60, 10).double()).Q
    mixing = make_tensor(5, 10, 10).double()
    up, down = left @ mixing, torch.linalg.solve(mixing, wanted[:, None] * right.T)
    found = core_svd(up, down)
    assert torch.allclose(found.values, wanted, rtol=1e-5)
    triplets = found.leading(up, down, 10)
    unit = torch.eye(10, dtype=torch.float64)
    assert torch.allclose(triplets.left.T @ triplets.left, unit, atol=1e-5)


def test_rank_deficient_and_zero_factors_have_no_nan() -> None:
    up, down = make_tensor(6, 12, 4).double(), make_tensor(7, 4, 9).double()
    up[:, 3] = up[:, 2]
    found = core_svd(up, down)
    assert found.values[3] == 0
    assert (found.values[:3] > 0).all()
    triplets = found.leading(up, down, 4)
    assert torch.allclose((triplets.left * triplets.values) @ triplets.right, up @ down)
    still = core_svd(torch.zeros_like(up), down)
    for tensor in (still.values, still.left_core, still.right_core):
        assert not tensor.any()


def test_refuses_what_is_not_finite() -> None:
    up, down = make_tensor(8, 3, 2).double(), make_tensor(9, 2, 3).double()
    up[1, 1] = torch.nan
    with pytest.raises(NonFiniteError):
        core_svd(up, down)
