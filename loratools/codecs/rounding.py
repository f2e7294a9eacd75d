"""Rounding to a frozen grid so that the error avoids a subspace of the inputs.

With V an orthonormal basis of the protected input directions and e the rounding error, codes are
sought that make ‖e‖² + λ‖eV‖² small. Columns are rounded one after another, each taking back what
the error of those before it has accumulated along V: GPTQ's error feedback (arXiv:2210.17323) with
H = 1 + λVVᵀ, made greedy. A second sweep revisits every column with all others in view (coordinate
descent); it halves what is left along V. No data and no new scales are needed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loratools.codecs.grid import Grid, GridColumn

SWEEPS = 2
# Groups follow one another in all layouts but act-order: so many are kept at a time.
_KEPT = 256


def nearest_codes(target: Tensor, grid: Grid) -> Tensor:
    """Return the codes (rows, columns), uint8, whose values are nearest to ``target``."""
    wanted = target.T.contiguous()
    codes = torch.empty(wanted.shape, dtype=torch.uint8, device=target.device)
    for index, column in _columns(grid):
        codes[index] = column.nearest(wanted[index])[0]
    return codes.T


def shaped_codes(
    target: Tensor, grid: Grid, basis: Tensor, strength: float, sweeps: int = SWEEPS
) -> Tensor:
    """Return the codes (rows, columns), uint8, whose error is small along ``basis``.

    Args:
        target: (rows, columns) float32, the weights wanted.
        grid: of these rows.
        basis: (columns, r) float32 with orthonormal columns: the protected input directions.
        strength: λ ≥ 0, the weight of the protected error against the whole; 0 rounds to nearest.
        sweeps: how often the columns are gone through.
    """
    wanted = target.T.contiguous()
    codes = torch.empty(wanted.shape, dtype=torch.uint8, device=target.device)
    values = wanted.clone()
    error = torch.zeros(basis.shape[1], target.shape[0], device=target.device)
    gains = basis * (strength / (1.0 + strength * basis.square().sum(1, keepdim=True)))
    for sweep in range(sweeps):
        for index, column in _columns(grid):
            direction = basis[index]
            if sweep:
                error.addr_(direction, values[index] - wanted[index])
            aim = torch.addmv(wanted[index], error.T, gains[index])
            codes[index], values[index] = column.nearest(aim)
            error.addr_(direction, wanted[index] - values[index])
    return codes.T


def _columns(grid: Grid) -> Iterator[tuple[int, GridColumn]]:
    """Yield every column's index and grid; columns of one group share theirs."""
    found: dict[int, GridColumn] = {}
    for index, group in enumerate(grid.group.tolist()):
        if group not in found:
            if len(found) >= _KEPT:
                found.clear()
            found[group] = grid.of_group(group)
        yield index, found[group]
