"""Unsigned integers of any width from 1 to 8 bits as a little-endian stream in 32-bit words."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def unpack_bits(words: Tensor, bits: int, count: int) -> Tensor:
    """Return ``count`` integers (..., count), uint8, from the stream along the last axis.

    Args:
        words: (..., ⌈count·bits / 32⌉) int32 (uint32 viewed so).
        bits: 1 to 8.
        count: how many integers there are.
    """
    if WORD % bits == 0:
        shifts = torch.arange(0, WORD, bits, dtype=torch.int32, device=words.device)
        found: Tensor = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
        return found.to(torch.uint8).flatten(-2).narrow(-1, 0, count)
    wide = words.to(torch.int64) & 0xFFFFFFFF
    # A word more, so that the last integer has a neighbour to look into.
    wide = torch.cat([wide, wide.new_zeros(*wide.shape[:-1], 1)], dim=-1)
    start = torch.arange(count, device=words.device) * bits
    word, shift = start // WORD, start % WORD
    pair = wide[..., word] | (wide[..., word + 1] << WORD)
    values: Tensor = (pair >> shift) & (2**bits - 1)
    return values.to(torch.uint8)


def pack_bits(values: Tensor, bits: int) -> Tensor:
    """Return integers (..., n) as a stream (..., ⌈n·bits / 32⌉) of int32 words.

    Args:
        values: (..., n) uint8, each below 2**bits.
        bits: 1 to 8.
    """
    count = values.shape[-1]
    words = -(-count * bits // WORD)
    # 32 integers fill exactly ``bits`` words.
    padded = torch.nn.functional.pad(values, (0, -count % WORD)).to(torch.int64)
    groups = padded.unflatten(-1, (-1, WORD))
    start = torch.arange(WORD, device=values.device) * bits
    found = groups.new_zeros(*groups.shape[:-1], bits + 1)
    # Fields do not overlap, so adding them is joining them.
    found.index_add_(-1, start // WORD, (groups << (start % WORD)) & 0xFFFFFFFF)
    found.index_add_(-1, start // WORD + 1, groups >> (WORD - start % WORD))
    stream = found[..., :bits].flatten(-2)[..., :words]
    signed: Tensor = ((stream + 2**31) & 0xFFFFFFFF) - 2**31
    return signed.to(torch.int32)
