"""What OFT and BOFT share: Cayley rotations of blocks, and folding a rotated weight."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratools.deltas.base import RowFold, accumulate


def skew_parts(blocks: Tensor, bound: float | None) -> Tensor:
    """Return Q = B − Bᵀ in float64, shrunk as a whole to ‖Q‖ ≤ ``bound`` if there is one."""
    wide = blocks.to("cpu", torch.float64)
    skew = wide - wide.mT
    return skew * shrinkage(skew, bound)


def shrinkage(skew: Tensor, bound: float | None) -> float:
    """Return the factor that brings ‖Q‖, over all blocks together, within the bound."""
    norm = float(torch.linalg.vector_norm(skew))
    return 1.0 if bound is None or norm <= bound else bound / norm


def cayley(skew: Tensor) -> Tensor:
    """Return (I + Q)(I − Q)⁻¹ of each block, an orthogonal matrix."""
    unit = torch.eye(skew.shape[-1], dtype=skew.dtype)
    # The two factors commute.
    rotation: Tensor = torch.linalg.solve(unit - skew, unit + skew)
    return rotation


class RotationFold(RowFold):
    """Adds strength · (rescale ∘ rotate(W) − W) of a whole weight."""

    reach = "whole"

    def __init__(
        self,
        rotate: Callable[[Tensor], Tensor],
        rescale: Tensor | None,
        strength: float,
        *,
        transposed: bool,
    ) -> None:
        self.rotate = rotate
        self.rescale = rescale
        self.strength = strength
        self.transposed = transposed

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        matrix = weight.T if self.transposed else weight
        moved = self.rotate(matrix)
        if self.rescale is not None:
            moved = moved * self.rescale[:, None]
        gone = (moved - matrix).mul_(self.strength)
        accumulate(change, gone.T if self.transposed else gone, first=first)
