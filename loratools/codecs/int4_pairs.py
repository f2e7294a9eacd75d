"""torchao's Int4Tensor: signed nibbles in pairs, a scale and an offset for each group of inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch


@dataclass(frozen=True, slots=True, eq=False)
class Int4PairsWeight(PackedWeight):
    """w = q · scale + zero, with q in −8 … 7.

    Attributes:
        shape: (out, in), or a stack of such.
        parts: ``weight`` (..., out, in/2) int8 or uint8, the even column in the low nibble;
            ``scale`` and ``zero_point`` (..., groups, out) in float.
    """

    scheme: ClassVar[str] = "torchao int4"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    def codes(self, start: int, stop: int) -> Tensor:
        packed = self.parts["weight"].reshape(self.rows, -1)[start:stop].view(torch.uint8)
        stored = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)
        # Two's complement of 4 bits: −8 is stored as 8.
        return stored ^ 8

    def grid(self, start: int, stop: int) -> Grid:
        levels = torch.arange(-8, 8, dtype=torch.float32)
        scale, zero = (
            self.parts[part].mT.reshape(self.rows, -1)[start:stop].to(torch.float32)
            for part in ("scale", "zero_point")
        )
        group = torch.arange(self.columns) // (self.columns // scale.shape[1])
        return Grid(levels, scale, group, uniform=True, offset=zero)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        stored = codes ^ 8
        packed = stored[:, 0::2] | (stored[:, 1::2] << 4)
        dtype = self.parts["weight"].dtype
        yield Patch("weight", start * self.columns // 2, packed.view(dtype))
