"""The search for scale and minimum of a K-quant sub-block, as ggml does it without weights.

Sub-blocks are columns: values are (m, n), m weights of n sub-blocks, so that every step is one
operation on contiguous rows and a sum over a sub-block adds rows in the order of the C loop. A
search tries a handful of inverse scales; each gives codes by rounding, the codes give scale and
minimum by least squares, and the candidate with the smallest error stays. Ties, the order of the
sums and the accepted minimum that the next candidate starts from are all part of the reference,
``make_qkx2_quants`` in ggml-quants.c.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from loratools.codecs.columns import Column, as_column, borrow, in_order_sum, ratio, replace


@dataclass(frozen=True, slots=True)
class AffineGrid:
    """What ``fit_affine`` tries: codes 0 … top, and the inverse scales step / (max − min).

    Attributes:
        top: the largest code.
        first: what is added to ``top`` in the first candidate; each next adds 0.1 more.
        count: of candidates.
        absolute: whether the error is the sum of magnitudes instead of squares.
    """

    top: int
    first: float
    count: int
    absolute: bool = False

    @property
    def steps(self) -> list[float]:
        """The numerators of the inverse scales, rounded as in float32 arithmetic."""
        single = np.float32
        offsets = (single(self.first) + single(0.1) * single(k) for k in range(self.count))
        return [float(offset + single(self.top)) for offset in offsets]


@dataclass(frozen=True, slots=True, eq=False)
class AffineFit:
    """The winner for each of n sub-blocks: w ≈ scale · code + low.

    ``inverse`` and ``base`` are what its codes were rounded with, code = (w − base) · inverse.
    """

    scale: Tensor
    low: Tensor
    inverse: Tensor
    base: Tensor

    def codes(self, values: Tensor, top: int) -> Tensor:
        """Return the codes, float32 (n, m), that the search settled on for weights (n, m)."""
        base, inverse = self.base.unsqueeze(-1), self.inverse.unsqueeze(-1)
        return (values - base).mul_(inverse).round_().clamp_(0, top)


def fit_affine(values: Tensor, weights: Tensor, grid: AffineGrid) -> AffineFit:
    """Return the best scale and minimum (at most 0) of each column, by weighted least squares."""
    with np.errstate(all="ignore"):
        rows = _AffineSearch(values, weights, grid).run()
    return AffineFit(*rows[1:])


class _Candidate:
    """One candidate for every column: a (5, n) tensor, and its rows as columns."""

    def __init__(self, like: Tensor) -> None:
        self.rows = like.new_empty(5, like.shape[1])
        self.columns = as_column(self.rows)
        self.error, self.scale, self.low, self.inverse, self.base = self.columns
        _, self.scale_row, self.low_row, self.inverse_row, self.base_row = self.rows


class _AffineSearch:
    """The memory of a search: scratch of the values' shape, sums and two candidates."""

    def __init__(self, values: Tensor, weights: Tensor, grid: AffineGrid) -> None:
        self.values, self.weights, self.grid = values, weights, grid
        scratch = borrow(values, 3, *values.shape)
        self.codes, self.weighted, self.product = scratch
        self.codes_array, self.weighted_array, self.product_array = as_column(scratch)
        self.best, self.trial = _Candidate(values), _Candidate(values)
        self.high = as_column(values.amax(0))
        torch.clamp(values.amin(0), max=0, out=self.best.rows[2])
        # Of weights w, values x and codes l: Σw, Σwx, and for every candidate Σwl, Σwl², Σwlx.
        self.sums = tuple(as_column(values.new_empty(5, values.shape[1])))
        in_order_sum(as_column(weights), self.sums[0])
        torch.mul(weights, values, out=self.product)
        in_order_sum(self.product_array, self.sums[1])

    def run(self) -> Tensor:
        """Return the winners' rows: error, scale, low, inverse, base."""
        best, trial = self.best, self.trial
        ratio(float(self.grid.top), self.high - best.low, trial.inverse)
        ratio(1.0, trial.inverse, best.scale)
        self.round_codes(float(self.grid.top), best)
        self.measure(best)
        for step in self.grid.steps:
            self.round_codes(step, trial)
            solvable = self.solve(trial)
            self.measure(trial)
            better = solvable & (trial.error < best.error)
            for target, row in zip(best.columns, trial.columns, strict=True):
                replace(target, better, row)
        return best.rows

    def round_codes(self, step: float, fit: _Candidate) -> None:
        """Round with the inverse scale ``step`` / (maximum − best minimum so far)."""
        fit.base[:] = self.best.low
        ratio(step, self.high - fit.base, fit.inverse)
        # Where the range is 0 or denormal, C's integer rounding of infinity and NaN gives code 0.
        replace(fit.inverse, fit.inverse == np.inf, 0.0)
        torch.sub(self.values, fit.base_row, out=self.codes)
        self.codes.mul_(fit.inverse_row).round_().clamp_(0, self.grid.top)

    def solve(self, fit: _Candidate) -> Column:
        """Fill scale and minimum by least squares; return where there is a solution."""
        w, w_x, w_l, w_ll, w_lx = self.sums
        torch.mul(self.weights, self.codes, out=self.weighted)
        in_order_sum(self.weighted_array, w_l)
        torch.mul(self.weighted, self.codes, out=self.product)
        in_order_sum(self.product_array, w_ll)
        self.weighted.mul_(self.values)
        in_order_sum(self.weighted_array, w_lx)
        determinant = w * w_ll - w_l * w_l
        fit.scale[:] = (w * w_lx - w_x * w_l) / determinant
        fit.low[:] = (w_ll * w_x - w_l * w_lx) / determinant
        positive = fit.low > 0
        replace(fit.scale, positive, w_lx / w_ll)
        replace(fit.low, positive, 0.0)
        return determinant > 0

    def measure(self, fit: _Candidate) -> None:
        """Fill the weighted error, in the memory of the codes."""
        difference = self.codes.mul_(fit.scale_row).add_(fit.low_row).sub_(self.values)
        size = difference.abs_() if self.grid.absolute else difference.mul_(difference)
        size.mul_(self.weights)
        in_order_sum(self.codes_array, fit.error)
