"""bitsandbytes' 4-bit blocks: NF4 and FP4 (QLoRA, arXiv:2305.14314), scales once more in 8 bits.

The flattened weight is cut into blocks of ``blocksize`` elements, whatever its rows; a code is the
nearest of 16 levels after division by the block's largest magnitude. Two codes share a byte, the
first in the high nibble. With double quantisation the scales, less their mean, are coded in 8 bits
in blocks of 256.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from loratools.codecs.lookup import look_up_pairs

# Quantiles of the normal distribution, as the paper's code rounds them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
# Sign and magnitude, divided by 12; the magnitudes are not in order, and code 8 is −0.
_FP4_HALF = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
_FP4 = (*(x / 12 for x in _FP4_HALF), *(-x / 12 for x in _FP4_HALF))
_TABLES = {"nf4": _NF4, "fp4": _FP4}

NESTED_BLOCK = 256
STORAGES: Mapping[str, int] = {
    "U8": 1, "I8": 1, "F8_E4M3": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8,
}  # fmt: skip
"""Types that the bytes of codes may be declared as (``quant_storage``) → their sizes in bytes."""

_TINY = 1e-38  # keeps the reciprocal of an all-zero block finite


@dataclass(frozen=True, slots=True, eq=False)
class NestedScales:
    """Block scales in 8 bits: ``table[codes] · absmax[block] + offset``.

    Attributes:
        codes: (blocks,) uint8.
        absmax: (⌈blocks / blocksize⌉,) float32.
        table: (256,) float32.
        offset: the scales' mean.
        blocksize: how many scales share an ``absmax``.
    """

    codes: Tensor
    absmax: Tensor
    table: Tensor
    offset: float
    blocksize: int = NESTED_BLOCK

    def decode(self) -> Tensor:
        """Return the scales (blocks,) in float32."""
        every = self.absmax.repeat_interleave(self.blocksize)[: len(self.codes)]
        return self.table[self.codes.long()] * every + self.offset


def levels(kind: str) -> Tensor:
    """Return the 16 values, float32, that the codes of ``nf4`` or ``fp4`` stand for."""
    return torch.tensor(_TABLES[kind], dtype=torch.float32)


def decode(packed: Tensor, scales: Tensor, table: Tensor, blocksize: int, count: int) -> Tensor:
    """Return ``count`` weights in float32, flat.

    Args:
        packed: (⌈count / 2⌉,) uint8, starting at a block.
        scales: (⌈count / blocksize⌉,) float32.
        table: (16,) float32.
        blocksize: elements per scale, even.
        count: how many weights there are.
    """
    values = look_up_pairs(packed, table, high_first=True)[:count]
    whole = count - count % blocksize
    values[:whole].view(-1, blocksize).mul_(scales[: whole // blocksize, None])
    values[whole:].mul_(scales[-1])
    return values


def encode(values: Tensor, kind: str, blocksize: int) -> tuple[Tensor, Tensor]:
    """Return the packed codes (⌈n / 2⌉,) uint8 and the scales (⌈n / blocksize⌉,) float32.

    Bit-identical to bitsandbytes.

    Args:
        values: (n,) float32.
        kind: ``nf4`` or ``fp4``.
        blocksize: elements per scale, even.
    """
    whole = len(values) - len(values) % blocksize
    blocks = values[:whole].view(-1, blocksize)
    scales = blocks.abs().amax(1)
    inside = (blocks * (1.0 / scales.clamp_min(_TINY))[:, None]).flatten()
    if whole < len(values):
        rest = values[whole:]
        scales = torch.cat([scales, rest.abs().amax().reshape(1)])
        # The last block is divided, not multiplied by the reciprocal, which rounds otherwise.
        inside = torch.cat([inside, torch.div(rest, scales[-1:].clamp_min(_TINY))])
    codes = nearest(inside.clamp_(-1.0, 1.0), kind)
    if len(codes) % 2:
        # The last byte's other half codes a zero.
        codes = torch.cat([codes, nearest(inside.new_zeros(1), kind)])
    return pack(codes), scales


def pack(codes: Tensor) -> Tensor:
    """Return codes (2n,) uint8 as bytes (n,), the first of two in the high nibble."""
    return (codes[0::2] << 4) | codes[1::2]


def unpack(packed: Tensor) -> Tensor:
    """Return the codes (2n,) uint8 in bytes (n,)."""
    return torch.stack([packed >> 4, packed & 15], dim=1).flatten()


def nearest(inside: Tensor, kind: str) -> Tensor:
    """Return the codes (n,) uint8 of the levels nearest to values in [−1, 1], ties to the lower."""
    middles, order = _middles(kind)
    place = torch.zeros(inside.shape, dtype=torch.uint8, device=inside.device)
    # Fifteen comparisons are faster than a search in a table of sixteen.
    for middle in middles:
        place += inside > middle
    return place if kind == "nf4" else order.to(place.device)[place.long()]


@cache
def _middles(kind: str) -> tuple[tuple[float, ...], Tensor]:
    """Return the middles between neighbouring levels, and the codes in the levels' order.

    FP4's two zeros are neighbours: the second one, −0, gets the small positive values.
    """
    ordered, order = levels(kind).sort(stable=True)
    return tuple(((ordered[1:] + ordered[:-1]) / 2).tolist()), order.to(torch.uint8)


def encode_scales(scales: Tensor) -> NestedScales:
    """Return block scales (n,) float32 in 8 bits, bit-identical to bitsandbytes on a CPU."""
    offset = scales.mean()
    table = dynamic_table()
    shifted = scales - offset
    count = len(shifted)
    padded = torch.nn.functional.pad(shifted, (0, -count % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    absmax = padded.abs().amax(1)
    inside = (padded * (1.0 / absmax.clamp_min(_TINY))[:, None]).clamp_(-1.0, 1.0)
    index = ((inside + 1.0) / 2.0 * 65535.0 + 0.5).long()
    # Scales that are all alike differ from their mean by nothing, which has code 0.
    codes = torch.where(absmax[:, None] > 0, _dynamic_codes()[index], 0).flatten()[:count]
    return NestedScales(codes, absmax, table, float(offset))


@cache
def dynamic_table() -> Tensor:
    """Return the 256 values of the dynamic 8-bit type (Dettmers et al., arXiv:2110.02861).

    Seven decades below 1, each with twice as many fractions as the one below, of both signs; and
    0 and 1.
    """
    found = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1.0, 2**decade + 1, dtype=torch.float32)
        means = (edges[:-1] + edges[1:]) / 2.0
        found += [10.0 ** (decade - 6) * means, -(10.0 ** (decade - 6)) * means]
    return torch.cat(found).sort().values


@cache
def _dynamic_codes() -> Tensor:
    """Return the code (65536,) uint8 of every step from −1 to 1: how the CPU kernel searches."""
    steps = torch.arange(65536, dtype=torch.float32) / 65535.0 * 2.0 - 1.0
    table = dynamic_table()
    return torch.bucketize(steps, (table[1:] + table[:-1]) / 2).to(torch.uint8)
