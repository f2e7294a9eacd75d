"""TQ1_0 and TQ2_0: 256 weights of -1, 0 or 1 times one scale, in base 3 or in pairs of bits.

TQ1_0 writes five trits as a fraction of 256, so that multiplying by 3 brings one after the other
into the top of the byte: 32 bytes hold weights 0 … 159 (element j + 32t is trit t of byte j), 16
bytes the next 80, and 4 bytes of four trits the last 16.
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.codecs.block import BlockCodec
from loratools.codecs.exact import divide, round_half_away_
from loratools.codecs.ggml_bits import join_bits, read_half, split_bits, write_half

_RUNS = ((32, 5), (16, 5), (4, 4))
"""Bytes, and trits in each, of the three parts of a TQ1_0 block."""


def _trits(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the bytes of the scales and the codes 0 … 2, uint8."""
    scale = values.abs().amax(-1)
    inverse = torch.where(scale == 0, 0.0, divide(1.0, scale)).unsqueeze(-1)
    rounded = round_half_away_(values * inverse)
    # A scale below 2⁻¹²⁸ has no inverse in float32: the reference stores zeros.
    codes = torch.where(inverse.isinf(), 0.0, rounded).add_(1)
    return write_half(scale), codes.to(torch.uint8)


def _decode_tq1_0(raw: Tensor) -> Tensor:
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8, device=raw.device).unsqueeze(-1)
    parts = raw[:, :52].split([size for size, _ in _RUNS], -1)
    shifted = [
        (part.unsqueeze(1) * powers[:trits]).flatten(1)
        for part, (_, trits) in zip(parts, _RUNS, strict=True)
    ]
    codes = (torch.cat(shifted, -1).int() * 3) >> 8
    return codes.float().sub_(1).mul_(read_half(raw[:, 52:]))


def _encode_tq1_0(values: Tensor) -> Tensor:
    scale, codes = _trits(values)
    powers = torch.tensor([81, 27, 9, 3, 1], dtype=torch.int32, device=values.device).unsqueeze(-1)
    parts = codes.int().split([size * trits for size, trits in _RUNS], -1)
    numbers = [
        (part.view(-1, trits, size) * powers[:trits]).sum(1)
        for part, (size, trits) in zip(parts, _RUNS, strict=True)
    ]
    # The fraction, rounded up.
    fractions = (torch.cat(numbers, -1) * 256 + 242) // 243
    return torch.cat([fractions.to(torch.uint8), scale], -1)


def _decode_tq2_0(raw: Tensor) -> Tensor:
    codes = split_bits(raw[:, :64].view(-1, 2, 32), 2).flatten(1)
    return codes.float().sub_(1).mul_(read_half(raw[:, 64:]))


def _encode_tq2_0(values: Tensor) -> Tensor:
    scale, codes = _trits(values)
    packed = join_bits(codes.view(-1, 2, 4, 32).unbind(2), 2).flatten(1)
    return torch.cat([packed, scale], -1)


TQ1_0 = BlockCodec("TQ1_0", 256, 54, _decode_tq1_0, _encode_tq1_0)
TQ2_0 = BlockCodec("TQ2_0", 256, 66, _decode_tq2_0, _encode_tq2_0)
