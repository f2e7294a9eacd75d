"""IQ4_NL and IQ4_XS: 4-bit codes into a table of sixteen uneven levels.

IQ4_NL has one float16 scale for 32 weights; IQ4_XS one for 256, and six bits for every 32. The
search is ``quantize_row_iq4_nl_impl`` of ggml-quants.c without an importance matrix: sixteen
inverse scales around the one that takes the largest weight to the end of the table, weights w².
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from loratools.codecs.block import BlockCodec
from loratools.codecs.columns import as_column, in_order_sum, replace
from loratools.codecs.exact import divide, nearest_int_
from loratools.codecs.ggml_bits import join_bits, read_half, split_bits, write_half
from loratools.codecs.ggml_signed_search import NEGLIGIBLE, first_peaks
from loratools.codecs.ggml_simple import first_peak

LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_TRIES = 7


def _levels(codes: Tensor) -> Tensor:
    return torch.tensor(LEVELS, dtype=torch.float32, device=codes.device)[codes.int()]


def _nearest(scaled: Tensor) -> Tensor:
    """Return the codes, uint8, of the nearest levels; of two equally near the upper."""
    # The middles are multiples of a half, so whole numbers of halves decide.
    doubled = torch.tensor(LEVELS[:-1]) + torch.tensor(LEVELS[1:])
    table = torch.bucketize(torch.arange(-256, 257), doubled, right=True).to(torch.uint8)
    halves = (scaled * 2).floor_().clamp_(-256, 256).nan_to_num_(0.0).to(torch.int32).add_(256)
    return table.to(scaled.device)[halves]


def _scales(columns: Tensor) -> Tensor:
    """Return the best scale (n,) of each column of (32, n) weights."""
    with np.errstate(all="ignore"):
        return _search(columns)


def _search(columns: Tensor) -> Tensor:
    peak = first_peaks(columns)
    squares = columns * columns
    sums = columns.new_empty(2, columns.shape[1])
    rows = columns.new_zeros(2, columns.shape[1])
    (xl, ll), (best, scale) = as_column(sums), as_column(rows)
    first = divide(1.0, divide(-peak, float(LEVELS[0])))
    for inverse in (
        first,
        *(divide(float(k + LEVELS[0]), peak) for k in range(-_TRIES, _TRIES + 1)),
    ):
        levels = _levels(_nearest(columns * inverse))
        product = squares * levels
        in_order_sum(as_column(product * columns), xl)
        in_order_sum(as_column(product.mul_(levels)), ll)
        better = (ll > 0) if inverse is first else (ll > 0) & (xl * xl > best * ll)
        replace(scale, better, xl / ll)
        replace(best, better, xl / ll * xl)
    return rows[1].masked_fill_(peak.abs() < NEGLIGIBLE, 0)


def _pack(codes: Tensor) -> Tensor:
    """Return (n, 16k) bytes of (n, 32k) codes: of 32 each, the first 16 low and the others high."""
    return join_bits(codes.view(len(codes), -1, 2, 16).unbind(2), 4).flatten(1)


def _decode_iq4_nl(raw: Tensor) -> Tensor:
    return _levels(split_bits(raw[:, 2:], 4).flatten(1)).mul_(read_half(raw[:, :2]))


def _encode_iq4_nl(values: Tensor) -> Tensor:
    scale = _scales(values.t().contiguous())
    inverse = torch.where(scale == 0, 0.0, divide(1.0, scale)).unsqueeze(-1)
    return torch.cat([write_half(scale), _pack(_nearest(values * inverse))], -1)


def _decode_iq4_xs(raw: Tensor) -> Tensor:
    high = split_bits(raw[:, 2:4].unsqueeze(-1), 2).flatten(1)
    low = split_bits(raw[:, 4:8].unsqueeze(-1), 4).flatten(1)
    step = read_half(raw[:, :2]) * (low | high << 4).float().sub_(32)
    levels = _levels(split_bits(raw[:, 8:].view(-1, 8, 16), 4).flatten(2))
    return levels.mul_(step.unsqueeze(-1)).flatten(1)


def _encode_iq4_xs(values: Tensor) -> Tensor:
    groups = values.view(-1, 8, 32)
    scales = _scales(values.view(-1, 32).t().contiguous()).view(-1, 8)
    unit = divide(first_peak(scales), -32.0)
    inverse = torch.where(unit == 0, 0.0, divide(1.0, unit)).unsqueeze(-1)
    multiples = nearest_int_(scales * inverse).clamp_(-32, 31)
    step = unit.unsqueeze(-1) * multiples
    codes = _nearest(groups * torch.where(step == 0, 0.0, divide(1.0, step)).unsqueeze(-1))
    shifted = multiples.add(32).to(torch.uint8)
    high = join_bits((shifted >> 4).view(-1, 2, 4).unbind(-1), 2)
    low = join_bits((shifted & 15).view(-1, 4, 2).unbind(-1), 4)
    return torch.cat([write_half(unit), high, low, _pack(codes.flatten(1))], -1)


IQ4_NL = BlockCodec("IQ4_NL", 32, 18, _decode_iq4_nl, _encode_iq4_nl)
IQ4_XS = BlockCodec("IQ4_XS", 256, 136, _decode_iq4_xs, _encode_iq4_xs)
