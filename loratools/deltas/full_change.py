"""Full changes of a weight and its bias (kohya's ``diff``/``diff_b``, LyCORIS' norms)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import AdditiveDelta, RowFold, accumulate


@dataclass(frozen=True, slots=True, eq=False)
class FullDelta(AdditiveDelta):
    """ΔW and Δb as they are. At least one of them is there.

    Attributes:
        weight: (out, in[, k...]), or (channels,) for a norm; None where only a bias was trained.
        bias: (out,), added to the layer's bias, or None.
        norm_layer: whether the file calls it a normalisation layer's (``w_norm``, ``b_norm``).
    """

    kind: ClassVar[str] = "full"

    weight: Tensor | None = None
    bias: Tensor | None = None
    norm_layer: bool = False

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight; (out,) where there is only a bias."""
        known = self.bias if self.weight is None else self.weight
        assert known is not None
        return tuple(known.shape)

    @property
    def changes_weight(self) -> bool:
        return self.weight is not None

    @property
    def bias_change(self) -> Tensor | None:
        return None if self.bias is None else self.bias.to(torch.float32)

    @property
    def is_zero(self) -> bool:
        return all(tensor is None or rows.is_zero(tensor) for tensor in (self.weight, self.bias))

    def scaled(self, factor: float) -> FullDelta:
        return self.map_tensors(lambda tensor: rows.times(tensor, factor))

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        if self.weight is None:
            return _NoFold()
        matrix = self.weight.T if transposed else self.weight.reshape(self.weight.shape[0], -1)
        return _DenseFold(matrix, strength, device)

    def reshaped(self, weight_shape: Sequence[int]) -> FullDelta:
        if self.weight is None:
            return self
        if not self.is_same_matrix(weight_shape):
            raise self.misfit(weight_shape)
        return replace(self, weight=self.weight.reshape(tuple(weight_shape)))

    def row_blocks(self, sizes: Sequence[int]) -> list[FullDelta]:
        none = [None] * len(sizes)
        weights = none if self.weight is None else self.weight.split(list(sizes))
        biases = none if self.bias is None else self.bias.split(list(sizes))
        return [
            replace(self, weight=weight, bias=bias)
            for weight, bias in zip(weights, biases, strict=True)
        ]

    def rows_in_order(self, order: Tensor) -> FullDelta:
        return self.map_tensors(lambda tensor: rows.take(tensor, order))

    @classmethod
    def fused(cls, parts: Sequence[FullDelta | None], sizes: Sequence[int]) -> FullDelta:
        weights, biases = (
            [None if part is None else getattr(part, name) for part in parts]
            for name in ("weight", "bias")
        )
        norm_layer = any(part is not None and part.norm_layer for part in parts)
        return cls(_stacked(weights, sizes), _stacked(biases, sizes), norm_layer)


def _stacked(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor | None:
    return None if all(part is None for part in parts) else rows.stack_rows(parts, sizes)


class _DenseFold(RowFold):
    """Adds rows of a stored matrix, brought to float32 and the device one block at a time."""

    def __init__(self, matrix: Tensor, strength: float, device: str | torch.device) -> None:
        self.matrix = matrix
        self.strength = strength
        self.device = device

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        part = self.matrix[start : start + len(change)].to(self.device, torch.float32)
        accumulate(change, part * self.strength, first=first)


class _NoFold(RowFold):
    """Adds nothing: only the bias changes."""

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        if first:
            change.zero_()
