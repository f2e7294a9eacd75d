"""Norms and inner products of low-rank products, without building them."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def product_inner(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> float:
    """Return ⟨U₁V₁, U₂V₂⟩ (Frobenius) for factors (m, r₁), (r₁, n) and (m, r₂), (r₂, n).

    Computed in float64 from the r₁×r₂ Gram matrices: Σ (U₁ᵀU₂) ∘ (V₁V₂ᵀ).
    """
    (up1, down1), (up2, down2) = left, right
    rows = up1.to(torch.float64).T @ up2.to(torch.float64)
    columns = down1.to(torch.float64) @ down2.to(torch.float64).T
    return float((rows * columns).sum())


def product_norm(up: Tensor, down: Tensor) -> float:
    """Return ‖U V‖ (Frobenius) for U (m, r) and V (r, n), from r×r Gram matrices in float64."""
    return math.sqrt(max(product_inner((up, down), (up, down)), 0.0))
