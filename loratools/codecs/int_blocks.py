"""Integers of 8 bits with a scale, and perhaps a zero, for each tensor, row, group or block.

compressed-tensors' ``int-quantized`` and ``naive-quantized``, torchao's Int8Tensor and
IntxUnpackedToInt8Tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch
from loratools.codecs.scale_blocks import ScaleBlocks


@dataclass(frozen=True, slots=True, eq=False)
class IntBlocksWeight(PackedWeight):
    """w = (q − zero) · scale.

    Attributes:
        shape: (out, in), or a stack of such.
        parts: ``weight`` (out, in) int8; ``scale`` and optionally ``zero_point``, one element or
            (⌈out / down⌉, ⌈in / across⌉).
        block: (down, across), the rows and columns that share a scale; None for rows.
        bits: q lies in −2**(bits−1) … 2**(bits−1) − 1.
    """

    scheme: ClassVar[str] = "int8 blocks"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    block: tuple[int, int] | None
    bits: int = 8

    def codes(self, start: int, stop: int) -> Tensor:
        half = 2 ** (self.bits - 1)
        stored = self.parts["weight"].reshape(self.rows, self.columns)[start:stop]
        found: Tensor = (stored.to(torch.int16) + half).clamp_(0, 2 * half - 1)
        return found.to(torch.uint8)

    def grid(self, start: int, stop: int) -> Grid:
        half = 2 ** (self.bits - 1)
        levels = torch.arange(-half, half, dtype=torch.float32)
        blocks = ScaleBlocks.of(self, self.block)
        scale = blocks.rows(self.parts["scale"], start, stop).to(torch.float32)
        zero = self.parts.get("zero_point")
        if zero is not None:
            zero = blocks.rows(zero, start, stop).to(torch.float32).expand_as(scale)
        return Grid(levels, scale, blocks.group(scale), uniform=True, zero=zero)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        stored = (codes.to(torch.int16) - 2 ** (self.bits - 1)).to(torch.int8)
        yield Patch("weight", start * self.columns, stored)
