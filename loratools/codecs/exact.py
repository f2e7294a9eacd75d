"""Float32 arithmetic that agrees, bit for bit, with plain C compiled without fused operations.

A K-quant search keeps the candidate whose error is smallest, so the last bit of a sum decides which
bytes are written. torch's own sums go in an order of their own, its ``scalar / tensor`` multiplies
by a reciprocal, and its CPU square root may be off by one unit; these functions do neither.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_SHIFT = 12582912.0
"""1.5·2²³: added to a float32 below 2²² in size, it leaves the nearest integer in the mantissa."""

_BELOW_HALF = 0.5 - 2.0**-25


def square_root(values: Tensor) -> Tensor:
    """Return the correctly rounded square root."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sqrt(values.numpy()))
    return values.sqrt()


def divide(numerator: Tensor | float, denominator: Tensor | float) -> Tensor:
    """Return the correctly rounded quotient; at least one side is a tensor."""
    if isinstance(numerator, Tensor):
        if not isinstance(denominator, Tensor):
            denominator = numerator.new_full((), denominator)
        return torch.div(numerator, denominator)
    assert isinstance(denominator, Tensor)
    return torch.div(denominator.new_full((), numerator), denominator)


def nearest_int_(values: Tensor) -> Tensor:
    """Round to the nearest integer, half to even, in ``values``' own memory; return it as int32.

    From 2²² on the result is the remainder that ggml's ``nearest_int`` gives; infinities are -2²².
    """
    bits = values.add_(_SHIFT).view(torch.int32)
    return bits.bitwise_and_(0x7FFFFF).sub_(0x400000)


def round_half_away_(values: Tensor) -> Tensor:
    """Round to the nearest integer, half away from zero as C's ``roundf``, in place.

    With 0.5 itself, the number just below 0.5 would be rounded up by the addition.
    """
    return values.add_(torch.copysign(values.new_tensor(_BELOW_HALF), values)).trunc_()
