"""MXFP6: floats of 6 bits (E2M3) in a stream of bytes, an exponent for every 32 of them.

OCP Microscaling formats v1.0, as compressed-tensors stores it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.bitstream import pack_bits, unpack_bits
from loratools.codecs.fp8 import scale_values
from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch

_HALF = [m / 8 for m in range(8)] + [(1 + m / 8) * 2**e for e in range(3) for m in range(8)]
# Codes with the sign's bit ascending in value, but for −0, which is +0's level.
_ORDER = torch.tensor([*range(63, 32, -1), *range(32)], dtype=torch.uint8)
_PLACE = torch.tensor([*range(31, 63), *range(31, -1, -1)], dtype=torch.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class MXFP6Weight(PackedWeight):
    """w = q · 2**(scale − 127), with q of E2M3.

    Attributes:
        shape: (out, in).
        parts: ``blocks`` (out, in · 3/4) uint8, four codes in three bytes from the low bits up;
            ``scales`` (out, in/32), uint8 or float8_e8m0fnu.
    """

    scheme: ClassVar[str] = "mxfp6"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    def codes(self, start: int, stop: int) -> Tensor:
        return _PLACE[self._stored(start, stop).long()]

    def grid(self, start: int, stop: int) -> Grid:
        levels = torch.tensor([*(-x for x in reversed(_HALF[1:])), *_HALF])
        scale = scale_values(self.parts["scales"][start:stop].view(torch.uint8))
        return Grid(levels, scale, torch.arange(self.columns) // 32, uniform=False)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        before = self._stored(start, start + len(codes))
        # −0 has the code of 0, and stays what it is.
        same = _PLACE[before.long()] == codes
        packed = pack_bits(torch.where(same, before, _ORDER[codes.long()]), 6).view(torch.uint8)
        yield Patch("blocks", start * packed.shape[1], packed)

    def _stored(self, start: int, stop: int) -> Tensor:
        words = self.parts["blocks"][start:stop].contiguous().view(torch.int32)
        return unpack_bits(words, 6, self.columns)
