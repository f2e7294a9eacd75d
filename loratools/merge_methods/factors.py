"""Methods on factors that are neither plain coefficients nor functions of small cores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from loratools.merge_methods import elementwise
from loratools.merge_methods.method import NEGLIGIBLE, Factors, Settings
from loratools.merge_methods.pruning import keep_largest, without_rounding


def knots_ties(
    parts: Sequence[Factors], weights: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Align by one SVD, then TIES (Stoica et al., arXiv:2410.19735).

    [ΔW₁ ... ΔW_T] = UΣ[V₁ ... V_T] with Vᵢ (R, n); result UΣ·TIES(V₁, ..., V_T), TIES trimming,
    electing and averaging elements of the Vᵢ. The authors' later program scales Vᵢ by Σ before it
    trims; the paper's formula, kept here, does not.
    """
    return _knots(parts, weights, settings, elementwise.ties)


def knots_dare_ties(
    parts: Sequence[Factors], weights: Tensor, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Return UΣ·DARE-TIES(V₁, ..., V_T) with the U, Σ, Vᵢ of ``knots_ties`` (arXiv:2410.19735)."""
    return _knots(parts, weights, settings, elementwise.dare_ties)


def _knots(
    parts: Sequence[Factors],
    weights: Tensor,
    settings: Settings,
    merge: Callable[[Tensor, Tensor, Settings], Tensor],
) -> tuple[Tensor, Tensor]:
    # [ΔW₁ ... ΔW_T] is [B₁ ... B_T] times the Aᵢ in blocks, and so is its QR.
    basis, upper = torch.linalg.qr(torch.cat([part.up * part.scale for part in parts], dim=1))
    bases, lowers = zip(*(torch.linalg.qr(part.down.T) for part in parts), strict=True)
    core = upper @ torch.block_diag(*lowers).T
    inner, values, outer = torch.linalg.svd(core, full_matrices=False)
    rank = int((values > NEGLIGIBLE * values.max()).sum()) if len(values) else 0
    if not rank:
        return basis.new_zeros(len(basis), 1), basis.new_zeros(1, len(bases[0]))
    blocks = zip(outer[:rank].split([one.shape[1] for one in bases], dim=1), bases, strict=True)
    aligned = torch.stack([block @ one.T for block, one in blocks])
    merged = merge(without_rounding(aligned), weights, settings)
    return basis @ (inner[:, :rank] * values[:rank]), merged


def robust(parts: Sequence[Factors], weights: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Prune and rescale complementary factors (Zeng et al., arXiv:2502.17159).

    Âᵢ and B̂ᵢ keep the largest ``density`` share of their elements; Sᵢ = Σ|Aᵢ|/Σ|Âᵢ| for each of
    the r rows of A; A = Σ cᵢÂᵢ, B = (Σ cᵢB̂ᵢ·diag Sᵢ)/diag Σ Sᵢ, ΔW = BA, cross terms included.
    λ of the paper and the adapters' scales are in cᵢ = √|wᵢsᵢ|, the sign on A's side. The authors'
    program also raises Sᵢ to its 80th percentile, which the formula does not have.
    """
    scaled = weights * torch.tensor([part.scale for part in parts], dtype=weights.dtype)
    root = scaled.abs().sqrt()[:, None, None]
    sign = scaled.sign()[:, None, None]
    downs, ups = torch.stack([p.down for p in parts]), torch.stack([p.up for p in parts])
    kept = torch.stack([keep_largest(down, settings.density) for down in downs])
    grown = torch.stack([keep_largest(up, settings.density) for up in ups])
    before, after = downs.abs().sum(dim=2), kept.abs().sum(dim=2)
    shares = torch.where(after > 0, before / after, 1)
    up = (root * grown * shares[:, None, :]).sum(dim=0) / shares.sum(dim=0)
    return up, (sign * root * kept).sum(dim=0)
