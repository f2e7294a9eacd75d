"""Fields of blocks, as tensors over all of them: float16 scales, nibbles, pairs of bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.errors import NonFiniteError


def read_half(raw: Tensor) -> Tensor:
    """Return (n, k) float32 from (n, 2k) bytes of little-endian float16."""
    return raw.contiguous().view(torch.float16).float()


def write_half(values: Tensor) -> Tensor:
    """Return (n, 2k) bytes of little-endian float16 from (n, k) or (n,) float32.

    Raises:
        NonFiniteError: NaN, infinity, or too large for float16.
    """
    halves = values.half().reshape(len(values), -1).contiguous()
    require_finite(halves)
    return halves.view(torch.uint8)


def require_finite(values: Tensor, limit: float = math.inf) -> None:
    """Raise :class:`NonFiniteError` unless every magnitude is below ``limit``."""
    if not bool((values.abs() < limit).all()):
        raise NonFiniteError(
            "a weight is NaN or infinite, or too large for the float16 scale of its block",
            "Keep this tensor in F32 or BF16.",
        )


def split_bits(raw: Tensor, width: int) -> Tensor:
    """Return (..., 8/width, k) codes of ``width`` bits from (..., k) bytes, lowest bits first."""
    return torch.stack([raw >> shift for shift in range(0, 8, width)], -2) & ((1 << width) - 1)


def join_bits(codes: Sequence[Tensor], width: int) -> Tensor:
    """Return the bytes that hold ``codes``, each uint8 below 2^width, the first one lowest."""
    joined = codes[0].clone()
    for place, code in enumerate(codes[1:], 1):
        joined |= code << (place * width)
    return joined
