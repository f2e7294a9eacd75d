"""HQQ (mobiusml.github.io/hqq_blog): affine groups of the flattened matrix along either axis."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch

# Bits → how many codes share a stored value; 3-bit codes are packed by tens in 32-bit words.
_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


@dataclass(frozen=True, slots=True, eq=False)
class HQQWeight(PackedWeight):
    """w = (q − zero) · scale over groups of the weight as (groups, size) or (size, groups).

    A stored byte holds codes of rows that lie far apart (the first half of the reshaped rows in
    the high nibble), so the matrix is decoded as a whole.

    Attributes:
        shape: (out, in).
        parts: ``W_q`` packed along the reshaped matrix's rows, uint8 (int32 for 3 bits); ``scale``
            and ``zero``: (groups, 1) for axis 1, (1, groups) for axis 0.
        bits: 1, 2, 3, 4 or 8.
        axis: along which a group runs: 1 for rows of the reshaped matrix, 0 for its columns.
        group_size: elements per group.
    """

    scheme: ClassVar[str] = "hqq"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    bits: int
    axis: int
    group_size: int

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """Return the number of rows: the matrix is one range."""
        return self.rows

    def codes(self, start: int, stop: int) -> Tensor:
        height = self._reshaped()[0]
        packed = self.parts["W_q"]
        shifts = _shifts(self.bits)
        parts = [(packed >> shift) & (2**self.bits - 1) for shift in shifts]
        return torch.cat(parts)[:height].to(torch.uint8).reshape(self.rows, self.columns)

    def grid(self, start: int, stop: int) -> Grid:
        levels = torch.arange(2**self.bits, dtype=torch.float32)
        scale, zero = (
            self.parts[name].to(torch.float32).expand(self._reshaped()).reshape(self.rows, -1)
            for name in ("scale", "zero")
        )
        group = torch.arange(self.columns)
        return Grid(levels, scale, group, uniform=True, zero=zero)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        flat = codes.reshape(self._reshaped())
        per_word = _PER_WORD[self.bits]
        dtype = self.parts["W_q"].dtype
        padded = torch.nn.functional.pad(flat, (0, 0, 0, -len(flat) % per_word)).to(dtype)
        found = torch.zeros_like(self.parts["W_q"])
        for shift, part in zip(_shifts(self.bits), padded.chunk(per_word), strict=True):
            found |= part << shift
        yield Patch("W_q", 0, found)

    def _reshaped(self) -> tuple[int, int]:
        count = self.rows * self.columns // self.group_size
        return (count, self.group_size) if self.axis == 1 else (self.group_size, count)


def _shifts(bits: int) -> list[int]:
    """Return the places of the codes in a stored value, the first rows' the highest."""
    return [bits * (_PER_WORD[bits] - 1 - i) for i in range(_PER_WORD[bits])]
