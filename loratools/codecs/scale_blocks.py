"""Which scale is whose: one per tensor, per row, per group of inputs, or per block of a matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.codecs.packed import PackedWeight


@dataclass(frozen=True, slots=True)
class ScaleBlocks:
    """The blocks of a weight (rows, columns) that share a scale.

    Attributes:
        height: rows of each matrix of a stack; the last block of each may be lower.
        columns: of the weight; the last block may be narrower.
        down: rows of a block.
        across: columns of a block.
    """

    height: int
    columns: int
    down: int
    across: int

    @classmethod
    def of(cls, weight: PackedWeight, block: tuple[int, int] | None) -> ScaleBlocks:
        """Return the blocks of a weight; None for rows that have a scale each."""
        height = weight.shape[-2] if len(weight.shape) in (2, 3) else weight.rows
        down, across = block or (1, weight.columns)
        return cls(height, weight.columns, min(down, height), min(across, weight.columns))

    def rows(self, scale: Tensor, start: int, stop: int) -> Tensor:
        """Return the scales (stop − start, groups) of a range of rows.

        Args:
            scale: (..., ⌈height / down⌉, ⌈columns / across⌉), the last may be left out if it is
                1; or of one element, for the whole tensor.
            start: first row.
            stop: the row behind the last.
        """
        if scale.numel() == 1:
            return scale.reshape(1, 1).expand(stop - start, 1)
        matrix = scale.reshape(-1, -(-self.columns // self.across))
        row = torch.arange(start, stop)
        each = -(-self.height // self.down)
        return matrix[row // self.height * each + row % self.height // self.down]

    def group(self, rows: Tensor) -> Tensor:
        """Return the group of every column, (columns,), for scales as ``rows`` returns them."""
        group = torch.arange(self.columns)
        return torch.zeros_like(group) if rows.shape[1] == 1 else group // self.across
