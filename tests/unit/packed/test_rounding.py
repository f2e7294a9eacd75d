"""Rounding to frozen grids: nearest against brute force, shaped against what it promises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from loratools.codecs import bnb4
from loratools.codecs.grid import Grid
from loratools.codecs.mlx_affine import quantise_mlx
from loratools.codecs.rounding import nearest_codes, shaped_codes


def table_grid(weight: Tensor) -> Grid:
    scale = weight.view(len(weight), -1, 64).abs().amax(-1)
    group = torch.arange(weight.shape[1]) // 64
    return Grid(bnb4.levels("nf4"), scale, group, uniform=False)


def affine_grid(weight: Tensor) -> Grid:
    return quantise_mlx(weight, 4, 64).grid(0, len(weight))


def zero_grid(weight: Tensor) -> Grid:
    grid = affine_grid(weight)
    zero = torch.randint(0, 16, grid.scale.shape).float()
    return replace(grid, zero=zero, offset=None)


def scattered_grid(weight: Tensor) -> Grid:
    """Groups out of order (act-order), negative scales and one that is zero."""
    scale = torch.randn(len(weight), 8) * 0.01
    scale[0, 0] = 0.0
    group = torch.randperm(weight.shape[1]) % 8
    levels = torch.arange(-8.0, 8.0)
    offset = torch.randn_like(scale) * 0.01
    return Grid(levels, scale, group, uniform=True, offset=offset)


GRIDS = {"table": table_grid, "affine": affine_grid, "zero": zero_grid, "scattered": scattered_grid}


@pytest.fixture(params=list(GRIDS))
def grid(request: pytest.FixtureRequest) -> Grid:
    torch.manual_seed(0)
    return GRIDS[request.param](0.02 * torch.randn(32, 128))


def all_values(grid: Grid, column: int) -> Tensor:
    """What a column's elements can be, (rows, levels) in float64, by the definition."""
    group = grid.group[column]
    inside = grid.levels.double()[None, :]
    if grid.zero is not None:
        inside = inside - grid.zero[:, group, None].double()
    values = inside * grid.scale[:, group, None].double()
    return values if grid.offset is None else values + grid.offset[:, group, None].double()


def test_nearest_is_the_nearest_of_all_levels(grid: Grid) -> None:
    target = 0.02 * torch.randn(32, 128)
    best = [
        (all_values(grid, column) - target[:, column, None]).abs().amin(-1) for column in range(128)
    ]
    found = (grid.values(nearest_codes(target, grid)) - target).abs().double()
    torch.testing.assert_close(found, torch.stack(best, dim=1), rtol=1e-4, atol=1e-7)


def test_no_strength_is_nearest(grid: Grid) -> None:
    target, basis = 0.02 * torch.randn(32, 128), torch.linalg.qr(torch.randn(128, 4)).Q
    assert torch.equal(shaped_codes(target, grid, basis, 0.0), nearest_codes(target, grid))


def test_shaping_agrees_with_the_recursion_in_float64(grid: Grid) -> None:
    """The formula, element by element: aim = w + λ(S·v)/(1+λ|v|²), S += (w − q)vᵀ."""
    target, basis = 0.02 * torch.randn(32, 128), torch.linalg.qr(torch.randn(128, 4)).Q
    found = grid.values(shaped_codes(target, grid, basis, 50.0, sweeps=1)).double()
    seen = torch.zeros(32, 4, dtype=torch.float64)
    wide, strength = basis.double(), 50.0
    agreed = 0
    # Group by group, which is column by column but for act-order.
    for column in grid.group.argsort(stable=True).tolist():
        v, w = wide[column], target[:, column].double()
        aim = w + strength * (seen @ v) / (1 + strength * float(v @ v))
        every = all_values(grid, column)
        best = every.gather(1, (every - aim[:, None]).abs().argmin(1, keepdim=True))[:, 0]
        agreed += int(torch.isclose(best, found[:, column], atol=1e-6).sum())
        # Go on from what was chosen, so that one tie does not move all that follows.
        seen += (w - found[:, column])[:, None] * v
    assert agreed >= 0.995 * 32 * 128


def test_another_sweep_never_raises_the_cost(grid: Grid) -> None:
    target, basis = 0.02 * torch.randn(32, 128), torch.linalg.qr(torch.randn(128, 4)).Q

    def cost(sweeps: int) -> float:
        error = (grid.values(shaped_codes(target, grid, basis, 100.0, sweeps)) - target).double()
        return float(error.square().sum() + 100.0 * (error @ basis.double()).square().sum())

    costs = [cost(sweeps) for sweeps in (1, 2, 3)]
    assert costs[1] <= costs[0] * (1 + 1e-6)
    assert costs[2] <= costs[1] * (1 + 1e-6)


@pytest.mark.parametrize("make", [table_grid, affine_grid])
def test_shaping_keeps_what_nearest_erases(make) -> None:
    torch.manual_seed(1)
    weight = 0.02 * torch.randn(512, 512)
    grid = make(weight)
    codes = nearest_codes(weight, grid)
    start = grid.values(codes)
    down = torch.randn(8, 512)
    change = torch.randn(512, 8) @ down
    change *= 0.01 * start.norm() / change.norm()
    basis = torch.linalg.qr(down.T).Q

    def retained(found: Tensor) -> float:
        return float(((grid.values(found) - start) * change).sum() / change.square().sum())

    wanted = start + change
    assert retained(nearest_codes(wanted, grid)) < 0.05
    shaped = shaped_codes(wanted, grid, basis, 2000.0)
    assert retained(shaped) > 0.99
    left = ((grid.values(shaped) - wanted) @ basis).norm() / (change @ basis).norm()
    assert left < 0.06


def test_scales_next_to_zero_upset_no_other_group(grid: Grid) -> None:
    """Errors counted in units of such a scale would exceed float32."""
    scale = grid.scale.clone()
    scale[::2, 0], scale[1, :] = 1e-41, -1e-38
    tiny, basis = replace(grid, scale=scale), torch.linalg.qr(torch.randn(128, 4)).Q
    target = 0.02 * torch.randn(32, 128)
    codes = shaped_codes(target, tiny, basis, 100.0)
    zero = shaped_codes(
        target, replace(grid, scale=scale.where(scale.abs() > 1e-30, 0)), basis, 100.0
    )
    assert int(codes.max()) < len(grid.levels)
    torch.testing.assert_close(tiny.values(codes), tiny.values(zero), rtol=0, atol=1e-6)
