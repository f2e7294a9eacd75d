"""The values that a quantised weight can take while its scales stay.

They are (level − zero) · scale + offset; most schemes have a zero or an offset, or neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """The frozen part of some rows of a quantised weight.

    Attributes:
        levels: (L,) float32, ascending: what the codes 0 … L−1 stand for before scaling.
        scale: (rows, groups) float32; may be negative or zero.
        group: (columns,) int64, the group of every column.
        uniform: whether the levels are consecutive integers.
        zero: (rows, groups) float32, in units of the levels, or None for 0.
        offset: (rows, groups) float32, in units of the weight, or None for 0.
    """

    levels: Tensor
    scale: Tensor
    group: Tensor
    uniform: bool
    zero: Tensor | None = None
    offset: Tensor | None = None

    def rows(self, start: int, stop: int) -> Grid:
        """Return the grid of a range of its rows."""
        zero, offset = (None if p is None else p[start:stop] for p in (self.zero, self.offset))
        return replace(self, scale=self.scale[start:stop], zero=zero, offset=offset)

    def in_rows_of(self, columns: int) -> Grid:
        """Return the grid of the same weights in rows of another length.

        Groups may run over the ends of the new rows, so that every weight gets a scale of its own.
        """
        scale, zero, offset = (
            None if part is None else part[:, self.group].reshape(-1, columns)
            for part in (self.scale, self.zero, self.offset)
        )
        assert scale is not None
        group = torch.arange(columns, device=self.group.device)
        return Grid(self.levels, scale, group, self.uniform, zero, offset)

    def to(self, device: str | torch.device) -> Grid:
        """Return the grid on a device."""
        zero, offset = (None if p is None else p.to(device) for p in (self.zero, self.offset))
        levels, scale = self.levels.to(device), self.scale.to(device)
        return Grid(levels, scale, self.group.to(device), self.uniform, zero, offset)

    def of_group(self, group: int, least: Tensor | None = None) -> GroupGrid:
        """Return what the columns of one group share.

        Args:
            group: which.
            least: (rows,), the magnitude below which a scale counts as zero; by default it must
                be zero.
        """
        scale = self.scale[:, group].contiguous()
        dead = scale == 0 if least is None else scale.abs() <= least
        zero, offset = (
            None if part is None else part[:, group].contiguous()
            for part in (self.zero, self.offset)
        )
        # Where the scale is zero every code has the same value; errors are then as large as in
        # units of 1.
        return GroupGrid(scale.masked_fill(dead, 1.0), zero, offset, dead if dead.any() else None)

    @property
    def middles(self) -> Tensor:
        """The borders between neighbouring levels, (L − 1,)."""
        return (self.levels[1:] + self.levels[:-1]) / 2

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights (rows, columns) in float32 that codes of that shape stand for."""
        inside = self.levels[codes.long()]
        if self.zero is not None:
            inside = inside - self.zero[:, self.group]
        scaled = inside * self.scale[:, self.group]
        return scaled if self.offset is None else scaled + self.offset[:, self.group]


@dataclass(frozen=True, slots=True, eq=False)
class GroupGrid:
    """One group's grid: all are (rows,).

    Attributes:
        scale: 1 where the stored one counts as zero.
        zero: or None for 0.
        offset: or None for 0.
        dead: where the stored scale counts as zero, or None if it does nowhere.
    """

    scale: Tensor
    zero: Tensor | None
    offset: Tensor | None
    dead: Tensor | None

    def inside(self, target: Tensor) -> Tensor:
        """Return weights (columns, rows) in units of the levels; offsets where the scale is 0."""
        found = (target if self.offset is None else target - self.offset) / self.scale
        if self.zero is None:
            return found
        return found + (self.zero if self.dead is None else self.zero.masked_fill(self.dead, 0.0))


class Search:
    """Finds the nearest levels: in a table of even cells where the levels are few and uneven.

    A cell holds at most one border between levels, so that one comparison decides. Searching the
    borders themselves mispredicts a branch at every step, and takes four times as long.
    """

    def __init__(self, grid: Grid) -> None:
        self.levels = grid.levels
        self.first, self.last = float(grid.levels[0]), float(grid.levels[-1])
        self.middles = None if grid.uniform else grid.middles
        self.factor = 0.0
        if self.middles is not None and len(self.middles) > 1:
            self._cut(self.middles)

    def _cut(self, middles: Tensor) -> None:
        gap, width = float((middles[1:] - middles[:-1]).amin()), self.last - self.first
        count = int(width / gap) + 2 if gap > 0 else _CELLS
        factor = count / width if width > 0 else 0.0
        cells = self._cells(middles, factor, count)
        if count >= _CELLS or factor == 0.0 or len(cells.unique()) < len(cells):
            return
        self.factor, self.count = factor, count
        every = torch.arange(count, device=middles.device)
        self.below = torch.searchsorted(cells, every.to(cells.dtype))
        self.border = torch.full((count,), torch.inf, device=middles.device)
        self.border[cells] = middles

    def _cells(self, values: Tensor, factor: float, count: int) -> Tensor:
        return ((values - self.first) * factor).clamp_(0, count - 1).to(torch.int32)

    def codes(self, inside: Tensor) -> Tensor:
        """Return the codes, integers, of the levels nearest to values of any shape."""
        if self.middles is None:
            last = len(self.levels) - 1
            return (inside - self.first).round_().clamp_(0, last).to(torch.int32)
        if self.factor == 0.0:
            return torch.bucketize(inside, self.middles)
        flat = inside.flatten()
        cells = self._cells(flat, self.factor, self.count)
        codes = self.below.index_select(0, cells)
        return codes.add_(flat > self.border.index_select(0, cells)).view(inside.shape)


_CELLS = 4096
