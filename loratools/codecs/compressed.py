"""compressed-tensors' ``pack-quantized``: integer codes packed along the inputs, grouped scales."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.bitstream import pack_bits, unpack_bits
from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch


@dataclass(frozen=True, slots=True, eq=False)
class PackQuantizedWeight(PackedWeight):
    """w = (q − zero) · scale with q in −2**(b−1) … 2**(b−1) − 1, stored from 0.

    Attributes:
        shape: (out, in).
        parts: ``weight_packed`` (out, ⌈in·bits/32⌉) int32; ``weight_scale`` (out, groups) or
            (out, 1); optionally ``weight_zero_point`` (⌈out·bits/32⌉, groups) int32, packed along
            the rows, or (1,) int8, and ``weight_g_idx`` (in,), the group of every input.
        bits: 1 to 8.
    """

    scheme: ClassVar[str] = "compressed-tensors pack-quantized"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    bits: int

    def codes(self, start: int, stop: int) -> Tensor:
        return unpack_bits(self.parts["weight_packed"][start:stop], self.bits, self.columns)

    def grid(self, start: int, stop: int) -> Grid:
        half = 2 ** (self.bits - 1)
        levels = torch.arange(-half, half, dtype=torch.float32)
        scale = self.parts["weight_scale"][start:stop].to(torch.float32).reshape(stop - start, -1)
        zero, group = self._zero(start, stop), self._group(scale)
        return Grid(levels, scale, group, uniform=True, zero=zero)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        words = pack_bits(codes, self.bits)
        yield Patch("weight_packed", start * words.shape[1], words)

    def _zero(self, start: int, stop: int) -> Tensor | None:
        packed = self.parts.get("weight_zero_point")
        if packed is None:
            return None
        if packed.dtype == torch.int8:
            # One zero for the whole tensor is not packed.
            return packed.to(torch.float32).expand(self.rows, -1)[start:stop]
        zeros = unpack_bits(packed.T, self.bits, self.rows).T[start:stop].to(torch.float32)
        return zeros.sub_(2 ** (self.bits - 1))

    def _group(self, scale: Tensor) -> Tensor:
        listed = self.parts.get("weight_g_idx")
        if listed is not None and int(listed.min()) >= 0:
            return listed.to(torch.int64)
        return torch.arange(self.columns) // -(-self.columns // scale.shape[1])
