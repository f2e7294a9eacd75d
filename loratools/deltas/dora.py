"""DoRA: W' = magnitude · V / ‖V‖ with V = W + ΔW (Liu et al., arXiv:2402.09353).

Axis ``out``: the norm runs over everything but the output axis of (out, in[, k...]): rows of a
Linear or convolution, columns of a GPT-2 Conv1D, the vocabulary axis of an embedding. Axis ``in``
(LyCORIS before 3, OneTrainer's default): over everything but the input axis.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import AdditiveDelta, LayerDelta, RowFold, accumulate
from loratools.deltas.fusing import fuse_rows

Axis = Literal["out", "in"]


@dataclass(frozen=True, slots=True, eq=False)
class DoRA(LayerDelta):
    """An additive change of direction, and the trained length of every row or column.

    Attributes:
        inner: the direction's change.
        magnitude: (out,), or (in,) with axis ``in``.
        axis: whose channels have lengths.
    """

    kind: ClassVar[str] = "dora"

    inner: AdditiveDelta
    magnitude: Tensor
    axis: Axis = "out"

    @property
    def rank(self) -> int | None:
        """Rank of the inner delta, if it has one."""
        rank: int | None = getattr(self.inner, "rank", None)
        return rank

    @property
    def alpha(self) -> float | None:
        """Alpha of the inner delta, if it has one."""
        alpha: float | None = getattr(self.inner, "alpha", None)
        return alpha

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.inner.weight_shape

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return self.inner.parameter_names

    @property
    def stored_transposed(self) -> bool | None:
        return self.inner.stored_transposed

    @property
    def bias_change(self) -> Tensor | None:
        return self.inner.bias_change

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        product = self.inner.row_fold(1.0, transposed=transposed, device=device)
        magnitude = self.magnitude.to(device, torch.float32).flatten()
        by_rows = (self.axis == "in") == transposed
        fold = _RowNormFold if by_rows else _ColumnFold
        return fold(product, magnitude, strength)

    def reshaped(self, weight_shape: Sequence[int]) -> DoRA:
        if self.axis == "in" and tuple(weight_shape[1:2]) != (self.magnitude.numel(),):
            raise self.misfit(weight_shape)
        return replace(self, inner=self.inner.reshaped(weight_shape))

    def row_blocks(self, sizes: Sequence[int]) -> list[DoRA]:
        self._refuse_columns("split by rows")
        inners = self.inner.row_blocks(sizes)
        magnitudes = self.magnitude.flatten().split(list(sizes))
        return [
            replace(self, inner=inner, magnitude=magnitude)
            for inner, magnitude in zip(inners, magnitudes, strict=True)
        ]

    def rows_in_order(self, order: Tensor) -> DoRA:
        # The lengths of columns do not depend on the order of rows.
        by_rows = self.axis == "out"
        magnitude = rows.take(self.magnitude.flatten(), order) if by_rows else self.magnitude
        return replace(self, inner=self.inner.rows_in_order(order), magnitude=magnitude)

    @classmethod
    def fused(cls, parts: Sequence[DoRA | None], sizes: Sequence[int]) -> DoRA:
        """Fuse the inner deltas and stack the lengths of rows, which all parts must have."""
        present = [part for part in parts if part is not None]
        for part in present:
            part._refuse_columns("fused with others")
        if len(present) < len(parts):
            raise present[0].refusal(
                "fused with others", "the rows of a missing part have lengths that only W knows"
            )
        inner = fuse_rows([part.inner for part in present], sizes)
        assert isinstance(inner, AdditiveDelta)
        return cls(inner, rows.join([part.magnitude.flatten() for part in present]))

    def _refuse_columns(self, action: str) -> None:
        if self.axis == "in":
            raise self.refusal(action, "it sets the lengths of columns, which run over all rows")


def length_gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return magnitude / norm; 1 where the norm is 0, so that padded (all-zero) rows stay 0."""
    return torch.where(norm > 0, magnitude / norm, torch.ones_like(norm))


class _RowNormFold(RowFold):
    """Channels are stored rows: each block has all it needs."""

    def __init__(self, product: RowFold, magnitude: Tensor, strength: float) -> None:
        self.product = product
        self.magnitude = magnitude
        self.strength = strength

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        direction = add_direction(self.product, weight, start)
        norm = direction.norm(dim=1)
        gain = length_gain(self.magnitude[start : start + len(weight)], norm)
        moved = direction.mul_(gain[:, None]).sub_(weight).mul_(self.strength)
        accumulate(change, moved, first=first)


class _ColumnFold(RowFold):
    """Channels are stored columns, several each in a convolution: measured over all rows first."""

    reach = "two-pass"

    def __init__(self, product: RowFold, magnitude: Tensor, strength: float) -> None:
        self.product = product
        self.magnitude = magnitude
        self.strength = strength
        self.squares = torch.zeros(magnitude.shape, dtype=torch.float32, device=magnitude.device)

    def measure(self, weight: Tensor, start: int) -> None:
        columns = add_direction(self.product, weight, start).square().sum(dim=0)
        self.squares += columns.reshape(len(self.squares), -1).sum(dim=1)

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        gain = length_gain(self.magnitude, self.squares.sqrt())
        width = weight.shape[1] // len(gain)
        moved = add_direction(self.product, weight, start).mul_(gain.repeat_interleave(width))
        accumulate(change, moved.sub_(weight).mul_(self.strength), first=first)


def add_direction(product: RowFold, weight: Tensor, start: int) -> Tensor:
    """Return the block's rows of V = W + ΔW in a new tensor; ΔW is a fold's change."""
    direction = torch.empty_like(weight)
    product.add_change(direction, weight, start, first=True)
    return direction.add_(weight)
