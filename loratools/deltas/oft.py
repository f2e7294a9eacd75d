"""OFT: blocks of output rows rotated, W' = rescale ∘ (Rᵀ W) (Qiu et al., arXiv:2306.07280).

R = (I + Q)(I − Q)⁻¹ with Q = B − Bᵀ. The constraint bounds ‖Q‖ over all blocks by alpha · out, and
0 means no bound. (sd-scripts itself would let nothing turn then.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from loratools.deltas import rows
from loratools.deltas.base import LayerDelta, RowFold
from loratools.deltas.rotation import RotationFold, cayley, shrinkage, skew_parts

Dialect = Literal["lycoris", "sd-scripts"]


@dataclass(frozen=True, slots=True, eq=False)
class OFT(LayerDelta):
    """Block-diagonal rotation of the output rows.

    Attributes:
        blocks: (n, b, b) with n·b = out; only B − Bᵀ matters.
        constraint: the file's alpha; the bound on ‖Q‖ is constraint · out.
        rescale: (out[, 1...]), a trained length of each output row, or None.
        dialect: whose file it comes from; the mathematics is the same.
        shape: of the base weight, once known.
    """

    kind: ClassVar[str] = "oft"

    blocks: Tensor
    constraint: float
    rescale: Tensor | None = None
    dialect: Dialect = "lycoris"
    shape: tuple[int, ...] | None = None

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the base weight; (out, 1) as long as it is not known."""
        return self.shape or (self.out, 1)

    @property
    def out(self) -> int:
        """Number of output rows."""
        return self.blocks.shape[0] * self.blocks.shape[1]

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
        turn = cayley(skew_parts(self.blocks, self.bound)).mT.to(torch.float32).to(device)
        lengths = None if self.rescale is None else self.rescale.to(device, torch.float32).flatten()

        def rotate(matrix: Tensor) -> Tensor:
            return torch.bmm(turn, matrix.reshape(*turn.shape[:2], -1)).reshape(matrix.shape)

        return RotationFold(rotate, lengths, strength, transposed=transposed)

    def reshaped(self, weight_shape: Sequence[int]) -> OFT:
        if weight_shape[0] != self.out:
            raise self.misfit(weight_shape)
        return replace(self, shape=tuple(weight_shape))

    def _within_bound(self) -> Tensor:
        """Return blocks whose Q is the bounded one: as stored, where nothing had to shrink."""
        wide = self.blocks.to("cpu", torch.float64)
        factor = shrinkage(wide - wide.mT, self.bound)
        return rows.times(self.blocks, factor)

    def row_blocks(self, sizes: Sequence[int]) -> list[OFT]:
        """Divide the blocks; each part keeps the bound of the whole, which no longer binds."""
        width = self.blocks.shape[1]
        if any(size % width for size in sizes):
            raise self.refusal(
                f"split into {list(sizes)} rows", f"its rotations span blocks of {width} rows"
            )
        blocks = self._within_bound().split([size // width for size in sizes])
        lengths = [None] * len(sizes) if self.rescale is None else self.rescale.split(list(sizes))
        return [
            replace(
                self,
                blocks=block,
                constraint=self.constraint * self.out / size,
                rescale=length,
                shape=None if self.shape is None else (size, *self.shape[1:]),
            )
            for block, length, size in zip(blocks, lengths, sizes, strict=True)
        ]

    def rows_in_order(self, order: Tensor) -> OFT:
        """Move rows within blocks and blocks as a whole; raises UnsupportedError otherwise."""
        width = self.blocks.shape[1]
        grid = order.reshape(-1, width)
        if not torch.equal(grid // width, (grid[:, :1] // width).expand_as(grid)):
            raise self.refusal("reordered", f"its rotations span blocks of {width} rows")
        moved = rows.take(self.blocks, grid[:, 0] // width)
        within = (grid % width).to(moved.device)
        moved = moved[torch.arange(len(moved))[:, None, None], within[:, :, None], within[:, None]]
        rescale = None if self.rescale is None else rows.take(self.rescale, order)
        return replace(self, blocks=moved, rescale=rescale)

    @classmethod
    def fused(cls, parts: Sequence[OFT | None], sizes: Sequence[int]) -> OFT:
        """Stack the blocks, unit ones for ``None``; raises UnsupportedError if widths differ."""
        present = [part for part in parts if part is not None]
        first = present[0]
        width = first.blocks.shape[1]
        if any(part.blocks.shape[1] != width for part in present) or any(s % width for s in sizes):
            raise first.refusal("fused with others", "their blocks are of different sizes")
        blocks = rows.stack_rows(rows.each(parts, cls._within_bound), [s // width for s in sizes])
        bounds = [part.bound for part in present if part.bound is not None]
        # ‖Q‖ of the whole is at most the sum of its parts' bounds, so this one never binds.
        loose = sum(bounds) / sum(sizes) if len(bounds) == len(present) else 0.0
        shape = None if first.shape is None else (sum(sizes), *first.shape[1:])
        return cls(blocks, loose, _stacked_lengths(parts, sizes), first.dialect, shape)


def _stacked_lengths(parts: Sequence[OFT | None], sizes: Sequence[int]) -> Tensor | None:
    known = [part.rescale for part in parts if part is not None and part.rescale is not None]
    if not known:
        return None
    lengths = [
        torch.ones((size, *known[0].shape[1:]))
        if part is None or part.rescale is None
        else part.rescale
        for part, size in zip(parts, sizes, strict=True)
    ]
    return rows.stack_rows(lengths, sizes)
