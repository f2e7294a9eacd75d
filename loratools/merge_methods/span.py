"""Methods whose result is Σ cᵢΔWᵢ: coefficients from the Gram matrix Gᵢⱼ = ⟨ΔWᵢ, ΔWⱼ⟩.

Every function takes the Gram matrix (T, T) and the weights (T,), float64, and returns (T,).
Nothing of size m×n is needed, and the result is exact.
"""

from __future__ import annotations

import torch
from torch import Tensor

_NEARLY_PARALLEL = 0.9995  # mergekit's DOT_THRESHOLD
_PARALLEL = 1e-8  # mergekit's eps of NuSLERP, on sin Ω
_STEPS, _STILL = 100, 1e-12


def linear(gram: Tensor, weights: Tensor) -> Tensor:
    """Return cᵢ = wᵢ: task arithmetic, Σ wᵢΔWᵢ (Ilharco et al., arXiv:2212.04089)."""
    return weights.clone()


def slerp(gram: Tensor, weights: Tensor) -> Tensor:
    """Return spherical interpolation's coefficients (Shoemake 1985, doi:10.1145/325165.325242).

    c₁ = sin((1−t)Ω)/sin Ω and c₂ = sin(tΩ)/sin Ω, where t = w₂/(w₁+w₂) and Ω is the angle between
    ΔW₁ and ΔW₂; linear, 1−t and t, where |cos Ω| > 0.9995 or one of them is zero.
    """
    cosine = cosines(gram)[0, 1]
    return _on_arc(gram, weights, straight=bool(cosine.abs() > _NEARLY_PARALLEL))


def nuslerp(gram: Tensor, weights: Tensor) -> Tensor:
    """Return the coefficients of ``slerp``, linear only where sin Ω < 1e-8 (mergekit's NuSLERP)."""
    angle = torch.arccos(cosines(gram)[0, 1])
    return _on_arc(gram, weights, straight=bool(angle.sin().abs() < _PARALLEL))


def _on_arc(gram: Tensor, weights: Tensor, *, straight: bool) -> Tensor:
    shares = weights / weights.sum()
    if straight or not bool((gram.diagonal() > 0).all()):
        return shares
    angle = torch.arccos(cosines(gram)[0, 1])
    return torch.sin(shares * angle) / torch.sin(angle)


def karcher(gram: Tensor, weights: Tensor) -> Tensor:
    """Return the coefficients of the Karcher mean on the sphere (doi:10.1002/cpa.3160300502).

    With uᵢ = ΔWᵢ/‖ΔWᵢ‖ and shares aᵢ = wᵢ/Σw, the mean direction μ solves
    Σ aᵢ·log_μ(uᵢ) = 0, log_μ(u) = θ/sin θ·(u − cos θ·μ), θ = ∠(u, μ), found by steps
    μ ← exp_μ(Σ aᵢ·log_μ(uᵢ)) from the normalised Σ aᵢuᵢ; the result is Σ aᵢ‖ΔWᵢ‖ · μ. Zero
    changes have no direction and count in the length alone.
    """
    lengths = gram.diagonal().clamp(min=0).sqrt()
    present = lengths > 0
    if not bool(present.any()):
        return torch.zeros_like(weights)
    shares = weights / weights.sum()
    among = torch.where(present, shares, 0)
    if float(among.sum()) == 0:
        return torch.zeros_like(weights)
    mean = _mean_direction(cosines(gram), among / among.sum())
    return float(shares @ lengths) * torch.where(present, mean / lengths, 0)


def _mean_direction(cosine: Tensor, shares: Tensor) -> Tensor:
    """Return the mean's coordinates in the unit vectors whose Gram matrix is ``cosine``."""
    mean = _unit(shares, cosine)
    for _ in range(_STEPS):
        near = (cosine @ mean).clamp(-1, 1)
        angles = torch.arccos(near)
        stretch = torch.where(angles > _STILL, angles / angles.sin().clamp(min=_STILL), 1)
        tangent = shares * stretch - (shares * stretch * near).sum() * mean
        length = (tangent @ cosine @ tangent).clamp(min=0).sqrt()
        if float(length) < _STILL:
            break
        mean = _unit(length.cos() * mean + length.sin() / length * tangent, cosine)
    return mean


def _unit(vector: Tensor, cosine: Tensor) -> Tensor:
    """Return the combination of unit vectors at length 1; the first of them where it cancels."""
    length = (vector @ cosine @ vector).clamp(min=0).sqrt()
    if float(length) > _STILL:
        return vector / length
    first = torch.zeros_like(vector)
    first[int(vector.ne(0).nonzero()[0])] = 1
    return first


def cosines(gram: Tensor) -> Tensor:
    """Return the cosines between changes, (T, T); those with a zero change are 0."""
    lengths = gram.diagonal().clamp(min=0).sqrt()
    scaled = gram / (lengths[:, None] * lengths).clamp(min=torch.finfo(gram.dtype).tiny)
    return scaled.clamp(-1, 1)
