"""Certificates of a truncation: its exact error, and a bound on how much better any could be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import islice

import torch
from torch import Tensor

from loratools.linalg.factored import SVD
from loratools.linalg.norm_bounds import bound_largest_eigenvalue, energy_missed

_PROBES = 16
_PROBE_STEPS = 6

_CANCELLATION = 1e-2
"""Share of the energy below which the error is measured on the residual itself: float32 norms
differ by about 1e-6 of the whole."""

NOTHING = 1e-9
"""Share of the energy that float32 cannot tell from nothing."""

_ROWS = 512


class Sketched:
    """What one round of the sketch found.

    Attributes:
        kept: the triplets that would be returned.
        ritz: those of the basis alone, half a step earlier; at least as many.
        seen: (width, n), the matrix as the left vectors of ``ritz`` see it.
        error: ‖M − kept‖ / ‖M‖.
    """

    def __init__(self, matrix: Tensor, norm: float, kept: SVD, ritz: SVD, seen: Tensor) -> None:
        self.matrix, self.norm, self.kept = matrix, norm, kept
        self.leading = ritz.leading(kept.values.shape[0])
        self.error = relative_error(matrix, kept, norm)
        self.theta = energies_of(self.leading.values)
        following = ritz.values[len(self.theta) :]
        self.next = float(following[0]) ** 2 if len(following) else 0.0
        right, values = self.leading.right, self.leading.values[:, None]
        off = values * (seen[: len(self.theta)] - values * right)
        self.residual = matrix_norm(off) ** 2

    def missed(self, largest: float) -> float:
        """Return how much more ‖·‖² another choice of as many vectors could hold.

        ``largest``: the largest eigenvalue of MᵀM outside the span of the Ritz vectors.
        """
        whole = energy_missed(self.theta, self.residual, largest)
        # The half step has won some of that already, as far as float32 can tell.
        won = float(energies_of(self.kept.values).sum() - self.theta.sum())
        noise = torch.finfo(self.matrix.dtype).eps * self.norm**2
        return max(min(whole, whole - won + noise), 0.0)


def certified_least(
    state: Sketched, tolerance: float, seed: torch.Generator, hope: float
) -> float | None:
    """Return a lower bound on the relative error of this rank, or None if it proves too little.

    ``hope``: how near its lower bound the upper bound on what follows must come to try at all.
    """
    lost = state.error**2
    if lost <= NOTHING:
        return 0.0
    allowed = lost * (1 - tolerance**-2) * state.norm**2
    if state.missed(hope * state.next) > allowed:
        return None
    for bound in islice(_bounds_outside(state.matrix, state.leading.right, seed), _PROBE_STEPS):
        missed = state.missed(bound)
        if missed <= allowed:
            return math.sqrt(max(lost - missed / state.norm**2, 0.0))
    return None


def _bounds_outside(matrix: Tensor, rows: Tensor, seed: torch.Generator) -> Iterator[float]:
    """Yield upper bounds on the largest eigenvalue of MᵀM outside the span of ``rows``, (k, n)."""

    def outside(block: Tensor) -> Tensor:
        return block - rows.T @ (rows @ block)

    def operator(block: Tensor) -> Tensor:
        image = matrix @ outside(block)
        return outside((image.T @ matrix).T)

    return bound_largest_eigenvalue(operator, outside(gaussian(matrix, _PROBES, seed)))


def gaussian(matrix: Tensor, width: int, seed: torch.Generator) -> Tensor:
    """Return an (n, width) block; drawn on the CPU, so that every device gets the same."""
    block = torch.randn(matrix.shape[1], width, generator=seed, dtype=matrix.dtype)
    return block.to(matrix.device)


def matrix_norm(matrix: Tensor) -> float:
    """Return ‖M‖: rows in the matrix's precision, their sum in float64."""
    # Some devices have no float64.
    rows = torch.linalg.vector_norm(matrix, dim=1).cpu()
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))


def energies_of(values: Tensor) -> Tensor:
    """Return squared singular values in float64, on the CPU."""
    return values.cpu().to(torch.float64).square()


def relative_error(matrix: Tensor, kept: SVD, norm: float) -> float:
    """Return ‖M − USV‖ / ‖M‖, from the norms where they suffice."""
    energy = float(energies_of(kept.values).sum())
    share = max(1 - energy / norm**2, 0.0)
    if share > _CANCELLATION:
        return math.sqrt(share)
    scaled = kept.left * kept.values
    square = 0.0
    for start in range(0, matrix.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        square += matrix_norm(matrix[rows] - scaled[rows] @ kept.right) ** 2
    return math.sqrt(square) / norm
