"""(IA)³: rows or columns of the weight lengthened, W' = W ∘ (1 + w) (arXiv:2205.05638)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import LayerDelta, RowFold, accumulate


@dataclass(frozen=True, slots=True, eq=False)
class IA3(LayerDelta):
    """A trained factor for each output or each input channel.

    Attributes:
        weight: (channels,) with any number of 1s around; 0 changes nothing.
        on_input: whether the channels are the input's.
        shape: of the base weight, once known.
    """

    kind: ClassVar[str] = "ia3"

    weight: Tensor
    on_input: bool
    shape: tuple[int, ...] | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the base weight; one channel stands for the other axis while it is unknown."""
        count = self.weight.numel()
        return self.shape or ((1, count) if self.on_input else (count, 1))

    @property
    def out_rows(self) -> int | None:
        return None if self.on_input and self.shape is None else self.weight_shape[0]

    @property
    def is_zero(self) -> bool:
        return rows.is_zero(self.weight)

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        factors = self.weight.to(device, torch.float32).flatten() * strength
        return _ColumnGainFold(factors) if self.on_input != transposed else _RowGainFold(factors)

    def reshaped(self, weight_shape: Sequence[int]) -> IA3:
        axis = 1 if self.on_input else 0
        if len(weight_shape) <= axis or weight_shape[axis] != self.weight.numel():
            raise self.misfit(weight_shape)
        return replace(self, shape=tuple(weight_shape))

    def row_blocks(self, sizes: Sequence[int]) -> list[IA3]:
        tail = None if self.shape is None else self.shape[1:]
        shapes = [None if tail is None else (size, *tail) for size in sizes]
        if self.on_input:
            return [replace(self, shape=shape) for shape in shapes]
        pieces = self.weight.flatten().split(list(sizes))
        return [
            replace(self, weight=piece, shape=shape)
            for piece, shape in zip(pieces, shapes, strict=True)
        ]

    def rows_in_order(self, order: Tensor) -> IA3:
        if self.on_input:
            return self
        return replace(self, weight=rows.take(self.weight.flatten(), order))

    @classmethod
    def fused(cls, parts: Sequence[IA3 | None], sizes: Sequence[int]) -> IA3:
        """Stack output factors; input factors must be one and the same for all parts."""
        present = [part for part in parts if part is not None]
        first = present[0]
        shape = None if first.shape is None else (sum(sizes), *first.shape[1:])
        if any(part.on_input != first.on_input for part in present):
            raise first.refusal("fused with others", "some act on the input, some on the output")
        if not first.on_input:
            factors = rows.each(parts, lambda part: part.weight.flatten())
            return cls(rows.stack_rows(factors, sizes), on_input=False, shape=shape)
        alike = all(rows.same(part.weight, first.weight) for part in present)
        if len(present) < len(parts) or not alike:
            raise first.refusal(
                "fused with others", "their factors of the input differ, and one weight has one set"
            )
        return replace(first, shape=shape)


class _RowGainFold(RowFold):
    """Channels are stored rows."""

    def __init__(self, factors: Tensor) -> None:
        self.factors = factors

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        factors = self.factors[start : start + len(weight)]
        accumulate(change, weight * factors[:, None], first=first)


class _ColumnGainFold(_RowGainFold):
    """Channels are stored columns, of several elements each in a convolution."""

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        width = weight.shape[1] // len(self.factors)
        accumulate(change, weight * self.factors.repeat_interleave(width), first=first)
