"""Full tensors that an adapter file brings along: replacements of a tensor or of some rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loratools.deltas.base import LayerDelta, RowFold
from loratools.deltas.rows import join, take

Origin = Literal["module", "bias", "base_copy"]
"""Why the file holds the tensor: a module trained in full (``modules_to_save``), a trained bias,
or a copy of the base weight saved beside its adapter."""


@dataclass(frozen=True, slots=True, eq=False)
class Replacement(LayerDelta):
    """A tensor that takes the place of the base's.

    Attributes:
        value: the new tensor, in the shape the base stores.
        origin: why it is in the file.
        expected: whether the adapter's own words announce it, so that a base without such a
            tensor gains it; otherwise the base must have it.
    """

    kind: ClassVar[str] = "replacement"

    value: Tensor
    origin: Origin = "module"
    expected: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        return _SubstitutionFold(self.value, strength, device)

    def reshaped(self, weight_shape: Sequence[int]) -> Replacement:
        if not self.value.dim() or not self.is_same_matrix(weight_shape):
            raise self.misfit(weight_shape)
        return replace(self, value=self.value.reshape(tuple(weight_shape)))

    def row_blocks(self, sizes: Sequence[int]) -> list[Replacement]:
        return [replace(self, value=value) for value in self.value.split(list(sizes))]

    def rows_in_order(self, order: Tensor) -> Replacement:
        return replace(self, value=take(self.value, order))

    @classmethod
    def fused(cls, parts: Sequence[Replacement | None], sizes: Sequence[int]) -> Replacement:
        """Stack the values, which all parts must have."""
        present = [part for part in parts if part is not None]
        if len(present) < len(parts):
            raise present[0].refusal("fused with others", "the missing rows are the base's own")
        return replace(present[0], value=join([part.value for part in present]))


@dataclass(frozen=True, slots=True, eq=False)
class RowReplacement(LayerDelta):
    """Rows that take the place of the base's (trainable tokens).

    Attributes:
        rows: (n, dim).
        indices: the n row numbers in the base matrix, in the order of ``rows``.
    """

    kind: ClassVar[str] = "rows"

    rows: Tensor
    indices: tuple[int, ...]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """The smallest matrix that has these rows."""
        return (max(self.indices, default=-1) + 1, self.rows.shape[1])

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        return _RowSubstitutionFold(self.rows, self.indices, strength, device)


Extra = Replacement | RowReplacement


class _SubstitutionFold(RowFold):
    """Overrides the base block itself, so that other deltas act on the new weight."""

    substitutes = True

    def __init__(self, value: Tensor, strength: float, device: str | torch.device) -> None:
        self.value = value
        self.strength = strength
        self.device = device

    def substitute(self, weight: Tensor, start: int) -> None:
        values = self.value.reshape(-1, weight.shape[1])
        rows = values[start : start + len(weight)].to(self.device, weight.dtype)
        _move(weight, rows, self.strength)

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        if first:
            change.zero_()


class _RowSubstitutionFold(_SubstitutionFold):
    def __init__(
        self, rows: Tensor, indices: tuple[int, ...], strength: float, device: str | torch.device
    ) -> None:
        super().__init__(rows, strength, device)
        self.indices = torch.tensor(indices, dtype=torch.long)

    def substitute(self, weight: Tensor, start: int) -> None:
        inside = (self.indices >= start) & (self.indices < start + len(weight))
        for position in inside.nonzero().flatten().tolist():
            row = self.value[position].to(self.device, weight.dtype)
            _move(weight[int(self.indices[position]) - start], row, self.strength)


def _move(weight: Tensor, target: Tensor, strength: float) -> None:
    """Set weight to weight + strength·(target − weight), exactly target at strength 1."""
    if strength == 1.0:
        weight.copy_(target)
    else:
        weight.lerp_(target, strength)
