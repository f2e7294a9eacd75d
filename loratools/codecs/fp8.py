"""FP8 weights with scales: one per tensor, per row, or per block of rows and columns.

Float8 as in arXiv:2209.05433 (E4M3, E5M2); DeepSeek-V3's 128×128 blocks; scales in float or E8M0.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch
from loratools.codecs.scale_blocks import ScaleBlocks


@dataclass(frozen=True, slots=True, eq=False)
class FP8Weight(PackedWeight):
    """``weight`` in float8, times ``scale``.

    Attributes:
        shape: (out, in), or more dimensions.
        parts: ``weight`` (out, in) float8; ``scale`` () or (1,), (out,) or (out, 1), or
            (⌈out / block⌉, ⌈in / block⌉), in float or as E8M0 exponents (float8_e8m0fnu, uint8);
            none for a tensor that was merely cast; optionally ``zero_point``, shaped as that.
        block: rows and columns that share a scale, or None for one scale per tensor or row.
    """

    scheme: ClassVar[str] = "fp8"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    block: tuple[int, int] | None = None

    @property
    def columns(self) -> int:
        """Size of a row: the whole filter of a convolution."""
        return math.prod(self.shape[1:]) if len(self.shape) > 3 else self.shape[-1]

    @property
    def rows(self) -> int:
        """Number of rows."""
        return math.prod(self.shape) // self.columns

    def decode(self, start: int, stop: int) -> Tensor:
        weight = self._matrix()[start:stop].to(torch.float32)
        if "scale" not in self.parts:
            return weight
        grid = self.grid(start, stop)
        if grid.zero is not None:
            weight -= grid.zero[:, grid.group]
        return weight * grid.scale[:, grid.group]

    def codes(self, start: int, stop: int) -> Tensor:
        raw = self._matrix()[start:stop].view(torch.uint8)
        return _tables(self.parts["weight"].dtype)[1][raw.long()]

    def grid(self, start: int, stop: int) -> Grid:
        levels = _tables(self.parts["weight"].dtype)[0]
        if "scale" not in self.parts:
            ones, none = torch.ones(stop - start, 1), torch.zeros(self.columns, dtype=torch.int64)
            return Grid(levels, ones, none, uniform=False)
        blocks = ScaleBlocks.of(self, self.block)
        scale = blocks.rows(scale_values(self.parts["scale"]), start, stop)
        zero = self.parts.get("zero_point")
        if zero is not None:
            zero = blocks.rows(zero.to(torch.float32), start, stop).expand_as(scale)
        return Grid(levels, scale, blocks.group(scale), uniform=False, zero=zero)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        dtype = self.parts["weight"].dtype
        stop = start + len(codes)
        # −0 has the code of 0, and stays what it is.
        same = self.codes(start, stop) == codes
        stored = self._matrix()[start:stop].view(torch.uint8)
        found = torch.where(same, stored, _tables(dtype)[2][codes.long()])
        yield Patch("weight", start * self.columns, found.view(dtype))

    def _matrix(self) -> Tensor:
        return self.parts["weight"].reshape(self.rows, self.columns)


def scale_values(scale: Tensor) -> Tensor:
    """Return scales in float32; unsigned bytes are E8M0 exponents, 2**(b − 127)."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.to(torch.float32) - 127.0)
    return scale.to(torch.float32)


def quantise_fp8(
    values: Tensor, block: tuple[int, int] | None, dtype: torch.dtype = torch.float8_e4m3fn
) -> FP8Weight:
    """Return (out, in) float32 in float8, scales so that the largest value is the type's largest.

    Args:
        values: (out, in) float32.
        block: rows and columns that share a scale, or None for one scale per row.
        dtype: the float8 type.
    """
    rows, columns = values.shape
    down, across = block or (1, columns)
    padded = torch.nn.functional.pad(values, (0, -columns % across, 0, -rows % down))
    blocks = padded.view(len(padded) // down, down, -1, across)
    scale = blocks.abs().amax((1, 3)) / torch.finfo(dtype).max
    scale = torch.where(scale == 0, 1.0, scale)
    weight = (blocks / scale[:, None, :, None]).view(padded.shape)[:rows, :columns].to(dtype)
    return FP8Weight((rows, columns), {"weight": weight.contiguous(), "scale": scale}, block)


@cache
def _tables(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return the finite levels ascending, byte → code, and code → byte (NaN codes the zero)."""
    values = torch.arange(256, dtype=torch.uint8).view(dtype).to(torch.float32)
    finite = values.isfinite() & ~((values == 0) & torch.signbit(values))
    order = torch.arange(256)[finite][values[finite].argsort()]
    levels = values[order]
    position = torch.searchsorted(levels, torch.where(values.isfinite(), values, 0.0))
    return levels, position.to(torch.uint8), order.to(torch.uint8)
