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
    """Return float32 (up, down) of (U₁V₁) ⊗ (U₂V₂) = (U₁ ⊗ U₂)(V₁ ⊗ V₂); ranks multiply."""
    up, down = (_kron(one, two) for one, two in zip(first, second, strict=True))
    return up.to(torch.float32), down.to(torch.float32)


def _kron(first: Tensor, second: Tensor) -> Tensor:
    # torch.kron (2.13) raises on matrices of one column whose strides are unusual.
    height, width = first.shape[0] * second.shape[0], first.shape[1] * second.shape[1]
    return (first[:, None, :, None] * second[None, :, None, :]).reshape(height, width)


def least_factors_of(matrix: Tensor, size: int = 0) -> Factors:
    """Return float64 (up, down) of a full matrix with as few columns as its rank.

    Singular values at the rounding level of float64, of a matrix at least ``size`` long, are
    taken for zero. Rank 0 comes out as one zero column.
    """
    left, values, right = torch.linalg.svd(matrix.to(torch.float64), full_matrices=False)
    floor = float(values.max()) * max(size, *matrix.shape) * torch.finfo(torch.float64).eps
    rank = max(1, int((values > floor).sum()))
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def least_factors(up: Tensor, down: Tensor) -> Factors:
    """Return float64 (up, down) of the same product with as few columns as its rank.

    Costs O((m + n)·r²): QR of both factors and the SVD of an r×r core.
    """
    basis, left = torch.linalg.qr(up.to(torch.float64))
    cobasis, right = torch.linalg.qr(down.to(torch.float64).T)
    up, down = least_factors_of(left @ right.T, max(up.shape[0], down.shape[1]))
    return basis @ up, down @ cobasis.T
