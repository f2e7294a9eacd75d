"""Truncated SVD of a dense matrix by a block Krylov method, with certificates.

Two are given: the exact error of the result, and a bound on how much better the best result of
the same rank could be. The method stops when that bound is good enough, and goes over to the dense
SVD where that is cheaper. (Musco and Musco, arXiv:1504.05477; Halko et al., arXiv:0909.4061.)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import chain, repeat

import torch
from torch import Tensor

from loratools.linalg.certificates import (
    NOTHING,
    Sketched,
    certified_least,
    energies_of,
    gaussian,
    matrix_norm,
    relative_error,
)
from loratools.linalg.factored import SVD

TOLERANCE = 1.02
"""Largest error accepted, as a multiple of the least that the rank allows."""

OVERSAMPLING = 16
_FIRST_RANK = 16
"""Where the search for a rank by energy begins."""

_HOPES = (1.12, 1.12)
"""How near its lower bound an upper bound can be expected, in the first rounds: later a flat
spectrum may be exactly so."""

_SMALL = 96
"""Shortest side up to which the dense SVD takes no longer than a sketch."""

_DENSE_SHARE = 0.5
"""Share of the shortest side that the basis may grow to before the dense SVD takes over."""


@dataclass(frozen=True, slots=True, eq=False)
class Truncation:
    """The leading triplets of a matrix and what they leave.

    Attributes:
        svd: the triplets kept.
        norm: ‖M‖ (Frobenius).
        error: ‖M − USV‖ / ‖M‖, measured.
        least: a lower bound on that of any matrix of this rank; for a sketch it holds with a
            probability of 1 − 1e-6.
        dense: whether the dense SVD was computed.
    """

    svd: SVD
    norm: float
    error: float
    least: float
    dense: bool

    @property
    def rank(self) -> int:
        """Number of triplets."""
        return self.svd.values.shape[-1]

    @property
    def captured(self) -> float:
        """Share of ‖M‖² that the triplets hold."""
        return 1.0 - self.error**2


Rule = Callable[[Tensor, float], int]
"""(Leading energies σ², descending, float64; ‖M‖²) → how many are wanted; where more are wanted
than are given, how many at least."""


def truncated_svd(
    matrix: Tensor, rank: int, *, exact: bool = False, tolerance: float = TOLERANCE
) -> Truncation:
    """Return the leading ``rank`` triplets, with an error at most ``tolerance`` times the least.

    Deterministic: the sketch is seeded.

    Args:
        matrix: (m, n), float32 or float64, finite.
        rank: from 1; more than min(m, n) means all.
        exact: compute the dense SVD.
        tolerance: above 1.
    """
    side = min(matrix.shape)
    return _truncate(matrix, lambda energies, total: min(rank, side), exact, tolerance)


def truncated_svd_of_energy(
    matrix: Tensor,
    energy: float,
    *,
    ceiling: int | None = None,
    exact: bool = False,
    tolerance: float = TOLERANCE,
) -> Truncation:
    """Return as few leading triplets as hold the share ``energy`` of ‖M‖².

    Args:
        matrix: see ``truncated_svd``.
        energy: in (0, 1]; 1 means all that the dtype can tell from zero.
        ceiling: the largest rank, whatever that holds.
        exact: see ``truncated_svd``.
        tolerance: see ``truncated_svd``.
    """
    side = min(matrix.shape) if ceiling is None else min(*matrix.shape, ceiling)
    finest = 4 * torch.finfo(matrix.dtype).eps ** 2 * max(matrix.shape)
    share = min(energy, 1 - finest)
    return _truncate(matrix, lambda e, total: _count(e, total * share, side), exact, tolerance)


def _count(energies: Tensor, wanted: float, most: int) -> int:
    """Return how many leading energies reach ``wanted``, or at least how many would."""
    if len(energies) == 0:
        return min(_FIRST_RANK, most)
    sums = energies.cumsum(0)
    count = int((sums < wanted * (1 - 1e-14)).sum()) + 1
    if count > len(energies):
        # Those to come are no larger than the last.
        step = max(float(energies[-1]), wanted * NOTHING)
        count = len(energies) + max(1, math.ceil((wanted - float(sums[-1])) / step))
    return min(count, most)


def randomized_svd(
    matrix: Tensor,
    rank: int,
    *,
    oversampling: int = OVERSAMPLING,
    tolerance: float = TOLERANCE,
    generator: torch.Generator | None = None,
) -> tuple[SVD, float]:
    """Return the leading ``rank`` triplets and the measured relative error ‖M − USV‖ / ‖M‖.

    Args:
        matrix: (m, n), float32 or float64.
        rank: at most min(m, n).
        oversampling: extra columns of the sketch.
        tolerance: largest error, as a multiple of the least that the rank allows.
        generator: seeds the sketch; by default always alike.
    """
    side = min(matrix.shape)
    found = _truncate(
        matrix, lambda energies, total: min(rank, side), False, tolerance, oversampling, generator
    )
    return found.svd, found.error


def _truncate(
    matrix: Tensor,
    rule: Rule,
    exact: bool,
    tolerance: float,
    oversampling: int = OVERSAMPLING,
    generator: torch.Generator | None = None,
) -> Truncation:
    """Sketch until the rule is met and the certificate holds, or compute the dense SVD."""
    if matrix.shape[0] < matrix.shape[1]:
        turned = _truncate(matrix.T, rule, exact, tolerance, oversampling, generator)
        return replace(turned, svd=_transposed(turned.svd))
    norm = matrix_norm(matrix)
    if norm == 0:
        return _nothing(matrix)
    side = matrix.shape[1]
    seed = torch.Generator().manual_seed(0) if generator is None else generator
    width = rule(torch.zeros(0, dtype=torch.float64), norm**2) + oversampling
    if not exact and side > _SMALL and width < _DENSE_SHARE * side:
        found = _sketched(matrix, norm, rule, width, oversampling, tolerance, seed)
        if found is not None:
            return found
    return _dense(matrix, rule)


def _dense(matrix: Tensor, rule: Rule) -> Truncation:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    energies = energies_of(values)
    total = float(energies.sum())
    rank = max(1, rule(energies, total))
    share = math.sqrt(float(energies[rank:].sum()) / total)
    kept = SVD(left, values, right).leading(rank)
    error = relative_error(matrix, kept, math.sqrt(total))
    # A computed error below the singular values' own rounding is no contradiction.
    return Truncation(kept, math.sqrt(total), error, min(share, error), dense=True)


def _nothing(matrix: Tensor) -> Truncation:
    rows, columns = matrix.shape
    left = torch.eye(rows, 1, dtype=matrix.dtype, device=matrix.device)
    right = torch.eye(1, columns, dtype=matrix.dtype, device=matrix.device)
    return Truncation(SVD(left, left.new_zeros(1), right), 0.0, 0.0, 0.0, dense=False)


def _transposed(svd: SVD) -> SVD:
    return SVD(svd.right.mT, svd.values, svd.left.mT)


# ── the sketch ───────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class _Basis:
    """An orthonormal basis of the rows' space, grown block by block, and its image.

    Attributes:
        matrix: (m, n), m ≥ n.
        right: (n, l), orthonormal.
        left: (m, l), matrix @ right.
    """

    matrix: Tensor
    right: Tensor
    left: Tensor

    @classmethod
    def of(cls, matrix: Tensor, block: Tensor) -> _Basis:
        right = torch.linalg.qr(block).Q
        return cls(matrix, right, matrix @ right)

    def extended(self, block: Tensor) -> _Basis:
        """Return the basis with what a block adds to it."""
        for _ in range(2):  # once leaves what rounding left
            block = block - self.right @ (self.right.T @ block)
            block = torch.linalg.qr(block).Q
        return _Basis(
            self.matrix,
            torch.cat([self.right, block], dim=1),
            torch.cat([self.left, self.matrix @ block], dim=1),
        )

    def ritz(self, width: int) -> SVD:
        """Return the leading triplets of the matrix restricted to the basis."""
        frame, core = torch.linalg.qr(self.left)
        inner, values, outer = torch.linalg.svd(core)
        return SVD(frame @ inner[:, :width], values[:width], outer[:width] @ self.right.T)


def _sketched(
    matrix: Tensor,
    norm: float,
    rule: Rule,
    width: int,
    oversampling: int,
    tolerance: float,
    seed: torch.Generator,
) -> Truncation | None:
    """Return the certified truncation, or None where the basis grows too large for a sketch."""
    basis = _Basis.of(matrix, gaussian(matrix, width, seed))
    hopes = chain(_HOPES, repeat(1.0))
    while True:
        ritz = basis.ritz(width)
        # Half a step more: what these left vectors see of the matrix.
        seen = ritz.left.T @ matrix
        inner, values, right = torch.linalg.svd(seen, full_matrices=False)
        rank = max(1, rule(energies_of(values), norm**2))
        missing = rank + oversampling - width
        if missing <= 0:
            kept = SVD(ritz.left @ inner, values, right).leading(rank)
            state = Sketched(matrix, norm, kept, ritz, seen)
            least = certified_least(state, tolerance, seed, next(hopes))
            if least is not None:
                return Truncation(kept, norm, state.error, least, dense=False)
        width = max(width, rank + oversampling)
        if basis.right.shape[1] + width > _DENSE_SHARE * matrix.shape[1]:
            return None
        fresh = [gaussian(matrix, missing, seed)] if missing > 0 else []
        basis = basis.extended(torch.cat([seen.T, *fresh], dim=1))
