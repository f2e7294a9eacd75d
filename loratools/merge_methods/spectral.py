"""Methods on singular vectors; they commute with rotations, so small cores stand for ΔW.

If f(QᵀΔ₁P, ..., QᵀΔ_T P) = Qᵀf(Δ₁, ..., Δ_T)P for orthonormal Q and P that span all column and row
spaces, f may be computed on the R×R cores QᵀΔᵢP. Singular vectors of zero singular values, which
are arbitrary and would break this, take no part.

Every function takes changes (T, m, n), weights (T,), float64, and the smaller side of the full
matrices, which a rule may count; it returns (m, n).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.merge_methods.method import NEGLIGIBLE


def tsv_m(deltas: Tensor, weights: Tensor, side: int) -> Tensor:
    """Merge task singular vectors (Gargiulo et al., arXiv:2412.00081).

    ΔWᵢ ≈ UᵢΣᵢVᵢᵀ with the leading k = ⌊min(m, n)/T⌋ triplets; U = [U₁ ... U_T], V likewise,
    Σ = diag(w₁Σ₁ ... w_TΣ_T); result U⊥ΣV⊥ᵀ, where X⊥ = PQᵀ of X = PDQᵀ is the orthogonal matrix
    nearest to X.

    Args:
        deltas: (T, m, n), or their cores.
        weights: (T,).
        side: the smaller side of the full matrices.
    """
    keep = max(1, side // len(deltas))
    parts = [_triplets(delta, keep) for delta in deltas]
    left = torch.cat([part[0] for part in parts], dim=1)
    right = torch.cat([part[2] for part in parts], dim=0)
    scaled = [w * part[1] for w, part in zip(weights, parts, strict=True)]
    return (_orthogonal(left) * torch.cat(scaled)) @ _orthogonal(right)


def iso_c(deltas: Tensor, weights: Tensor, side: int) -> Tensor:
    """Make the sum isotropic (Marczak et al., arXiv:2502.04959).

    Σ wᵢΔWᵢ = UΣVᵀ; result σ̄·UVᵀ with σ̄ = (1/R) Σ σᵣ over the R nonzero singular values. The
    authors' program averages over min(m, n) values and gives the arbitrary vectors of zero ones σ̄
    too: the same for full rank, but for low rank it would add noise in every direction.
    """
    left, values, right = _triplets(torch.einsum("t,tmn->mn", weights, deltas), side)
    return values.mean() * (left @ right) if len(values) else torch.zeros_like(deltas[0])


def _triplets(matrix: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the leading singular triplets, at most ``most``, without those of zero values."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    nonzero = int((values > NEGLIGIBLE * values.max()).sum()) if values.numel() else 0
    rank = min(most, nonzero)
    return left[:, :rank], values[:rank], right[:rank]


def _orthogonal(matrix: Tensor) -> Tensor:
    """Return the polar factor: the nearest matrix with orthonormal columns or rows."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    nonzero = values > NEGLIGIBLE * values.max() if values.numel() else values > 0
    nearest: Tensor = (left * nonzero) @ right
    return nearest
