"""ggml's block types as codes on grids: what a row block's scales allow, and storing other codes.

The bytes of scales and minima stay as they are. Layouts as in the codecs' modules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from loratools.codecs.ggml_bits import join_bits, read_half, split_bits
from loratools.codecs.ggml_float4 import DOUBLED, half_power
from loratools.codecs.ggml_iq4 import LEVELS
from loratools.codecs.ggml_k_affine import unpack_six_bits
from loratools.codecs.ggml_k_signed import unpack_q3_scales
from loratools.codecs.grid import Grid

Scales = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""(n, bytes) → scale and offset (or None), (n, groups of a block) float32."""


@dataclass(frozen=True, slots=True)
class GridType:
    """One block type.

    Attributes:
        levels: ascending, as the codes stand for them before scaling.
        group: weights that share a scale.
        bytes: of a block.
        scales: reads scales and offsets of blocks.
        codes: reads the codes of blocks, (n, bytes) → (n, elements) uint8.
        store: writes codes (n, elements) into a copy of blocks.
    """

    levels: tuple[float, ...]
    group: int
    bytes: int
    scales: Scales
    codes: Callable[[Tensor], Tensor]
    store: Callable[[Tensor, Tensor], Tensor]

    def read(self, raw: Tensor) -> tuple[Tensor, Grid]:
        """Return codes (rows, columns) and grid of rows of blocks, (rows, k·bytes) uint8."""
        rows, blocks = len(raw), raw.reshape(-1, self.bytes)
        codes = self.codes(blocks).view(rows, -1)
        scale, offset = (None if p is None else p.reshape(rows, -1) for p in self.scales(blocks))
        assert scale is not None
        levels = torch.tensor(self.levels, dtype=torch.float32, device=raw.device)
        group = torch.arange(codes.shape[1], device=raw.device) // self.group
        uniform = self.levels == tuple(float(int(self.levels[0]) + i) for i in range(len(levels)))
        return codes, Grid(levels, scale, group, uniform, offset=offset)

    def write(self, raw: Tensor, codes: Tensor) -> Tensor:
        """Return rows of blocks with other codes (rows, columns)."""
        blocks = raw.reshape(-1, self.bytes)
        return self.store(blocks, codes.reshape(len(blocks), -1)).view(raw.shape)


# ── blocks of 32 with one scale ──


def _half(raw: Tensor) -> tuple[Tensor, Tensor | None]:
    return read_half(raw[:, :2]), None


def _half_and_low(raw: Tensor) -> tuple[Tensor, Tensor | None]:
    scale, low = read_half(raw[:, :4]).split(1, -1)
    return scale, low


def _nibbles(raw: Tensor) -> Tensor:
    return split_bits(raw, 4).flatten(-2)


def _join_nibbles(codes: Tensor) -> Tensor:
    return join_bits(codes.split(16, -1), 4)


def _four_bits(start: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    def store(raw: Tensor, codes: Tensor) -> Tensor:
        return torch.cat([raw[:, :start], _join_nibbles(codes)], -1)

    return lambda raw: _nibbles(raw[:, start:]), store


def _five_bits(start: int) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    def read(raw: Tensor) -> Tensor:
        fifth = split_bits(raw[:, start : start + 4].unsqueeze(-1), 1).flatten(1)
        return _nibbles(raw[:, start + 4 :]) | fifth << 4

    def store(raw: Tensor, codes: Tensor) -> Tensor:
        fifth = join_bits((codes >> 4).view(-1, 4, 8).unbind(-1), 1)
        return torch.cat([raw[:, :start], fifth, _join_nibbles(codes & 15)], -1)

    return read, store


def _read_q8_0(raw: Tensor) -> Tensor:
    return raw[:, 2:] ^ 0x80


def _store_q8_0(raw: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([raw[:, :2], codes ^ 0x80], -1)


# The stored codes of MXFP4 in the order of their values; 8 is −0.
_ORDER = (15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7)
_PLACE = (7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1, 0)
_E2M1 = (*(-float(x) for x in reversed(DOUBLED[1:])), *(float(x) for x in DOUBLED))


def _table(values: tuple[int, ...], codes: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8, device=codes.device)[codes.int()]


def _read_mxfp4(raw: Tensor) -> Tensor:
    return _table(_PLACE, _nibbles(raw[:, 1:]))


def _store_mxfp4(raw: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([raw[:, :1], _join_nibbles(_table(_ORDER, codes))], -1)


# ── super-blocks of 256 ──


def _q2_k_scales(raw: Tensor) -> tuple[Tensor, Tensor | None]:
    unit, low = read_half(raw[:, 80:]).split(1, -1)
    return unit * (raw[:, :16] & 15), -(low * (raw[:, :16] >> 4))


def _read_q2_k(raw: Tensor) -> Tensor:
    return split_bits(raw[:, 16:80].view(-1, 2, 32), 2).flatten(1)


def _store_q2_k(raw: Tensor, codes: Tensor) -> Tensor:
    packed = join_bits(codes.view(-1, 2, 4, 32).unbind(2), 2).flatten(1)
    return torch.cat([raw[:, :16], packed, raw[:, 80:]], -1)


def _six_bit_scales(raw: Tensor) -> tuple[Tensor, Tensor | None]:
    unit, low = read_half(raw[:, :4]).split(1, -1)
    scales, minima = unpack_six_bits(raw[:, 4:16])
    return unit * scales, -(low * minima)


def _pairs(codes: Tensor) -> Tensor:
    """Return (n, 128) bytes: of 64 codes each, the first 32 low and the others high."""
    return join_bits(codes.view(-1, 4, 2, 32).unbind(2), 4).flatten(1)


def _read_q4_k(raw: Tensor) -> Tensor:
    return split_bits(raw[:, 16:].view(-1, 4, 32), 4).flatten(1)


def _store_q4_k(raw: Tensor, codes: Tensor) -> Tensor:
    return torch.cat([raw[:, :16], _pairs(codes)], -1)


def _read_q5_k(raw: Tensor) -> Tensor:
    fifth = split_bits(raw[:, 16:48], 1).flatten(1) << 4
    return split_bits(raw[:, 48:].view(-1, 4, 32), 4).flatten(1) | fifth


def _store_q5_k(raw: Tensor, codes: Tensor) -> Tensor:
    fifth = join_bits((codes >> 4).view(-1, 8, 32).unbind(1), 1)
    return torch.cat([raw[:, :16], fifth, _pairs(codes & 15)], -1)


def _q3_k_scales(raw: Tensor) -> tuple[Tensor, Tensor | None]:
    return read_half(raw[:, 108:]) * unpack_q3_scales(raw[:, 96:108]), None


def _read_q3_k(raw: Tensor) -> Tensor:
    mask = split_bits(raw[:, :32], 1).flatten(1)
    return split_bits(raw[:, 32:96].view(-1, 2, 32), 2).flatten(1) | mask << 2


def _store_q3_k(raw: Tensor, codes: Tensor) -> Tensor:
    mask = join_bits((codes >> 2).view(-1, 8, 32).unbind(1), 1)
    low = join_bits((codes & 3).view(-1, 2, 4, 32).unbind(2), 2).flatten(1)
    return torch.cat([mask, low, raw[:, 96:]], -1)


def _q6_k_scales(raw: Tensor) -> tuple[Tensor, Tensor | None]:
    return read_half(raw[:, 208:]) * raw[:, 192:208].view(torch.int8), None


def _read_q6_k(raw: Tensor) -> Tensor:
    low = split_bits(raw[:, :128].view(-1, 2, 64), 4).view(-1, 2, 4, 32)
    high = split_bits(raw[:, 128:192].view(-1, 2, 32), 2)
    return (low | high << 4).flatten(1)


def _store_q6_k(raw: Tensor, codes: Tensor) -> Tensor:
    quarters = codes.view(-1, 2, 4, 32)
    nibbles = quarters & 15
    low = (nibbles[:, :, :2] | nibbles[:, :, 2:] << 4).flatten(1)
    high = join_bits((quarters >> 4).unbind(2), 2).flatten(1)
    return torch.cat([low, high, raw[:, 192:]], -1)


def _integers(first: int, last: int) -> tuple[float, ...]:
    return tuple(float(level) for level in range(first, last + 1))


GGML_GRIDS: Mapping[str, GridType] = MappingProxyType(
    {
        "Q4_0": GridType(_integers(-8, 7), 32, 18, _half, *_four_bits(2)),
        "Q4_1": GridType(_integers(0, 15), 32, 20, _half_and_low, *_four_bits(4)),
        "Q5_0": GridType(_integers(-16, 15), 32, 22, _half, *_five_bits(2)),
        "Q5_1": GridType(_integers(0, 31), 32, 24, _half_and_low, *_five_bits(4)),
        "Q8_0": GridType(_integers(-128, 127), 32, 34, _half, _read_q8_0, _store_q8_0),
        "Q2_K": GridType(_integers(0, 3), 16, 84, _q2_k_scales, _read_q2_k, _store_q2_k),
        "Q3_K": GridType(_integers(-4, 3), 16, 110, _q3_k_scales, _read_q3_k, _store_q3_k),
        "Q4_K": GridType(_integers(0, 15), 32, 144, _six_bit_scales, _read_q4_k, _store_q4_k),
        "Q5_K": GridType(_integers(0, 31), 32, 176, _six_bit_scales, _read_q5_k, _store_q5_k),
        "Q6_K": GridType(_integers(-32, 31), 16, 210, _q6_k_scales, _read_q6_k, _store_q6_k),
        "IQ4_NL": GridType(tuple(map(float, LEVELS)), 32, 18, _half, *_four_bits(2)),
        "MXFP4": GridType(
            _E2M1,
            32,
            17,
            lambda raw: (half_power(raw[:, :1]), None),
            _read_mxfp4,
            _store_mxfp4,
        ),
    }
)
"""By ggml's name; other types are only coded afresh."""
