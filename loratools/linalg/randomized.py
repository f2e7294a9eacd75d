"""Truncated SVD of a dense matrix by a block Krylov method, with certificates.

Two are given: the exact error of the result, and a bound on how much better the best result of
the same rank could be. The method stops when that bound is good enough, and goes over to the dense
SVD where that is cheaper. (Musco and Musco, arXiv:1504.05477; Halko et al., arXiv:0909.4061.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import chain, islice, repeat

import torch
from torch import Tensor

from loratools.linalg.factored import SVD
from loratools.linalg.norm_bounds import bound_largest_eigenvalue, energy_missed

TOLERANCE = 1.02
"""Largest error accepted, as a multiple of the least that the rank allows."""

OVERSAMPLING = 16
_PROBES = 16
_PROBE_STEPS = 6
_HOPES = (1.12, 1.12)
"""How near its lower bound an upper bound can be expected, in the first rounds: later a flat
spectrum may be exactly so."""

_SMALL = 96
"""Shortest side up to which the dense SVD takes no longer than a sketch."""

_DENSE_SHARE = 0.5
"""Share of the shortest side that the basis may grow to before the dense SVD takes over."""

_CANCELLATION = 1e-2
"""Share of the energy below which the error is measured on the residual itself: float32 norms
differ by about 1e-6 of the whole."""

_ALL = 1e-9
"""Share of the energy that float32 cannot tell from nothing."""

_ROWS = 512


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
        return min(_PROBES, most)
    sums = energies.cumsum(0)
    count = int((sums < wanted * (1 - 1e-14)).sum()) + 1
    if count > len(energies):
        # Those to come are no larger than the last.
        step = max(float(energies[-1]), wanted * _ALL)
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
    norm = _norm(matrix)
    if norm == 0:
        return _nothing(matrix)
    side = matrix.shape[1]
    seed = torch.Generator().manual_seed(0) if generator is None else generator
    width = rule(matrix.new_zeros(0, dtype=torch.float64), norm**2) + oversampling
    if not exact and side > _SMALL and width < _DENSE_SHARE * side:
        found = _sketched(matrix, norm, rule, width, oversampling, tolerance, seed)
        if found is not None:
            return found
    return _dense(matrix, rule)


def _dense(matrix: Tensor, rule: Rule) -> Truncation:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    energies = values.to(torch.float64).square()
    total = float(energies.sum())
    rank = max(1, rule(energies, total))
    share = math.sqrt(float(energies[rank:].sum()) / total)
    kept = SVD(left, values, right).leading(rank)
    error = _error(matrix, kept, math.sqrt(total))
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
    basis = _Basis.of(matrix, _gaussian(matrix, width, seed))
    hopes = chain(_HOPES, repeat(1.0))
    while True:
        ritz = basis.ritz(width)
        # Half a step more: what these left vectors see of the matrix.
        seen = ritz.left.T @ matrix
        inner, values, right = torch.linalg.svd(seen, full_matrices=False)
        rank = max(1, rule(values.to(torch.float64).square(), norm**2))
        missing = rank + oversampling - width
        if missing <= 0:
            kept = SVD(ritz.left @ inner, values, right).leading(rank)
            state = _State(matrix, norm, kept, ritz, seen)
            least = _certified_least(state, tolerance, seed, next(hopes))
            if least is not None:
                return Truncation(kept, norm, state.error, least, dense=False)
        width = max(width, rank + oversampling)
        if basis.right.shape[1] + width > _DENSE_SHARE * matrix.shape[1]:
            return None
        fresh = [_gaussian(matrix, missing, seed)] if missing > 0 else []
        basis = basis.extended(torch.cat([seen.T, *fresh], dim=1))


# ── the certificate ──────────────────────────────────────────────────────────────────────────


class _State:
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
        self.error = _error(matrix, kept, norm)
        self.theta = self.leading.values.to(torch.float64).square()
        following = ritz.values[len(self.theta) :]
        self.next = float(following[0]) ** 2 if len(following) else 0.0
        right, values = self.leading.right, self.leading.values[:, None]
        off = values * (seen[: len(self.theta)] - values * right)
        self.residual = float(off.norm(dtype=torch.float64)) ** 2

    def missed(self, largest: float) -> float:
        """Return how much more ‖·‖² another choice of as many vectors could hold.

        ``largest``: the largest eigenvalue of MᵀM outside the span of the Ritz vectors.
        """
        whole = energy_missed(self.theta, self.residual, largest)
        # The half step has won some of that already, as far as float32 can tell.
        won = float(self.kept.values.to(torch.float64).square().sum() - self.theta.sum())
        noise = torch.finfo(self.matrix.dtype).eps * self.norm**2
        return max(min(whole, whole - won + noise), 0.0)


def _certified_least(
    state: _State, tolerance: float, seed: torch.Generator, hope: float
) -> float | None:
    """Return a lower bound on the relative error of this rank, or None if it proves too little.

    ``hope``: how near its lower bound the upper bound on what follows must come to try at all.
    """
    lost = state.error**2
    if lost <= _ALL:
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

    return bound_largest_eigenvalue(operator, outside(_gaussian(matrix, _PROBES, seed)))


def _gaussian(matrix: Tensor, width: int, seed: torch.Generator) -> Tensor:
    """Return an (n, width) block; drawn on the CPU, so that every device gets the same."""
    block = torch.randn(matrix.shape[1], width, generator=seed, dtype=matrix.dtype)
    return block.to(matrix.device)


# ── norms ────────────────────────────────────────────────────────────────────────────────────


def _norm(matrix: Tensor) -> float:
    """Return ‖M‖: rows in the matrix's precision, their sum in float64."""
    rows = torch.linalg.vector_norm(matrix, dim=1)
    return float(torch.linalg.vector_norm(rows, dtype=torch.float64))


def _error(matrix: Tensor, kept: SVD, norm: float) -> float:
    """Return ‖M − USV‖ / ‖M‖, from the norms where they suffice."""
    energy = float(kept.values.norm(dtype=torch.float64)) ** 2
    share = max(1 - energy / norm**2, 0.0)
    if share > _CANCELLATION:
        return math.sqrt(share)
    scaled = kept.left * kept.values
    square = 0.0
    for start in range(0, matrix.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        square += _norm(matrix[rows] - scaled[rows] @ kept.right) ** 2
    return math.sqrt(square) / norm
