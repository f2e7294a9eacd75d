"""The SVD of a product from its factors: the same triplets as the dense SVD, without the matrix."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class SVD:
    """A thin singular value decomposition, of one matrix or of a batch of equal shape.

    Attributes:
        left: (..., m, k), orthonormal columns.
        values: (..., k), descending, not negative.
        right: (..., k, n), orthonormal rows.
    """

    left: Tensor
    values: Tensor
    right: Tensor

    def leading(self, rank: int) -> SVD:
        """Return the first ``rank`` triplets: the best approximation of that rank."""
        return SVD(self.left[..., :rank], self.values[..., :rank], self.right[..., :rank, :])


def factored_svd(up: Tensor, down: Tensor) -> SVD:
    """Return the SVD of ``up @ down`` with k = min(m, r, n) triplets.

    Orthogonal factors of up and downᵀ, then the SVD of the r×r core R_u R_dᵀ: O((m + n)r² + r³).
    Computed in the factors' dtype, on their device.

    Args:
        up: (..., m, r), float32 or float64.
        down: (..., r, n), of the same dtype.
    """
    left, left_core = torch.linalg.qr(up)
    right, right_core = torch.linalg.qr(down.mT)
    inner, values, outer = torch.linalg.svd(left_core @ right_core.mT, full_matrices=False)
    return SVD(left @ inner, values, outer @ right.mT)
