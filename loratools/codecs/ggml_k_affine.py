"""Q2_K, Q4_K and Q5_K: super-blocks of 256 weights whose sub-blocks have a scale and a minimum.

w = d·s·q − dmin·m, with d and dmin float16 for the super-block and small integers s, m for every
sub-block: 16 of 16 weights with 4-bit s and m (Q2_K), or 8 of 32 with 6 bits (Q4_K, Q5_K).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.codecs.block import BlockCodec
from loratools.codecs.columns import as_column, borrow, in_order_sum
from loratools.codecs.exact import divide, nearest_int_, square_root
from loratools.codecs.ggml_bits import join_bits, read_half, split_bits, write_half
from loratools.codecs.ggml_search import AffineFit, AffineGrid, fit_affine

Q2_GRID = AffineGrid(top=3, first=-0.5, count=16, absolute=True)
Q4_GRID = AffineGrid(top=15, first=-1.0, count=21)
Q5_GRID = AffineGrid(top=31, first=-0.5, count=16)


@dataclass(frozen=True, slots=True, eq=False)
class _SuperBlocks:
    """n super-blocks of k sub-blocks: bytes of d and dmin, integer scales and minima, codes."""

    halves: Tensor  # (n, 4) uint8
    scales: Tensor  # (n, k) uint8
    minima: Tensor  # (n, k) uint8
    codes: Tensor  # (n, 256) uint8


def _quantise(values: Tensor, size: int, grid: AffineGrid, limit: int) -> _SuperBlocks:
    """Return the super-blocks of ``values``, (n, 256), in sub-blocks of ``size`` weights."""
    columns = values.view(-1, size).t().contiguous()
    fit = fit_affine(columns, _weights(columns, grid), grid)
    both = torch.stack([fit.scale, -fit.low]).view(2, len(values), 256 // size)
    units, multiples = _integers(both, limit)
    halves = write_half(units.t())
    step, shift = (read_half(halves).t().unsqueeze(-1) * multiples).flatten(1)
    codes = _codes(values.view(-1, size), step.unsqueeze(-1), shift.unsqueeze(-1), fit, grid.top)
    scales, minima = multiples.to(torch.uint8)
    return _SuperBlocks(halves, scales, minima, codes.view(-1, 256))


def _weights(columns: Tensor, grid: AffineGrid) -> Tensor:
    """Return |w|, plus the root mean square where errors are squared."""
    if grid.absolute:
        return columns.abs()
    total = torch.empty_like(columns[0])
    in_order_sum(as_column(columns * columns), as_column(total))
    return columns.abs().add_(square_root(divide(total, float(len(columns)))))


def _integers(values: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return float32 units (...) and int32 multiples 0 … limit (..., k) for values (..., k)."""
    largest = values.amax(-1).clamp_(min=0) + 0.0  # never −0
    inverse = torch.where(largest > 0, divide(float(limit), largest), 0.0)
    # An inverse that overflows gives 0, as C's rounding of infinity and NaN does.
    scaled = torch.nan_to_num(values * inverse.unsqueeze(-1), nan=0.0, posinf=torch.inf)
    multiples = nearest_int_(scaled).bitwise_and_(0xFF).clamp_(max=limit)
    return divide(largest, float(limit)), multiples


def _codes(values: Tensor, step: Tensor, shift: Tensor, fit: AffineFit, top: int) -> Tensor:
    """Return the codes of (n, m) weights, rounded with the scales (n, 1) as stored; uint8.

    A sub-block whose stored scale is 0 keeps the codes of the search.
    """
    scaled = torch.add(values, shift, out=borrow(values, *values.shape)).div_(step)
    empty = step == 0
    if bool(empty.any()):
        scaled = torch.where(empty, fit.codes(values, top), scaled)
    return nearest_int_(scaled).clamp_(0, top).to(torch.uint8)


def _pack_six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Return (n, 12) bytes: the first four in six bits, the rest in nibbles and top bits."""
    first, second = scales.split(4, -1), minima.split(4, -1)
    high = [part[0] | (part[1] >> 4) << 6 for part in (first, second)]
    low = (first[1] & 15) | (second[1] & 15) << 4
    return torch.cat([*high, low], -1)


def unpack_six_bits(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return scales and minima, (n, 8) uint8 each, of (n, 12) bytes."""
    low = raw[:, 8:]
    parts = zip((raw[:, :4], raw[:, 4:8]), (low & 15, low >> 4), strict=True)
    scales, minima = (torch.cat([byte & 63, nibble | byte >> 6 << 4], -1) for byte, nibble in parts)
    return scales, minima


def _values(codes: Tensor, halves: Tensor, scales: Tensor, minima: Tensor) -> Tensor:
    """Return (n, 256) weights of codes (n, k, size), of d and dmin (n, 2) and (n, k) integers."""
    step, shift = halves[:, :1] * scales, halves[:, 1:] * minima
    return codes.float().mul_(step.unsqueeze(-1)).sub_(shift.unsqueeze(-1)).flatten(1)


def _decode_q2_k(raw: Tensor) -> Tensor:
    scales, minima = raw[:, :16] & 15, raw[:, :16] >> 4
    codes = split_bits(raw[:, 16:80].view(-1, 2, 32), 2).reshape(-1, 16, 16)
    return _values(codes, read_half(raw[:, 80:]), scales, minima)


def _encode_q2_k(values: Tensor) -> Tensor:
    blocks = _quantise(values, 16, Q2_GRID, 15)
    scales = blocks.scales | blocks.minima << 4
    codes = join_bits(blocks.codes.view(-1, 2, 4, 32).unbind(2), 2).flatten(1)
    return torch.cat([scales, codes, blocks.halves], -1)


def _decode_q4_k(raw: Tensor) -> Tensor:
    codes = split_bits(raw[:, 16:].view(-1, 4, 32), 4).view(-1, 8, 32)
    return _values(codes, read_half(raw[:, :4]), *unpack_six_bits(raw[:, 4:16]))


def _pack_nibbles(codes: Tensor) -> Tensor:
    """Return (n, 128) bytes: of 64 codes each, the first 32 low and the others high."""
    return join_bits(codes.view(-1, 4, 2, 32).unbind(2), 4).flatten(1)


def _encode_q4_k(values: Tensor) -> Tensor:
    blocks = _quantise(values, 32, Q4_GRID, 63)
    scales = _pack_six_bits(blocks.scales, blocks.minima)
    return torch.cat([blocks.halves, scales, _pack_nibbles(blocks.codes)], -1)


def _decode_q5_k(raw: Tensor) -> Tensor:
    fifth = split_bits(raw[:, 16:48], 1) << 4
    codes = split_bits(raw[:, 48:].view(-1, 4, 32), 4).view(-1, 8, 32) | fifth
    return _values(codes, read_half(raw[:, :4]), *unpack_six_bits(raw[:, 4:16]))


def _encode_q5_k(values: Tensor) -> Tensor:
    blocks = _quantise(values, 32, Q5_GRID, 63)
    scales = _pack_six_bits(blocks.scales, blocks.minima)
    fifth = join_bits((blocks.codes >> 4).view(-1, 8, 32).unbind(1), 1)
    nibbles = _pack_nibbles(blocks.codes & 15)
    return torch.cat([blocks.halves, scales, fifth, nibbles], -1)


Q2_K = BlockCodec("Q2_K", 256, 84, _decode_q2_k, _encode_q2_k)
Q4_K = BlockCodec("Q4_K", 256, 144, _decode_q4_k, _encode_q4_k)
Q5_K = BlockCodec("Q5_K", 256, 176, _decode_q5_k, _encode_q5_k)
