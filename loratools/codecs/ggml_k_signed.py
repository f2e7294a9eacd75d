"""Q3_K and Q6_K: super-blocks of 256 weights in 16 sub-blocks that have a scale and no minimum.

w = d·s·q, with d float16 for the super-block, s a small signed integer for every 16 weights, and q
of three bits (Q3_K, s of six bits) or six bits (Q6_K, s of eight).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loratools.codecs.block import BlockCodec
from loratools.codecs.columns import borrow
from loratools.codecs.exact import divide, nearest_int_
from loratools.codecs.ggml_bits import join_bits, read_half, split_bits, write_half
from loratools.codecs.ggml_signed_search import (
    NEGLIGIBLE,
    fit_signed,
    refine_signed,
    signed_codes,
)
from loratools.codecs.ggml_simple import first_peak


def _columns(values: Tensor) -> Tensor:
    """Return (16, 16n): the sub-blocks of (n, 256) weights as columns."""
    return values.view(-1, 16).t().contiguous()


def _integers(scale: Tensor, half: int) -> tuple[Tensor, Tensor]:
    """Return (n, 2) bytes of d and (n, 16) int32 multiples for the scales of 16n sub-blocks.

    The scale of largest magnitude becomes -half; d is 0 where there is none.
    """
    scales = scale.view(-1, 16)
    peak = first_peak(scales)
    empty = peak == 0
    inverse = torch.where(empty, 0.0, divide(-float(half), peak))
    unit = torch.where(empty, 0.0, divide(1.0, inverse))
    multiples = nearest_int_(scales * inverse.unsqueeze(-1)).clamp_(-half, half - 1)
    return write_half(unit), multiples


def _codes(
    values: Tensor,
    half: Tensor,
    multiples: Tensor,
    bound: int,
    searched: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the codes, uint8 0 … 2·bound − 1, of (n, 256) weights with the scales as stored.

    A sub-block whose stored scale is 0 keeps the codes of the search: ``searched`` returns them as
    columns for the sub-blocks where its argument is set.
    """
    groups = values.view(-1, 16)
    step = (read_half(half) * multiples).flatten()
    scaled = torch.div(groups, step.unsqueeze(-1), out=borrow(groups, *groups.shape))
    codes = nearest_int_(scaled).clamp_(-bound, bound - 1).add_(bound).to(torch.uint8)
    empty = step == 0
    if bool(empty.any()):
        codes[empty] = searched(empty).t()
    return codes.view(-1, 256)


def _encode_q6_k(values: Tensor) -> Tensor:
    columns = _columns(values)
    scale = fit_signed(columns, 32)
    half, multiples = _integers(scale, 128)
    codes = _codes(values, half, multiples, 32, lambda empty: signed_codes(columns[:, empty], 32))
    quarters = codes.view(-1, 2, 4, 32)
    nibbles = quarters & 15
    low = (nibbles[:, :, :2] | nibbles[:, :, 2:] << 4).flatten(1)
    high = join_bits((quarters >> 4).unbind(2), 2).flatten(1)
    raw = torch.cat([low, high, multiples.to(torch.int8).view(torch.uint8), half], -1)
    # A super-block of negligible scales alone is zero bytes, whatever its codes.
    return raw * (scale.view(-1, 16).abs().amax(-1, keepdim=True) >= NEGLIGIBLE)


def _decode_q6_k(raw: Tensor) -> Tensor:
    low = split_bits(raw[:, :128].view(-1, 2, 64), 4).view(-1, 2, 4, 32)
    high = split_bits(raw[:, 128:192].view(-1, 2, 32), 2)
    codes = (low | high << 4).view(-1, 16, 16).float().sub_(32)
    step = read_half(raw[:, 208:]) * raw[:, 192:208].view(torch.int8)
    return codes.mul_(step.unsqueeze(-1)).flatten(1)


def _encode_q3_k(values: Tensor) -> Tensor:
    columns = _columns(values)
    scale, searched = refine_signed(columns, 4)
    half, multiples = _integers(scale, 32)
    codes = _codes(values, half, multiples, 4, lambda empty: searched[:, empty])
    mask = join_bits((codes >> 2).view(-1, 8, 32).unbind(1), 1)
    low = join_bits((codes & 3).view(-1, 2, 4, 32).unbind(2), 2).flatten(1)
    # Without any scale the twelve bytes are 0, which stands for -32.
    scales = _pack_q3_scales(multiples) * (scale.view(-1, 16) != 0).any(-1, keepdim=True)
    return torch.cat([mask, low, scales, half], -1)


def _pack_q3_scales(multiples: Tensor) -> Tensor:
    """Return (n, 12) bytes of (n, 16) integers -32 … 31: nibbles, then top bits by fours."""
    shifted = multiples.add(32).to(torch.uint8)
    low = join_bits((shifted & 15).split(8, -1), 4)
    return torch.cat([low, join_bits((shifted >> 4).split(4, -1), 2)], -1)


def unpack_q3_scales(raw: Tensor) -> Tensor:
    """Return the scales -32 … 31, (n, 16) float32, of (n, 12) bytes."""
    low, high = split_bits(raw[:, :8], 4).flatten(1), split_bits(raw[:, 8:], 2).flatten(1)
    return (low | high << 4).float().sub_(32)


def _decode_q3_k(raw: Tensor) -> Tensor:
    mask = split_bits(raw[:, :32], 1).view(-1, 16, 16)
    low = split_bits(raw[:, 32:96].view(-1, 2, 32), 2).view(-1, 16, 16)
    step = read_half(raw[:, 108:]) * unpack_q3_scales(raw[:, 96:108])
    codes = (low | mask << 2).float().sub_(4)
    return codes.mul_(step.unsqueeze(-1)).flatten(1)


Q3_K = BlockCodec("Q3_K", 256, 110, _decode_q3_k, _encode_q3_k)
Q6_K = BlockCodec("Q6_K", 256, 210, _decode_q6_k, _encode_q6_k)
