"""The values that a quantised weight can take while its scales stay.

They are (level − zero) · scale + offset; most schemes have a zero or an offset, or neither.
"""

from __future__ import annotations

from dataclasses import dataclass

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

    def column(self, index: int) -> GridColumn:
        """Return the values that one column's elements can take."""
        return self.of_group(int(self.group[index]))

    def of_group(self, group: int) -> GridColumn:
        """Return the values that the elements of a group's columns can take."""
        scale = self.scale[:, group].contiguous()
        # Where the scale is zero every code has the same value, so any inverse will do.
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        middles = None if self.uniform else (self.levels[1:] + self.levels[:-1]) / 2
        zero, offset = (
            None if part is None else part[:, group].contiguous()
            for part in (self.zero, self.offset)
        )
        return GridColumn(self.levels, scale, inverse, zero, offset, middles)

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights (rows, columns) in float32 that codes of that shape stand for."""
        inside = self.levels[codes.long()]
        if self.zero is not None:
            inside = inside - self.zero[:, self.group]
        scaled = inside * self.scale[:, self.group]
        return scaled if self.offset is None else scaled + self.offset[:, self.group]


@dataclass(frozen=True, slots=True, eq=False)
class GridColumn:
    """One column's grid: ``scale``, its ``inverse``, ``zero`` and ``offset`` are (rows,)."""

    levels: Tensor
    scale: Tensor
    inverse: Tensor
    zero: Tensor | None
    offset: Tensor | None
    middles: Tensor | None

    def nearest(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes (rows,), int64, nearest to ``target`` and the values they stand for."""
        shifted = target if self.offset is None else target - self.offset
        inside = shifted * self.inverse
        if self.zero is not None:
            inside = inside + self.zero
        if self.middles is None:
            lowest, last = self.levels[0], len(self.levels) - 1
            codes = (inside - lowest).round_().clamp_(0, last).long()
        else:
            codes = torch.bucketize(inside, self.middles)
        level = self.levels[codes]
        value = (level if self.zero is None else level - self.zero) * self.scale
        return codes, value if self.offset is None else value + self.offset
