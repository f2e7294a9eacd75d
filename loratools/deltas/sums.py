"""Several additive changes of one weight: a LoRA and a full or sparse change beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import AdditiveDelta, RowFold
from loratools.deltas.lora import LoRA


@dataclass(frozen=True, slots=True, eq=False)
class SumDelta(AdditiveDelta):
    """The sum of its parts.

    Attributes:
        parts: at least one; those that change the weight have the same ``weight_shape``.
    """

    kind: ClassVar[str] = "sum"

    parts: tuple[AdditiveDelta, ...]

    @property
    def _main(self) -> AdditiveDelta:
        return next((part for part in self.parts if part.changes_weight), self.parts[0])

    @property
    def weight_shape(self) -> tuple[int, ...]:
        return self._main.weight_shape

    @property
    def parameter_names(self) -> tuple[str, ...]:
        return self._main.parameter_names

    @property
    def stored_transposed(self) -> bool | None:
        return self._main.stored_transposed

    @property
    def bias_change(self) -> Tensor | None:
        changes = [part.bias_change for part in self.parts if part.bias_change is not None]
        return torch.stack(changes).sum(dim=0) if changes else None

    @property
    def changes_weight(self) -> bool:
        return any(part.changes_weight for part in self.parts)

    @property
    def is_zero(self) -> bool:
        return all(part.is_zero for part in self.parts)

    def tensors(self) -> dict[str, Tensor]:
        """Return the parts' tensors, each part's number before the name."""
        numbered = enumerate(self.parts)
        return {f"{n}.{name}": t for n, part in numbered for name, t in part.tensors().items()}

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> SumDelta:
        return self._each(lambda part: part.map_tensors(function))

    def _each(self, function: Callable[[AdditiveDelta], AdditiveDelta]) -> SumDelta:
        return replace(self, parts=tuple(function(part) for part in self.parts))

    def scaled(self, factor: float) -> SumDelta:
        return self._each(lambda part: part.scaled(factor))

    def low_rank(self) -> LoRA | None:
        """Return the parts' factors side by side, if each has them."""
        plain = [part.low_rank() for part in self.parts if part.changes_weight]
        present = [lora.reshaped(self.weight_shape) for lora in plain if lora is not None]
        if not plain or len(present) < len(plain):
            return None
        scale = rows.common_scale([lora.scale for lora in present])
        ups = [rows.times(lora.up, lora.scale / scale) for lora in present]
        down = rows.join([lora.down for lora in present])
        change = self.bias_change
        bias = None if change is None else change / scale
        return LoRA(down, rows.join(ups, 1), scale * len(down), bias, present[0].role)

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        return _SumFold(
            [part.row_fold(strength, transposed=transposed, device=device) for part in self.parts]
        )

    def reshaped(self, weight_shape: Sequence[int]) -> SumDelta:
        return self._each(lambda part: part.reshaped(weight_shape))

    def row_blocks(self, sizes: Sequence[int]) -> list[AdditiveDelta]:
        columns = zip(*(part.row_blocks(sizes) for part in self.parts), strict=True)
        return [
            _sum_of([part for part in column if not part.is_zero] or column) for column in columns
        ]

    def rows_in_order(self, order: Tensor) -> SumDelta:
        return self._each(lambda part: part.rows_in_order(order))

    @classmethod
    def fused(cls, parts: Sequence[AdditiveDelta | None], sizes: Sequence[int]) -> AdditiveDelta:
        """Fuse like with like, whatever each sum consists of, and add the results."""
        streams: dict[tuple[type[AdditiveDelta], int], list[AdditiveDelta | None]] = {}
        for position, part in enumerate(parts):
            seen: Counter[type[AdditiveDelta]] = Counter()
            for piece in _parts_of(part):
                key = (type(piece), seen[type(piece)])
                seen[type(piece)] += 1
                streams.setdefault(key, [None] * len(parts))[position] = piece
        return _sum_of([kind.fused(stream, sizes) for (kind, _), stream in streams.items()])


def _parts_of(delta: AdditiveDelta | None) -> tuple[AdditiveDelta, ...]:
    if delta is None:
        return ()
    return delta.parts if isinstance(delta, SumDelta) else (delta,)


def _sum_of(parts: Sequence[AdditiveDelta]) -> AdditiveDelta:
    return parts[0] if len(parts) == 1 else SumDelta(tuple(parts))


class _SumFold(RowFold):
    """Lets every part add its change."""

    def __init__(self, folds: Sequence[RowFold]) -> None:
        self.folds = folds

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        for position, fold in enumerate(self.folds):
            fold.add_change(change, weight, start, first=first and position == 0)
