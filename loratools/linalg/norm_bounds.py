"""How large can it be: a bound on an operator's norm, and on the energy a truncation missed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

FAILURE = 1e-6
"""Probability with which a bound may be too small, over the draw of the probes."""

_TINY = 1e-12
_STEPS = 40


def bound_largest_eigenvalue(
    operator: Callable[[Tensor], Tensor], probes: Tensor, *, failure: float = FAILURE
) -> Iterator[float]:
    """Yield ever better upper bounds on the largest eigenvalue of a positive operator.

    For a unit eigenvector u, every polynomial p has p(λ)²·‖uᵀZ‖² ≤ ‖p(A)Z‖². With Gaussian probes
    Z, ‖uᵀZ‖² has a χ² distribution and is almost never small; the best p of each degree comes from
    a Lanczos recurrence on the block as one long vector. (The idea of bounds by Lanczos
    polynomials: Hochstenbach, "Probabilistic upper bounds for the matrix two-norm", 2013.)

    Args:
        operator: symmetric, positive semidefinite; applied to (n, t) blocks, once for each bound.
        probes: (n, t), Gaussian, independent of the operator; projected onto its range if that is
            known.
        failure: probability that the bounds are too small.
    """
    ceiling = _square(probes) / _chi_square_quantile(probes.shape[1], failure)
    norm = math.sqrt(_square(probes))
    if norm == 0:
        yield 0.0
        return
    current, previous = probes / norm, torch.zeros_like(probes)
    diagonal: list[float] = []
    beside: list[float] = [0.0]
    while True:
        image = operator(current)
        diagonal.append(_inner(current, image))
        image = image - diagonal[-1] * current - beside[-1] * previous
        beside.append(math.sqrt(_square(image)))
        if beside[-1] <= _TINY * max(diagonal[0], *beside):
            # The block spans an invariant subspace: its Ritz values are all there is.
            yield _largest_ritz(diagonal, beside)
            return
        yield _outermost(diagonal, beside, ceiling)
        previous, current = current, image / beside[-1]


def _outermost(diagonal: list[float], beside: list[float], ceiling: float) -> float:
    """Return the x above the Ritz values where the sum of squared polynomials is ``ceiling``."""
    low = _largest_ritz(diagonal, beside)
    high = 2 * low + beside[-1]
    while _christoffel(high, diagonal, beside) < ceiling:
        high *= 2
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if _christoffel(middle, diagonal, beside) < ceiling:
            low = middle
        else:
            high = middle
    return high


def _christoffel(x: float, diagonal: list[float], beside: list[float]) -> float:
    """Return Σ φ_d(x)² over the orthonormal polynomials of the recurrence."""
    total, previous, current = 1.0, 0.0, 1.0
    for step, alpha in enumerate(diagonal):
        following = ((x - alpha) * current - beside[step] * previous) / beside[step + 1]
        previous, current = current, following
        total += current * current
    return total


def _largest_ritz(diagonal: list[float], beside: list[float]) -> float:
    matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    for place, value in enumerate(beside[1 : len(diagonal)]):
        matrix[place, place + 1] = matrix[place + 1, place] = value
    return max(float(torch.linalg.eigvalsh(matrix)[-1]), 0.0)


def _chi_square_quantile(freedom: int, probability: float) -> float:
    """Return an x with P(χ² ≤ x) ≤ probability: the density is below its power series' head."""
    half = freedom / 2
    return 2 * math.exp((math.log(probability) + math.lgamma(half + 1)) / half)


def energy_missed(ritz: Tensor, residual: float, largest: float) -> float:
    """Return by how much the k largest eigenvalues of A can exceed its k Ritz values, in sum.

    For A = [[Θ, Cᵀ], [C, H]] in a basis that begins with the Ritz vectors and any μ > λ_max(H),
    A ≤ diag(Θ + CᵀC/(μ − λ_max(H)), μ·I), whose k largest eigenvalues sum up to at most
    Σ max(θ_j, μ) + ‖C‖²/(μ − λ_max(H)). No gap is assumed; the best μ is taken.

    Args:
        ritz: (k,), the Ritz values θ.
        residual: ‖C‖² (Frobenius), the sum of squared residuals ‖A v_j − θ_j v_j‖².
        largest: λ_max(H), or an upper bound.
    """
    theta = ritz.cpu().to(torch.float64)
    gaps = (theta - largest)[theta > largest]
    scale = math.sqrt(residual / len(theta)) or largest or 1.0
    tries = scale * torch.logspace(-4, 4, 81, base=4, dtype=torch.float64)
    steps = torch.cat([tries, gaps]).clamp_min(torch.finfo(torch.float64).tiny)
    raised = (largest + steps[:, None] - theta).clamp_min(0).sum(dim=1)
    return float((raised + residual / steps).min())


def _square(block: Tensor) -> float:
    columns = torch.linalg.vector_norm(block, dim=0).cpu()
    return float(torch.linalg.vector_norm(columns, dtype=torch.float64)) ** 2


def _inner(one: Tensor, other: Tensor) -> float:
    return float((one * other).sum(dim=0).cpu().sum(dtype=torch.float64))
