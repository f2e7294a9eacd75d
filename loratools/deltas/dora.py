"""DoRA: W' = magnitude · V / ‖V‖ with V = W + ΔW (Liu et al., arXiv:2402.09353).

The norm runs over everything but the output axis of (out, in[, k...]): rows of a Linear or
convolution, columns of a GPT-2 Conv1D, the vocabulary axis of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas.base import LayerDelta, RowFold, accumulate
from loratools.deltas.lora import LoRA


@dataclass(frozen=True, slots=True, eq=False)
class DoRA(LayerDelta):
    """A LoRA and the trained length of every output row.

    Attributes:
        lora: the direction's change.
        magnitude: (out,).
    """

    kind: ClassVar[str] = "dora"

    lora: LoRA
    magnitude: Tensor

    @property
    def rank(self) -> int:
        """Rank of the inner LoRA."""
        return self.lora.rank

    @property
    def alpha(self) -> float:
        """Alpha of the inner LoRA."""
        return self.lora.alpha

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.lora.weight_shape

    @property
    def stored_transposed(self) -> bool | None:
        return self.lora.stored_transposed

    @property
    def bias_change(self) -> Tensor | None:
        return self.lora.bias_change

    def tensors(self) -> Mapping[str, Tensor]:
        return {**self.lora.tensors(), "magnitude": self.magnitude}

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> DoRA:
        return replace(
            self, lora=self.lora.map_tensors(function), magnitude=function(self.magnitude)
        )

    def norm(self) -> None:
        return None

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        product = self.lora.row_fold(1.0, transposed=transposed, device=device)
        magnitude = self.magnitude.to(device, torch.float32).flatten()
        fold = _ColumnFold if transposed else _RowNormFold
        return fold(product, magnitude, strength)


def _gain(magnitude: Tensor, norm: Tensor) -> Tensor:
    """Return magnitude / norm; 1 where the norm is 0, so that padded (all-zero) rows stay 0."""
    return torch.where(norm > 0, magnitude / norm, torch.ones_like(norm))


class _RowNormFold(RowFold):
    """Output channels are stored rows: each block has all it needs."""

    def __init__(self, product: RowFold, magnitude: Tensor, strength: float) -> None:
        self.product = product
        self.magnitude = magnitude
        self.strength = strength

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        direction = _direction(self.product, weight, start)
        norm = direction.norm(dim=1)
        gain = _gain(self.magnitude[start : start + len(weight)], norm)
        moved = direction.mul_(gain[:, None]).sub_(weight).mul_(self.strength)
        accumulate(change, moved, first=first)


class _ColumnFold(RowFold):
    """Output channels are stored columns: their norms are measured over all rows first."""

    reach = "two-pass"

    def __init__(self, product: RowFold, magnitude: Tensor, strength: float) -> None:
        self.product = product
        self.magnitude = magnitude
        self.strength = strength
        self.squares = torch.zeros(magnitude.shape, dtype=torch.float32, device=magnitude.device)

    def measure(self, weight: Tensor, start: int) -> None:
        self.squares += _direction(self.product, weight, start).square().sum(dim=0)

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        gain = _gain(self.magnitude, self.squares.sqrt())
        moved = _direction(self.product, weight, start).mul_(gain)
        accumulate(change, moved.sub_(weight).mul_(self.strength), first=first)


def _direction(product: RowFold, weight: Tensor, start: int) -> Tensor:
    """Return the block's rows of V = W + ΔW in a new tensor."""
    direction = torch.empty_like(weight)
    product.add_change(direction, weight, start, first=True)
    return direction.add_(weight)
