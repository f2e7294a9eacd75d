"""A delta that is folded by a tool's rule instead of by its own formula.

It is no parameterisation: no file holds it, and ``DELTAS`` does not list it. Strength 0 need not
give W, nor strength 1 the W′ of the formula.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from loratools.deltas.base import LayerDelta, RowFold
from loratools.deltas.fusing import fuse_rows

MakeFold = Callable[[Any, float, bool, str | torch.device], RowFold]
"""From (delta, strength, transposed, device) to the fold, as ``LayerDelta.row_fold``."""


@dataclass(frozen=True, slots=True, eq=False)
class AsTool(LayerDelta):
    """A stored delta and the rule that folds it.

    Attributes:
        delta: what is stored.
        make_fold: the rule.
        by_rows: whether the rule allows what the delta's own formula does: to be split and fused.
    """

    kind: ClassVar[str] = "as_tool"

    delta: LayerDelta
    make_fold: MakeFold
    by_rows: bool = True

    @property
    def rank(self) -> int | None:
        """Rank of the stored delta, if it has one."""
        rank: int | None = getattr(self.delta, "rank", None)
        return rank

    @property
    def alpha(self) -> float | None:
        """Alpha of the stored delta, if it has one."""
        alpha: float | None = getattr(self.delta, "alpha", None)
        return alpha

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self.delta.weight_shape

    @property
    def out_rows(self) -> int | None:
        return self.delta.out_rows

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return self.delta.parameter_names

    @property
    def stored_transposed(self) -> bool | None:
        return self.delta.stored_transposed

    @property
    def bias_change(self) -> Tensor | None:
        return self.delta.bias_change

    @property
    def is_zero(self) -> bool:
        return self.delta.is_zero

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        return self.make_fold(self.delta, strength, transposed, device)

    def reshaped(self, weight_shape: Sequence[int]) -> AsTool:
        return replace(self, delta=self.delta.reshaped(weight_shape))

    def row_blocks(self, sizes: Sequence[int]) -> list[AsTool]:
        self._refuse_unless_by_rows("split by rows")
        return [replace(self, delta=part) for part in self.delta.row_blocks(sizes)]

    def rows_in_order(self, order: Tensor) -> AsTool:
        return replace(self, delta=self.delta.rows_in_order(order))

    @classmethod
    def fused(cls, parts: Sequence[AsTool | None], sizes: Sequence[int]) -> AsTool:
        """Fuse the stored deltas, which must all follow one rule."""
        first = next(part for part in parts if part is not None)
        first._refuse_unless_by_rows("fused with others")
        if any(part is not None and part.make_fold != first.make_fold for part in parts):
            raise first.refusal("fused with others", "the tool folds them by different rules")
        stored = [None if part is None else part.delta for part in parts]
        return replace(first, delta=fuse_rows(stored, sizes))

    def _refuse_unless_by_rows(self, action: str) -> None:
        if not self.by_rows:
            raise self.refusal(action, "the tool measures columns, which run over all rows")
