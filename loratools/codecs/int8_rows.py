"""LLM.int8 (arXiv:2208.07339) as bitsandbytes stores it: int8 rows, each with its magnitude."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch

# bitsandbytes multiplies by this float32 rather than divide by 127.
_STEP = 7.874015718698502e-3


@dataclass(frozen=True, slots=True, eq=False)
class Int8Weight(PackedWeight):
    """Row-wise int8: w = q · SCB · (1/127).

    Attributes:
        shape: (out, in).
        parts: ``weight`` (out, in) int8; ``SCB`` (out,) in float, each row's largest magnitude.
    """

    scheme: ClassVar[str] = "int8"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    def decode(self, start: int, stop: int) -> Tensor:
        return self.parts["weight"][start:stop] * self._scale(start, stop) * _STEP

    def codes(self, start: int, stop: int) -> Tensor:
        return (self.parts["weight"][start:stop].to(torch.int16) + 128).to(torch.uint8)

    def grid(self, start: int, stop: int) -> Grid:
        levels = torch.arange(-128, 128, dtype=torch.float32)
        scale = self._scale(start, stop) * _STEP
        group = torch.zeros(self.columns, dtype=torch.int64)
        return Grid(levels, scale, group, uniform=True)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        yield Patch("weight", start * self.columns, (codes.to(torch.int16) - 128).to(torch.int8))

    def _scale(self, start: int, stop: int) -> Tensor:
        return self.parts["SCB"][start:stop, None].to(torch.float32)


def quantise_int8(values: Tensor) -> Int8Weight:
    """Return (out, in) float32 as int8 rows, as bitsandbytes rounds them.

    Args:
        values: (out, in) float32.
    """
    scale = values.abs().amax(1)
    inverse = torch.where(scale == 0, 0.0, 127.0 / scale)
    codes = (values * inverse[:, None]).round().to(torch.int8)
    return Int8Weight(tuple(values.shape), {"weight": codes, "SCB": scale})
