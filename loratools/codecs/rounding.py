"""Rounding to a frozen grid so that the error avoids a subspace of the inputs.

With V an orthonormal basis of the protected input directions and e the rounding error, codes are
sought that make ‖e‖² + λ‖eV‖² small. Columns are rounded one after another, each taking back what
the error of those before it has accumulated along V: GPTQ's error feedback (arXiv:2210.17323) with
H = 1 + λVVᵀ, made greedy. A second sweep revisits every column with all others in view (coordinate
descent); it halves what is left along V. No data and no new scales are needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.codecs.grid import Grid, GroupGrid, Search

SWEEPS = 2
STRENGTH = 10.0
"""The whole protected error against the whole error, λ·r/columns, unless the user says otherwise.
Less loses small changes, more gains nothing (benchmarks/requant_quality.py)."""

# Levels so small beside a row's weights are all zero to them; in their units errors overflow.
_NOTHING = 1e-30


def weight_of(strength: float, basis: Tensor) -> float:
    """Return λ for a strength that does not depend on how many directions there are of how many.

    Args:
        strength: λ·r/columns.
        basis: (columns, r).
    """
    columns, directions = basis.shape
    return strength * columns / max(directions, 1)


def nearest_codes(target: Tensor, grid: Grid) -> Tensor:
    """Return the codes (rows, columns), uint8, whose values are nearest to ``target``."""
    wanted = target.T.contiguous()
    codes = torch.empty(wanted.shape, dtype=torch.uint8, device=target.device)
    search = Search(grid)
    for group, columns in _groups(grid):
        found = grid.of_group(group).inside(wanted[columns])
        codes[columns] = search.codes(found).to(torch.uint8)
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
    errors = torch.zeros_like(wanted)
    seen = torch.zeros(basis.shape[1], target.shape[0], device=target.device)
    gains = basis * (strength / (1.0 + strength * basis.square().sum(1, keepdim=True)))
    search = Search(grid)
    least = _NOTHING * torch.maximum(target.abs().amax(1), grid.scale.abs().amax(1))
    groups = [(columns, grid.of_group(group, least)) for group, columns in _groups(grid)]
    for sweep in range(sweeps):
        for columns, own in groups:
            part = _Group(search, own, own.inside(wanted[columns]), errors[columns])
            # Inside a group errors are counted in units of its scale.
            seen /= own.scale
            codes[columns] = part.round(basis[columns], gains[columns], seen, again=sweep > 0)
            seen *= own.scale
            errors[columns] = part.errors
    return codes.T


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """Columns that share a scale, in its units: (columns, rows)."""

    search: Search
    own: GroupGrid
    wanted: Tensor
    errors: Tensor

    def round(self, basis: Tensor, gains: Tensor, seen: Tensor, *, again: bool) -> Tensor:
        """Return the codes; ``seen`` (r, rows) and ``errors`` are brought up to date."""
        chosen = _Chosen(self.search, self.wanted)
        own_gains = (basis * gains).sum(1).tolist()
        aim, across = torch.empty_like(self.wanted[0]), seen.T
        lines = zip(basis, gains, own_gains, self.wanted, self.errors, strict=True)
        for index, (direction, gain, own, wanted, error) in enumerate(lines):
            torch.addmv(wanted, across, gain, out=aim)
            if again:
                aim.add_(error, alpha=-own)
            new = wanted - chosen.nearest(index, aim)
            if self.own.dead is not None:
                new = torch.where(self.own.dead, wanted, new)
            seen.addr_(direction, new - error if again else new)
            error.copy_(new)
        return chosen.codes()


class _Chosen:
    """The codes of a group's columns, one column after another."""

    def __init__(self, search: Search, wanted: Tensor) -> None:
        self.search, self.middles = search, search.middles
        self.uniform = search.middles is None
        dtype = torch.float32 if self.uniform else torch.int64
        self.columns = torch.empty(wanted.shape, dtype=dtype, device=wanted.device)
        self.lines = self.columns.unbind()

    def nearest(self, index: int, aim: Tensor) -> Tensor:
        """Choose a column's codes, and return their levels (rows,)."""
        line, search = self.lines[index], self.search
        if self.middles is None:
            return torch.round(aim, out=line).clamp_(search.first, search.last)
        # One call beats the table of cells here: several threads do this at once, and with short
        # calls they wait for the interpreter's lock rather than for numbers.
        return search.levels.index_select(0, torch.bucketize(aim, self.middles, out=line))

    def codes(self) -> Tensor:
        """Return the codes (columns, rows), uint8."""
        whole = self.columns - self.search.first if self.uniform else self.columns
        return whole.to(torch.uint8)


def _groups(grid: Grid) -> Iterator[tuple[int, slice | Tensor]]:
    """Yield every group with its columns: a range, or their numbers (act-order)."""
    order = grid.group.argsort(stable=True)
    groups, counts = grid.group.unique(return_counts=True)
    start = 0
    for group, count in zip(groups.tolist(), counts.tolist(), strict=True):
        columns = order[start : start + count]
        first = int(columns[0])
        together = int(columns[-1]) - first == count - 1
        yield group, slice(first, first + count) if together else columns
        start += count
