"""The values that a quantised weight can take while its scales stay: level · scale + offset."""

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
        offset: (rows, groups) float32, or None for zero.
        group: (columns,) int64, the group of every column.
        uniform: whether the levels are consecutive integers.
    """

    levels: Tensor
    scale: Tensor
    offset: Tensor | None
    group: Tensor
    uniform: bool

    def column(self, index: int) -> GridColumn:
        """Return the values that one column's elements can take."""
        return self.of_group(int(self.group[index]))

    def of_group(self, group: int) -> GridColumn:
        """Return the values that the elements of a group's columns can take."""
        scale = self.scale[:, group].contiguous()
        # Where the scale is zero every code has the same value, so any inverse will do.
        inverse = torch.where(scale == 0, 0.0, 1.0 / scale)
        offset = None if self.offset is None else self.offset[:, group].contiguous()
        middles = None if self.uniform else (self.levels[1:] + self.levels[:-1]) / 2
        return GridColumn(self.levels, scale, inverse, offset, middles)

    def values(self, codes: Tensor) -> Tensor:
        """Return the weights (rows, columns) in float32 that codes of that shape stand for."""
        scaled = self.levels[codes.long()] * self.scale[:, self.group]
        return scaled if self.offset is None else scaled + self.offset[:, self.group]


@dataclass(frozen=True, slots=True, eq=False)
class GridColumn:
    """One column's grid: ``scale``, ``inverse`` and ``offset`` are (rows,)."""

    levels: Tensor
    scale: Tensor
    inverse: Tensor
    offset: Tensor | None
    middles: Tensor | None

    def nearest(self, target: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes (rows,), int64, nearest to ``target`` and the values they stand for."""
        shifted = target if self.offset is None else target - self.offset
        inside = shifted * self.inverse
        if self.middles is None:
            lowest, last = self.levels[0], len(self.levels) - 1
            codes = (inside - lowest).round_().clamp_(0, last).long()
        else:
            codes = torch.bucketize(inside, self.middles)
        value = self.levels[codes] * self.scale
        return codes, value if self.offset is None else value + self.offset
