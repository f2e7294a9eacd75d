"""What a spectrum says: how many singular values a rule keeps, and how many there really are.

``values`` is always (k,), descending and not negative; sums are float64. A rule keeps at least one
value, and one of an all-zero spectrum.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def energy_rank(values: Tensor, share: float) -> int:
    """Return the least rank whose Σσ² is at least ``share`` (0 to 1) of the whole."""
    return _reaches(values.to(torch.float64).square(), share)


def cumulative_rank(values: Tensor, share: float) -> int:
    """Return the least rank whose Σσ is at least ``share`` (0 to 1) of the whole."""
    return _reaches(values.to(torch.float64), share)


def fro_rank(values: Tensor, share: float) -> int:
    """Return the least rank whose Frobenius norm is at least ``share`` (0 to 1) of the whole."""
    return energy_rank(values, share * share)


def ratio_rank(values: Tensor, ratio: float) -> int:
    """Return the number of values above σ₁/``ratio`` (``ratio`` ≥ 1)."""
    wide = values.to(torch.float64)
    return max(1, int((wide > wide[:1] / ratio).sum()))


def _reaches(weights: Tensor, share: float) -> int:
    sums = weights.cumsum(0)
    if not len(sums) or float(sums[-1]) == 0:
        return 1
    return int(torch.searchsorted(sums, share * sums[-1])) + 1


def retained_energy(values: Tensor, rank: int) -> float:
    """Return Σσ² of the first ``rank`` values as a share of the whole; 1 where that is zero."""
    squares = values.to(torch.float64).square()
    whole = float(squares.sum())
    return float(squares[:rank].sum()) / whole if whole else 1.0


def truncation_error(values: Tensor, rank: int) -> float:
    """Return ‖M − M_rank‖ / ‖M‖ (Frobenius) of the best approximation; 0 where M is zero.

    Summed over the tail, which 1 − ``retained_energy`` would lose to cancellation.
    """
    squares = values.to(torch.float64).square()
    whole = float(squares.sum())
    return math.sqrt(float(squares[rank:].sum()) / whole) if whole else 0.0


def effective_rank(values: Tensor) -> float:
    """Return exp(−Σ pᵢ ln pᵢ) with p = σ/Σσ (Roy & Vetterli, EUSIPCO 2007); 0 where M is zero."""
    wide = values.to(torch.float64)
    whole = float(wide.sum())
    if not whole:
        return 0.0
    shares = wide / whole
    return math.exp(float(torch.special.entr(shares).sum()))


def stable_rank(values: Tensor) -> float:
    """Return ‖M‖²_F / ‖M‖²₂, at most the rank (Rudelson & Vershynin 2007); 0 where M is zero."""
    squares = values.to(torch.float64).square()
    top = float(squares[0]) if len(squares) else 0.0
    return float(squares.sum()) / top if top else 0.0
