"""Kronecker products by rows, and their factors of least rank."""

from __future__ import annotations

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]


def kron_rows(first: Tensor, second: Tensor, start: int, stop: int) -> Tensor:
    """Return rows ``start`` to ``stop`` of ``first`` ⊗ ``second``, (stop − start, i₁·i₂)."""
    rows = torch.arange(start, stop, device=first.device)
    height = second.shape[0]
    outer, inner = first[rows // height], second[rows % height]
    return (outer[:, :, None] * inner[:, None, :]).flatten(1)


def kron_factors(first: Factors, second: Factors) -> Factors:
    """Return (up, down) of (U₁V₁) ⊗ (U₂V₂) = (U₁ ⊗ U₂)(V₁ ⊗ V₂); ranks multiply."""
    return torch.kron(first[0], second[0]), torch.kron(first[1], second[1])


def least_factors(up: Tensor, down: Tensor) -> Factors:
    """Return float32 (up, down) of the same product with as few columns as its rank.

    Singular values at the rounding level of float64 are taken for zero. Rank 0 comes out as one
    zero column. Costs O((m + n)·r²): QR of both factors and the SVD of an r×r core.
    """
    basis, left = torch.linalg.qr(up.to(torch.float64))
    cobasis, right = torch.linalg.qr(down.to(torch.float64).T)
    core_up, values, core_down = torch.linalg.svd(left @ right.T, full_matrices=False)
    size = max(up.shape[0], down.shape[1])
    floor = float(values.max()) * size * torch.finfo(torch.float64).eps
    rank = max(1, int((values > floor).sum()))
    root = values[:rank].sqrt()
    ups, downs = basis @ core_up[:, :rank] * root, root[:, None] * core_down[:rank] @ cobasis.T
    return ups.to(torch.float32), downs.to(torch.float32)


def least_factors_of(matrix: Tensor) -> Factors:
    """Return ``least_factors`` of a full matrix."""
    rows, columns = matrix.shape
    if rows <= columns:
        return least_factors(torch.eye(rows), matrix)
    return least_factors(matrix, torch.eye(columns))
