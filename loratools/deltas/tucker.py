"""LoRA of a convolution with a core between its factors (LoCon's ``use_tucker``).

ΔW[o, i, k...] = alpha/rank · Σ up[o, n] · mid[n, m, k...] · down[m, i].
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import AdditiveDelta, RowFold
from loratools.deltas.lora import LoRA
from loratools.linalg.tucker import contract_core


@dataclass(frozen=True, slots=True, eq=False)
class TuckerLoRA(AdditiveDelta):
    """Two pointwise factors and a core that holds the kernel.

    Attributes:
        down: (m, in, 1...).
        mid: (n, m, k...).
        up: (out, n, 1...).
        alpha: with ``scale`` = alpha / m.
    """

    kind: ClassVar[str] = "tucker"

    down: Tensor
    mid: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Number of rows of ``down``."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """The factor on the product."""
        return self.alpha / self.rank

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return (self.up.shape[0], self.down.shape[1], *self.mid.shape[2:])

    @property
    def is_zero(self) -> bool:
        return self.alpha == 0 or rows.is_zero(self.up, self.mid, self.down)

    def scaled(self, factor: float) -> TuckerLoRA:
        return replace(self, alpha=self.alpha * factor)

    def low_rank(self) -> LoRA:
        down = contract_core(self.mid, self.down)
        up = self.up.flatten(1).reshape(-1, down.shape[0], *([1] * (down.dim() - 2)))
        return LoRA(down, up, self.scale * down.shape[0])

    def norm(self) -> float:
        return self.low_rank().norm()

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        return self.low_rank().row_fold(strength, transposed=transposed, device=device)

    def row_blocks(self, sizes: Sequence[int]) -> list[TuckerLoRA]:
        return [replace(self, up=up) for up in self.up.split(list(sizes))]

    def rows_in_order(self, order: Tensor) -> TuckerLoRA:
        return replace(self, up=rows.take(self.up, order))

    @classmethod
    def fused(cls, parts: Sequence[TuckerLoRA | None], sizes: Sequence[int]) -> TuckerLoRA | LoRA:
        """Share one core; several cores that differ become a plain LoRA, whose rank is smaller."""
        present = [part for part in parts if part is not None]
        first = present[0]
        if not all(rows.same(p.down, first.down) and rows.same(p.mid, first.mid) for p in present):
            return LoRA.fused(rows.each(parts, cls.low_rank), sizes)
        scale = rows.common_scale([part.scale for part in present])
        ups = rows.each(parts, lambda part: rows.times(part.up, part.scale / scale))
        return replace(first, up=rows.stack_rows(ups, sizes), alpha=scale * first.rank)
