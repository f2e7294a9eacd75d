"""LoHa: the elementwise product of two low-rank products (FedPara, arXiv:2108.06098).

ΔW = alpha/rank · (w1_a w1_b) ∘ (w2_a w2_b); with cores, each product is Tucker's:
Σ w_a[i, out] · t[i, j, k...] · w_b[j, in].
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
from loratools.linalg.tucker import contract_core


@dataclass(frozen=True, slots=True, eq=False)
class LoHa(AdditiveDelta):
    """Two low-rank products, multiplied element by element.

    Attributes:
        w1_a: (out, r); (r, out) with a core.
        w1_b: (r, in[·k...]); (r, in) with a core.
        w2_a: as w1_a.
        w2_b: as w1_b.
        alpha: with ``scale`` = alpha / rank.
        t1: (r, r, k...) or None.
        t2: as t1.
        shape: of the base weight where the factors do not tell: a convolution's are flattened.
    """

    kind: ClassVar[str] = "loha"

    w1_a: Tensor
    w1_b: Tensor
    w2_a: Tensor
    w2_b: Tensor
    alpha: float
    t1: Tensor | None = None
    t2: Tensor | None = None
    shape: tuple[int, ...] | None = None

    @property
    def rank(self) -> int:
        """Number of rows of ``w1_b``."""
        return self.w1_b.shape[0]

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        if self.shape is not None:
            return self.shape
        if self.t1 is None:
            return (self.w1_a.shape[0], *self.w1_b.shape[1:])
        return (self.w1_a.shape[1], self.w1_b.shape[1], *self.t1.shape[2:])

    @property
    def is_zero(self) -> bool:
        factors = (self.w1_a, self.w1_b, self.w2_a, self.w2_b, self.t1, self.t2)
        return self.alpha == 0 or rows.is_zero(*factors)

    def without_core(self) -> LoHa:
        """Return the same with cores contracted, in float32, into w1_b and w2_b."""
        if self.t1 is None or self.t2 is None:
            return self
        w1_b = contract_core(self.t1, self.w1_b)
        return LoHa(
            self.w1_a.T,
            w1_b.flatten(1),
            self.w2_a.T,
            contract_core(self.t2, self.w2_b).flatten(1),
            self.scale * w1_b.shape[0],
            shape=self.weight_shape,
        )

    def scaled(self, factor: float) -> LoHa:
        return replace(self, alpha=self.alpha * factor)

    def low_rank(self) -> LoRA:
        """Return the face-splitting product: rank r₁·r₂, columns w1_a[:, p] ∘ w2_a[:, q]."""
        w1_a, w1_b, w2_a, w2_b = self.factors()
        up = (w1_a[:, :, None] * w2_a[:, None, :]).flatten(1)
        down = (w1_b[:, None, :] * w2_b[None, :, :]).flatten(0, 1)
        plain = LoRA(down, up, self.scale * down.shape[0])
        return plain.reshaped(self.weight_shape)

    def factors(self, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return float32 w1_a, w1_b, w2_a, w2_b as matrices, without cores."""
        plain = self.without_core()
        stored = (plain.w1_a, plain.w1_b, plain.w2_a, plain.w2_b)
        w1_a, w1_b, w2_a, w2_b = (t.to(device, torch.float32).flatten(1) for t in stored)
        return w1_a, w1_b, w2_a, w2_b

    def norm(self) -> float:
        out, *rest = self.weight_shape
        inner = math.prod(rest)
        # Gram matrices of rank r² cost (out + in)·r⁴, rows of ΔW cost 2·out·in·r.
        if (out + inner) * self.rank**3 < 2 * out * inner:
            return self.low_rank().norm()
        return AdditiveDelta.norm(self)

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        w1_a, w1_b, w2_a, w2_b = self.factors(device)
        if transposed:
            w1_a, w1_b, w2_a, w2_b = w1_b.T, w1_a.T, w2_b.T, w2_a.T
        return _HadamardFold((w1_a * (self.scale * strength), w1_b), (w2_a, w2_b))

    def reshaped(self, weight_shape: Sequence[int]) -> LoHa:
        if not self.is_same_matrix(weight_shape):
            raise self.misfit(weight_shape)
        return replace(self, shape=tuple(weight_shape))

    def row_blocks(self, sizes: Sequence[int]) -> list[LoHa]:
        """Share w1_b and w2_b, or give each block its own rows of them where w_a is diagonal."""
        if self.t1 is not None:
            pieces = zip(*(w.split(list(sizes), 1) for w in (self.w1_a, self.w2_a)), strict=True)
            return [
                replace(self, w1_a=w1_a, w2_a=w2_a, shape=self._shape_of(len(w1_a.T)))
                for w1_a, w2_a in pieces
            ]
        first, second = (rows.column_groups(w, sizes) for w in (self.w1_a, self.w2_a))
        everything = list(range(self.rank))
        if first is None or second is None or first != second or not all(first):
            first = [everything] * len(sizes)
        pieces = zip(*(w.split(list(sizes)) for w in (self.w1_a, self.w2_a)), strict=True)
        return [
            LoHa(
                rows.take(w1_a, group, 1),
                rows.take(self.w1_b, group),
                rows.take(w2_a, group, 1),
                rows.take(self.w2_b, group),
                self.scale * len(group),
                shape=self._shape_of(len(w1_a)),
            )
            for (w1_a, w2_a), group in zip(pieces, first, strict=True)
        ]

    def _shape_of(self, height: int) -> tuple[int, ...] | None:
        return None if self.shape is None else (height, *self.shape[1:])

    def rows_in_order(self, order: Tensor) -> LoHa:
        axis = 0 if self.t1 is None else 1
        w1_a, w2_a = (rows.take(w, order, axis) for w in (self.w1_a, self.w2_a))
        return replace(self, w1_a=w1_a, w2_a=w2_a)

    @classmethod
    def fused(cls, parts: Sequence[LoHa | None], sizes: Sequence[int]) -> LoHa:
        """Share what is one w1_b and w2_b; stand the others side by side, w_a block-diagonal."""
        plain = rows.each(parts, cls.without_core)
        owners = rows.shared_groups(rows.each(plain, lambda part: (part.w1_b, part.w2_b)))
        heads = [part for j, part in enumerate(plain) if part is not None and owners[j] == j]
        scale = rows.common_scale([part.scale for part in plain if part is not None])
        w1_a = rows.each(plain, lambda part: rows.times(part.w1_a, part.scale / scale))
        w2_a = rows.each(plain, lambda part: part.w2_a)
        widths, where = [head.rank for head in heads], rows.places(owners)
        return cls(
            rows.spread_columns(w1_a, sizes, where, widths),
            rows.join([head.w1_b for head in heads]),
            rows.spread_columns(w2_a, sizes, where, widths),
            rows.join([head.w2_b for head in heads]),
            scale * sum(widths),
            shape=None if heads[0].shape is None else (sum(sizes), *heads[0].shape[1:]),
        )


class _HadamardFold(RowFold):
    """Adds rows of (a₁b₁) ∘ (a₂b₂), scale and strength included."""

    def __init__(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> None:
        self.first = first
        self.second = second

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        stop = start + len(change)
        one = self.first[0][start:stop] @ self.first[1]
        accumulate(change, one.mul_(self.second[0][start:stop] @ self.second[1]), first=first)
