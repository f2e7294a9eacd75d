"""Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0: blocks of 32 weights with one scale, and perhaps a minimum.

Codes of four bits lie in 16 bytes, element j in the low and j + 16 in the high nibble of byte j;
fifth bits lie in a little-endian word, element j in bit j (ggml's ``block_q4_0`` and its kin).
"""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.codecs.block import BlockCodec
from loratools.codecs.exact import divide, round_half_away_
from loratools.codecs.ggml_bits import join_bits, read_half, split_bits, write_half


def first_peak(values: Tensor) -> Tensor:
    """Return (n,) of (n, k): the value of largest magnitude, the first of equals."""
    high, low = values.amax(-1), values.amin(-1)
    peak = torch.where(high > -low, high, low)
    tied = (high == -low).nonzero().squeeze(-1)
    if len(tied):
        rows = values[tied]
        peak[tied] = rows.gather(-1, rows.abs().argmax(-1, keepdim=True)).squeeze(-1)
    return peak + 0.0  # not the −0 of a block of −0: its sign would reach the scale


def first_minimum(values: Tensor) -> Tensor:
    """Return (n,) of (n, k): the least value; of zeros the first, with its sign."""
    low = values.amin(-1)
    zero = (low == 0).nonzero().squeeze(-1)
    if len(zero):
        rows = values[zero]
        low[zero] = rows.gather(-1, rows.eq(0).int().argmax(-1, keepdim=True)).squeeze(-1)
    return low


def _inverse(scale: Tensor) -> Tensor:
    """Return 1/scale (n, 1), and 0 where the scale is 0."""
    return torch.where(scale == 0, 0.0, divide(1.0, scale)).unsqueeze(-1)


def _truncated(values: Tensor, inverse: Tensor, top: int) -> Tensor:
    """Return uint8 codes by cutting off fractions; 0 in blocks whose inverse scale overflows.

    C converts the infinities of such a block to an int, which x86 defines as a number with 0 in its
    lowest byte. The scale is below float16's smallest, so that the block is zeros in any case.
    """
    codes = values.clamp_(max=top).to(torch.uint8)
    return codes * inverse.isfinite() if bool(inverse.isinf().any()) else codes


def _nibbles(codes: Tensor) -> Tensor:
    return join_bits(codes.split(16, -1), 4)


def _read_nibbles(raw: Tensor) -> Tensor:
    return split_bits(raw, 4).flatten(-2)


def _fifth_bits(codes: Tensor) -> Tensor:
    """Return (n, 4) bytes with the fifth bit of each of 32 codes."""
    return join_bits(((codes >> 4) & 1).view(-1, 4, 8).unbind(-1), 1)


def _read_fifth_bits(raw: Tensor) -> Tensor:
    """Return (n, 32), 16 where the bit is set."""
    return split_bits(raw.unsqueeze(-1), 1).flatten(1) << 4


def _encode_symmetric(values: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return (scale bytes, codes) with the weight of largest magnitude at -half."""
    scale = divide(first_peak(values), -float(half))
    inverse = _inverse(scale)
    codes = _truncated((values * inverse).add_(half + 0.5), inverse, 2 * half - 1)
    return write_half(scale), codes


def _encode_offset(values: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return (scale bytes, minimum bytes, codes) with codes 0 … top from minimum to maximum."""
    low = first_minimum(values)
    scale = divide(values.amax(-1) - low + 0.0, float(top))
    inverse = _inverse(scale)
    codes = (values - low.unsqueeze(-1)).mul_(inverse).add_(0.5)
    return write_half(scale), write_half(low), _truncated(codes, inverse, top)


def _decode_q4_0(raw: Tensor) -> Tensor:
    return _read_nibbles(raw[:, 2:]).float().sub_(8).mul_(read_half(raw[:, :2]))


def _encode_q4_0(values: Tensor) -> Tensor:
    scale, codes = _encode_symmetric(values, 8)
    return torch.cat([scale, _nibbles(codes)], -1)


def _decode_q4_1(raw: Tensor) -> Tensor:
    scale, low = read_half(raw[:, :4]).split(1, -1)
    return _read_nibbles(raw[:, 4:]).float().mul_(scale).add_(low)


def _encode_q4_1(values: Tensor) -> Tensor:
    scale, low, codes = _encode_offset(values, 15)
    return torch.cat([scale, low, _nibbles(codes)], -1)


def _decode_q5_0(raw: Tensor) -> Tensor:
    codes = _read_nibbles(raw[:, 6:]) | _read_fifth_bits(raw[:, 2:6])
    return codes.float().sub_(16).mul_(read_half(raw[:, :2]))


def _encode_q5_0(values: Tensor) -> Tensor:
    scale, codes = _encode_symmetric(values, 16)
    return torch.cat([scale, _fifth_bits(codes), _nibbles(codes & 15)], -1)


def _decode_q5_1(raw: Tensor) -> Tensor:
    scale, low = read_half(raw[:, :4]).split(1, -1)
    codes = _read_nibbles(raw[:, 8:]) | _read_fifth_bits(raw[:, 4:8])
    return codes.float().mul_(scale).add_(low)


def _encode_q5_1(values: Tensor) -> Tensor:
    scale, low, codes = _encode_offset(values, 31)
    return torch.cat([scale, low, _fifth_bits(codes), _nibbles(codes & 15)], -1)


def _decode_q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:].view(torch.int8).float().mul_(read_half(raw[:, :2]))


def _encode_q8_0(values: Tensor) -> Tensor:
    scale = divide(torch.maximum(values.amax(-1), -values.amin(-1)) + 0.0, 127.0)
    inverse = _inverse(scale)
    codes = round_half_away_(values * inverse)
    if bool(inverse.isinf().any()):
        codes = torch.where(inverse.isinf(), 0.0, codes)
    return torch.cat([write_half(scale), codes.to(torch.int8).view(torch.uint8)], -1)


Q4_0 = BlockCodec("Q4_0", 32, 18, _decode_q4_0, _encode_q4_0)
Q4_1 = BlockCodec("Q4_1", 32, 20, _decode_q4_1, _encode_q4_1)
Q5_0 = BlockCodec("Q5_0", 32, 22, _decode_q5_0, _encode_q5_0)
Q5_1 = BlockCodec("Q5_1", 32, 24, _decode_q5_1, _encode_q5_1)
Q8_0 = BlockCodec("Q8_0", 32, 34, _decode_q8_0, _encode_q8_0)
