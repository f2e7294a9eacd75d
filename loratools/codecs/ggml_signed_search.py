"""The searches for the scale of a K-quant sub-block without minimum, as ggml does them.

``fit_signed`` is ``make_qx_quants`` and ``refine_signed`` is ``make_q3_quants`` of ggml-quants.c,
both weighted by w². Sub-blocks are columns, (m, n). Codes l with their best scale Σwxl / Σwl² take
(Σwxl)² / Σwl² off the weighted error: that is a candidate's merit.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loratools.codecs.columns import as_column, borrow, in_order_sum, replace
from loratools.codecs.exact import divide, nearest_int_
from loratools.codecs.ggml_bits import require_finite

NEGLIGIBLE = 1e-15
"""Below this magnitude ggml takes a sub-block for zeros."""

_HUGE = 2.0**40
"""Scales of such weights do not fit float16, and sums of their cubes might not fit float32."""

_REFITS = 5
_SLICE = 1024
"""Columns whose candidates are evaluated together on a CPU, so that they stay in its cache."""


def first_peaks(values: Tensor) -> Tensor:
    """Return (n,) of (m, n): the value of largest magnitude in each column, the first of equals.

    Raises:
        NonFiniteError: a value that is not finite, or so large that no type has a scale for it.
    """
    high, low = values.amax(0), values.amin(0)
    peak = torch.where(high > -low, high, low)
    require_finite(peak, _HUGE)
    tied = (high == -low).nonzero().squeeze(-1)
    if len(tied):
        columns = values[:, tied]
        peak[tied] = columns.gather(0, columns.abs().argmax(0, keepdim=True)).squeeze(0)
    return peak


def fit_signed(values: Tensor, half: int) -> Tensor:
    """Return the best scale (n,) of each column for codes -half … half − 1.

    Nineteen inverse scales around -half / peak, which do not depend on one another.
    """
    peak = first_peaks(values)
    sum_xl, sum_ll = _sums(values, _inverses(peak, half), half)
    winner = _winners(sum_xl, sum_ll)
    explained, weight = sum_xl.gather(0, winner)[0], sum_ll.gather(0, winner)[0]
    scale: Tensor = explained / weight
    return scale.masked_fill_((weight == 0) | (peak.abs() < NEGLIGIBLE), 0)


def signed_codes(values: Tensor, half: int) -> Tensor:
    """Return the codes, uint8 (m, n) from 0 for -half, that ``fit_signed`` settles on."""
    peak = first_peaks(values)
    inverses = _inverses(peak, half)
    inverse = inverses.gather(0, _winners(*_sums(values, inverses, half)))
    codes = (values * inverse).round_().clamp_(-half, half - 1).add_(half)
    return codes.masked_fill_(peak.abs() < NEGLIGIBLE, 0).to(torch.uint8)


def _inverses(peak: Tensor, half: int) -> Tensor:
    """Return the inverse scales (19, n): -half / peak, then its neighbours in ascending size."""
    single = np.float32
    around = [single(half) + single(0.1) * single(k) for k in range(-9, 10) if k]
    steps = peak.new_tensor(np.array([half, *around], dtype=single))
    return torch.div(-steps.unsqueeze(-1), peak)


def _sums(values: Tensor, inverses: Tensor, half: int) -> Tensor:
    """Return Σwxl and Σwl², (2, 19, n), of every candidate and column."""
    size = _SLICE if values.device.type == "cpu" else values.shape[1]
    parts = zip(values.split(size, 1), inverses.split(size, 1), strict=True)
    return torch.cat([_sum_part(part, own, half) for part, own in parts], -1)


def _sum_part(values: Tensor, inverses: Tensor, half: int) -> Tensor:
    codes, product = borrow(values, 2, len(values), *inverses.shape)
    array = as_column(product)
    sums = inverses.new_empty(2, *inverses.shape)
    sum_xl, sum_ll = as_column(sums)
    squares = values * values
    torch.mul(values.unsqueeze(1), inverses, out=codes).round_().clamp_(-half, half - 1)
    torch.mul((squares * values).unsqueeze(1), codes, out=product)
    in_order_sum(array, sum_xl)
    torch.mul(squares.unsqueeze(1), codes, out=product).mul_(codes)
    in_order_sum(array, sum_ll)
    return sums


def _winners(sum_xl: Tensor, sum_ll: Tensor) -> Tensor:
    """Return the index (1, n) of the candidate that stays when each in turn must beat the best."""
    winner = torch.zeros_like(sum_xl[0], dtype=torch.int8)
    index, explained, weights = map(as_column, (winner, sum_xl, sum_ll))
    with np.errstate(all="ignore"):
        best = explained[0] / weights[0] * explained[0]
        replace(best, weights[0] == 0, 0.0)
        for place, (xl, ll) in enumerate(zip(explained[1:], weights[1:], strict=True), 1):
            better = xl * xl > best * ll
            replace(best, better, xl / ll * xl)
            replace(index, better, place)
    return winner.long().unsqueeze(0)


def refine_signed(values: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return the scale (n,) and codes (m, n), uint8 from 0 for -half, of each column.

    Codes rounded with -half / peak are moved one weight at a time, in at most five rounds, wherever
    that raises (Σwxl)² / Σwl², weighted by w = x².
    """
    with np.errstate(all="ignore"):
        return _refine(values, half)


def _refine(values: Tensor, half: int) -> tuple[Tensor, Tensor]:
    peak = first_peaks(values)
    codes = (values * divide(-float(half), peak)).round_().clamp_(-half, half - 1)
    sums = _Moves(values, codes, half)
    for _ in range(_REFITS):
        moved = [sums.move(row) for row in range(len(values))]
        if not any(moved):
            break
    negligible = peak.abs() < NEGLIGIBLE
    scale = torch.where(sums.rows[1] > 0, sums.rows[0] / sums.rows[1], 0.0)
    codes = codes.add_(half).masked_fill_(negligible, 0).to(torch.uint8)
    return scale.masked_fill_(negligible, 0), codes


class _Moves:
    """The two sums of every column, kept while weights change their codes, in place."""

    def __init__(self, values: Tensor, codes: Tensor, half: int) -> None:
        self.half = half
        squares = values * values
        cubes = squares * values
        self.values, self.squares, self.cubes, self.codes = map(
            as_column, (values, squares, cubes, codes)
        )
        self.rows = values.new_empty(2, values.shape[1])
        self.sum_xl, self.sum_ll = as_column(self.rows)
        in_order_sum(as_column(cubes * codes), self.sum_xl)
        in_order_sum(as_column((squares * codes).mul_(codes)), self.sum_ll)

    def move(self, row: int) -> bool:
        """Give one weight of every column the code that suits the others best, if it is better."""
        square, cube, code = self.squares[row], self.cubes[row], self.codes[row]
        rest_xl = self.sum_xl - cube * code
        rest_ll = self.sum_ll - square * code * code
        aim = torch.as_tensor(self.values[row] * rest_ll / rest_xl)
        wanted = as_column(nearest_int_(aim).clamp_(-self.half, self.half - 1).float())
        new_xl = rest_xl + cube * wanted
        new_ll = rest_ll + square * wanted * wanted
        better = new_xl * new_xl * self.sum_ll > self.sum_xl * self.sum_xl * new_ll
        better &= (rest_xl > 0) & (wanted != code) & (new_ll > 0)
        for target, values in ((code, wanted), (self.sum_xl, new_xl), (self.sum_ll, new_ll)):
            replace(target, better, values)
        return bool(better.any())
