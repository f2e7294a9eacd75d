"""FP8 weights with scales: one per tensor, per row, or per block of rows and columns.

Float8 as in arXiv:2209.05433 (E4M3, E5M2); DeepSeek-V3's 128×128 blocks; scales in float or E8M0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch


@dataclass(frozen=True, slots=True, eq=False)
class FP8Weight(PackedWeight):
    """``weight`` in float8, times ``scale``.

    Attributes:
        shape: (out, in), or more dimensions.
        parts: ``weight`` (out, in) float8; ``scale`` () or (1,), (out,) or (out, 1), or
            (⌈out / block⌉, ⌈in / block⌉), in float or as E8M0 exponents (float8_e8m0fnu, uint8).
        block: rows and columns that share a scale, or None for one scale per tensor or row.
    """

    scheme: ClassVar[str] = "fp8"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    block: tuple[int, int] | None = None

    def decode(self, start: int, stop: int) -> Tensor:
        weight = self._matrix()[start:stop].to(torch.float32)
        grid = self.grid(start, stop)
        return weight * grid.scale[:, grid.group]

    def codes(self, start: int, stop: int) -> Tensor:
        raw = self._matrix()[start:stop].view(torch.uint8)
        return _tables(self.parts["weight"].dtype)[1][raw.long()]

    def grid(self, start: int, stop: int) -> Grid:
        levels = _tables(self.parts["weight"].dtype)[0]
        scale = scale_values(self.parts["scale"])
        group = torch.arange(self.columns)
        if self.block is None:
            rows = scale.flatten().expand(self.rows)[start:stop, None]
            return Grid(levels, rows, torch.zeros_like(group), uniform=False)
        down, across = self.block
        matrix = scale.reshape(-1, scale.shape[-1])
        rows = matrix[self._scale_rows(start, stop, down, len(matrix))]
        return Grid(levels, rows, group // across, uniform=False)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        bytes_ = _tables(self.parts["weight"].dtype)[2][codes.long()]
        yield Patch("weight", start * self.columns, bytes_.view(self.parts["weight"].dtype))

    def _matrix(self) -> Tensor:
        return self.parts["weight"].reshape(self.rows, self.columns)

    def _scale_rows(self, start: int, stop: int, down: int, count: int) -> Tensor:
        """Return the row of scales of every row; stacked matrices have their own last block."""
        height = self.shape[-2]
        row = torch.arange(start, stop)
        each = -(-height // down)
        return ((row // height) * each + row % height // down).clamp_max(count - 1)


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
