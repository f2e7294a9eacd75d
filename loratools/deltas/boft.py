"""BOFT: butterfly rotations in stages, W' = rescale ∘ (Rₘ … R₁ W) (arXiv:2311.06243).

Stage i pairs rows 2^i · b/2 apart, rotates blocks of b of the rows so ordered (R W, not
transposed as in OFT), and puts them back.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import LayerDelta, RowFold
from loratools.deltas.rotation import RotationFold, cayley, skew_parts


@dataclass(frozen=True, slots=True, eq=False)
class BOFT(LayerDelta):
    """Rotations of output rows that reach across blocks.

    Attributes:
        blocks: (m, n, b, b): m stages of n blocks, n·b = out, b even.
        constraint: the file's alpha; constraint · out bounds ‖Q‖ over all stages, 0 for none.
        rescale: (out[, 1...]), a trained length of each output row, or None.
        shape: of the base weight, once known.
    """

    kind: ClassVar[str] = "boft"

    blocks: Tensor
    constraint: float = 0.0
    rescale: Tensor | None = None
    shape: tuple[int, ...] | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the base weight; (out, 1) as long as it is not known."""
        return self.shape or (self.out, 1)

    @property
    def out(self) -> int:
        """Number of output rows."""
        return self.blocks.shape[1] * self.blocks.shape[2]

    @property
    def bound(self) -> float | None:
        """The largest ‖Q‖, or None."""
        return self.constraint * self.out if self.constraint > 0 else None

    @property
    def is_zero(self) -> bool:
        return self.rescale is None and rows.is_zero(self.blocks)

    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        rotate, lengths = self.rotation(device), self.lengths(device)
        return RotationFold(rotate, lengths, strength, transposed=transposed)

    def lengths(self, device: str | torch.device) -> Tensor | None:
        """Return ``rescale`` as (out,) in float32, if there is one."""
        return None if self.rescale is None else self.rescale.to(device, torch.float32).flatten()

    def rotation(
        self, device: str | torch.device, share: float = 1.0
    ) -> Callable[[Tensor], Tensor]:
        """Return what rotates the rows of a matrix; ``share`` moves each stage from I to R."""
        stages = cayley(skew_parts(self.blocks, self.bound))
        unit = torch.eye(stages.shape[-1], dtype=stages.dtype)
        turns = torch.lerp(unit, stages, share).to(torch.float32).to(device)
        orders = [_butterfly(self.out, self.blocks.shape[2], stage) for stage in range(len(turns))]

        def rotate(matrix: Tensor) -> Tensor:
            for turn, order in zip(turns, orders, strict=True):
                paired = matrix[order].reshape(*turn.shape[:2], -1)
                matrix = torch.empty_like(matrix)
                matrix[order] = torch.bmm(turn, paired).reshape(matrix.shape)
            return matrix

        return rotate

    def reshaped(self, weight_shape: Sequence[int]) -> BOFT:
        if weight_shape[0] != self.out:
            raise self.misfit(weight_shape)
        return replace(self, shape=tuple(weight_shape))


def _butterfly(out: int, width: int, stage: int) -> Tensor:
    """Return the rows in the order of a stage: each beside the one 2^stage · b/2 further on."""
    reach = (width // 2) << stage
    return torch.arange(out).reshape(-1, 2, reach).mT.flatten()
