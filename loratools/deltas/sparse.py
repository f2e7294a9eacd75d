"""Single elements that change: the residual that LyCORIS' extraction keeps beside a LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import AdditiveDelta, RowFold


@dataclass(frozen=True, slots=True, eq=False)
class SparseResidual(AdditiveDelta):
    """Coordinates and values; values of equal coordinates add up.

    Attributes:
        indices: (axes, nnz), integers. Not among ``tensors()``: they are no weights.
        values: (nnz,).
        size: shape of the weight, which may be a convolution's flattened to (out, in·k...).
        scale: the factor on the values; alpha / rank of the LoRA beside it, which multiplies both.
    """

    kind: ClassVar[str] = "sparse"

    indices: Tensor
    values: Tensor
    size: tuple[int, ...]
    scale: float = 1.0

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.size

    @property
    def is_zero(self) -> bool:
        return self.scale == 0 or rows.is_zero(self.values)

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> SparseResidual:
        return replace(self, values=function(self.values))

    def scaled(self, factor: float) -> SparseResidual:
        return replace(self, scale=self.scale * factor)

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        width = math.prod(self.size[1:])
        place = self._places()
        row, column = place // width, place % width
        if transposed:
            row, column = column, row
        order = row.argsort(stable=True)
        values = self.values.to(torch.float32)[order] * (self.scale * strength)
        coordinates = (row[order].to(device), column[order].to(device))
        return _ScatterFold(coordinates, values.to(device))

    def _places(self) -> Tensor:
        """Return the position of each value in the flattened weight."""
        place = torch.zeros(self.values.shape, dtype=torch.long)
        for index, length in zip(self.indices.to("cpu", torch.long), self.size, strict=True):
            place = place * length + index
        return place

    def reshaped(self, weight_shape: Sequence[int]) -> SparseResidual:
        if not self.is_same_matrix(weight_shape):
            raise self.misfit(weight_shape)
        indices = torch.unravel_index(self._places(), tuple(weight_shape))
        return replace(self, indices=torch.stack(indices), size=tuple(weight_shape))

    def row_blocks(self, sizes: Sequence[int]) -> list[SparseResidual]:
        blocks, start = [], 0
        for size in sizes:
            inside = (self.indices[0] >= start) & (self.indices[0] < start + size)
            moved = self.indices[:, inside].clone()
            moved[0] -= start
            blocks.append(
                replace(
                    self, indices=moved, values=self.values[inside], size=(size, *self.size[1:])
                )
            )
            start += size
        return blocks

    def rows_in_order(self, order: Tensor) -> SparseResidual:
        indices = self.indices.to(torch.long).clone()
        indices[0] = order.argsort()[indices[0]]
        return replace(self, indices=indices)

    @classmethod
    def fused(cls, parts: Sequence[SparseResidual | None], sizes: Sequence[int]) -> SparseResidual:
        present = [part for part in parts if part is not None]
        scale = rows.common_scale([part.scale for part in present])
        indices, values, start = [], [], 0
        for part, size in zip(parts, sizes, strict=True):
            if part is not None:
                moved = part.indices.to(torch.long).clone()
                moved[0] += start
                indices.append(moved)
                values.append(rows.times(part.values, part.scale / scale))
            start += size
        whole = (sum(sizes), *present[0].size[1:])
        return cls(torch.cat(indices, dim=1), rows.join(values), whole, scale)


class _ScatterFold(RowFold):
    """Adds the values of a block's rows; values are sorted by row."""

    def __init__(self, coordinates: tuple[Tensor, Tensor], values: Tensor) -> None:
        self.row, self.column = coordinates
        self.values = values

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        if first:
            change.zero_()
        bounds = self.row.new_tensor([start, start + len(change)])
        begin, end = torch.searchsorted(self.row, bounds).tolist()
        where = (self.row[begin:end] - start, self.column[begin:end])
        change.index_put_(where, self.values[begin:end], accumulate=True)
