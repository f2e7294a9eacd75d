"""LoKr: a Kronecker product (LyCORIS, arXiv:2309.14859).

ΔW = scale · w1 ⊗ w2, where either side may be a low-rank product and w2 may have a core.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import AdditiveDelta, RowFold, accumulate
from loratools.deltas.lora import LoRA
from loratools.linalg.kronecker import (
    Factors,
    kron_factors,
    kron_rows,
    least_factors,
    least_factors_of,
)
from loratools.linalg.tucker import contract_core


@dataclass(frozen=True, slots=True, eq=False)
class LoKr(AdditiveDelta):
    """A Kronecker product; each side is a matrix or two factors.

    Attributes:
        alpha: with ``scale`` = alpha / rank; without effect where both sides are full.
        w1: (o₁, i₁), or None.
        w1_a: (o₁, r), or None.
        w1_b: (r, i₁), or None.
        w2: (o₂, i₂[, k...]), or None.
        w2_a: (o₂, r), or None; (r, o₂) with a core.
        w2_b: (r, i₂[·k...]), or None; (r, i₂) with a core.
        t2: (r, r, k...), or None.
        shape: of the base weight where the factors do not tell: a convolution's may be flattened.
    """

    kind: ClassVar[str] = "lokr"

    alpha: float
    w1: Tensor | None = None
    w1_a: Tensor | None = None
    w1_b: Tensor | None = None
    w2: Tensor | None = None
    w2_a: Tensor | None = None
    w2_b: Tensor | None = None
    t2: Tensor | None = None
    shape: tuple[int, ...] | None = None

    @property
    def rank(self) -> int | None:
        """Rank of the low-rank side, the second one's if both are; None where both are full."""
        factor = self.w1_b if self.w2_b is None else self.w2_b
        return None if factor is None else factor.shape[0]

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return 1.0 if self.rank is None else self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.shape is not None:
            return self.shape
        (out1, in1), (out2, in2, *kernel) = self._first_shape[:2], self._second_shape
        return (out1 * out2, in1 * in2, *kernel)

    @property
    def _first_shape(self) -> tuple[int, ...]:
        return _product_shape(self.w1, self.w1_a, self.w1_b)

    @property
    def _second_shape(self) -> tuple[int, ...]:
        if self.t2 is not None and self.w2_a is not None and self.w2_b is not None:
            return (self.w2_a.shape[1], self.w2_b.shape[1], *self.t2.shape[2:])
        return _product_shape(self.w2, self.w2_a, self.w2_b)

    @property
    def is_zero(self) -> bool:
        sides = (self.w1, self.w1_a, self.w1_b, self.w2, self.w2_a, self.w2_b, self.t2)
        return self.scale == 0 or rows.is_zero(*sides)

    def sides(self) -> tuple[Tensor, Tensor]:
        """Return (o₁, i₁) and (o₂, i₂·k...) in float32, without the scale."""
        first = _product(self.w1, self._first_factors())
        return first, _product(self.w2, self._second_factors())

    def _first_factors(self) -> Factors | None:
        return _factors(self.w1_a, self.w1_b)

    def _second_factors(self) -> Factors | None:
        if self.t2 is None or self.w2_a is None or self.w2_b is None:
            return _factors(self.w2_a, self.w2_b)
        return self.w2_a.to(torch.float32).T, contract_core(self.t2, self.w2_b).flatten(1)

    def scaled(self, factor: float) -> LoKr:
        if self.rank is not None or self.w1 is None:
            return replace(self, alpha=self.alpha * factor)
        return replace(self, w1=rows.times(self.w1, factor))

    def low_rank(self) -> LoRA:
        """Return the Kronecker products of the sides' least factors; ranks multiply."""
        first, second = self._first_factors(), self._second_factors()
        one = least_factors(*first) if first else least_factors_of(_product(self.w1, None))
        two = least_factors(*second) if second else least_factors_of(_product(self.w2, None))
        up, down = kron_factors(one, two)
        return LoRA(down, up, self.scale * len(down)).reshaped(self.weight_shape)

    def norm(self) -> float:
        norms = (float(side.to(torch.float64).norm()) for side in self.sides())
        return abs(self.scale) * math.prod(norms)

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        first, second = (side.to(device) for side in self.sides())
        first = first * (self.scale * strength)
        return _KroneckerFold(first.T, second.T) if transposed else _KroneckerFold(first, second)

    def reshaped(self, weight_shape: Sequence[int]) -> LoKr:
        if not self.is_same_matrix(weight_shape):
            raise self.misfit(weight_shape)
        return replace(self, shape=tuple(weight_shape))

    def _shape_of(self, height: int) -> tuple[int, ...] | None:
        return None if self.shape is None else (height, *self.shape[1:])

    def row_blocks(self, sizes: Sequence[int]) -> list[LoKr]:
        """Take rows of w1 and share w2; raises UnsupportedError off the boundaries of w2."""
        height = self._second_shape[0]
        if any(size % height for size in sizes):
            raise self.refusal(
                f"split into {list(sizes)} rows",
                f"they are no multiples of the {height} rows of its second factor",
                hint="convert it to a plain LoRA first, which is exact",
            )
        counts = [size // height for size in sizes]
        full = _split(self.w1, counts)
        ups = _split(self.w1_a, counts)
        return [
            replace(self, w1=w1, w1_a=w1_a, shape=self._shape_of(size))
            for w1, w1_a, size in zip(full, ups, sizes, strict=True)
        ]

    def rows_in_order(self, order: Tensor) -> LoKr:
        """Reorder w1's rows and w2's; raises UnsupportedError unless the order is their product."""
        found = rows.factor_permutation(order, self._second_shape[0])
        if found is None:
            raise self.refusal(
                "reordered",
                f"the order cuts through the {self._second_shape[0]} rows of its second factor",
                hint="convert it to a plain LoRA first, which is exact",
            )
        outer, within = found
        return replace(
            self,
            w1=_taken(self.w1, outer),
            w1_a=_taken(self.w1_a, outer),
            w2=_taken(self.w2, within),
            w2_a=_taken(self.w2_a, within, 0 if self.t2 is None else 1),
        )

    @classmethod
    def fused(cls, parts: Sequence[LoKr | None], sizes: Sequence[int]) -> LoKr | LoRA:
        """Stack the rows of w1 over one w2; a plain LoRA where the second factors differ."""
        present = [part for part in parts if part is not None]
        first = present[0]
        height = first._second_shape[0]
        if any(size % height for size in sizes) or not all(first._shares(p) for p in present):
            return LoRA.fused(rows.each(parts, cls.low_rank), sizes)
        counts = [size // height for size in sizes]
        scale = rows.common_scale([part.scale for part in present])
        side = "w1" if first.w1 is not None else "w1_a"
        stored = rows.each(parts, lambda p: rows.times(getattr(p, side), p.scale / scale))
        alpha = first.alpha if first.rank is None else scale * first.rank
        shape = first._shape_of(sum(sizes))
        changed = {side: rows.stack_rows(stored, counts)}
        return replace(first, alpha=alpha, shape=shape, **changed)

    def _shares(self, other: LoKr) -> bool:
        names = ("w1_b", "w2", "w2_a", "w2_b", "t2")
        return all(rows.same(getattr(self, name), getattr(other, name)) for name in names)


class _KroneckerFold(RowFold):
    """Adds rows of first ⊗ second, scale and strength included."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first = first
        self.second = second

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        part = kron_rows(self.first, self.second, start, start + len(change))
        accumulate(change, part, first=first)


def _product_shape(full: Tensor | None, up: Tensor | None, down: Tensor | None) -> tuple[int, ...]:
    if full is not None:
        return tuple(full.shape)
    assert up is not None
    assert down is not None
    return (up.shape[0], *down.shape[1:])


def _product(full: Tensor | None, factors: Factors | None) -> Tensor:
    if factors is not None:
        return factors[0] @ factors[1]
    assert full is not None
    return full.to(torch.float32).flatten(1)


def _factors(up: Tensor | None, down: Tensor | None) -> Factors | None:
    if up is None or down is None:
        return None
    return up.to(torch.float32), down.to(torch.float32).flatten(1)


def _split(tensor: Tensor | None, counts: list[int]) -> Sequence[Tensor | None]:
    return [None] * len(counts) if tensor is None else tensor.split(counts)


def _taken(tensor: Tensor | None, order: Tensor, axis: int = 0) -> Tensor | None:
    return None if tensor is None else rows.take(tensor, order, axis)
