"""MLX's affine mode: w = scale · q + bias, codes as a stream of bits along the inputs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.bitstream import pack_bits, unpack_bits
from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch

_TINY = 1e-7  # the smallest scale that MLX writes


@dataclass(frozen=True, slots=True, eq=False)
class MLXWeight(PackedWeight):
    """A weight that ``mlx.core.quantize`` made.

    Attributes:
        shape: (..., out, in).
        parts: ``weight`` (..., out, in·bits/32) uint32; ``scales``, ``biases`` (..., out, groups).
        bits: 2, 3, 4, 5, 6 or 8.
    """

    scheme: ClassVar[str] = "mlx affine"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    bits: int

    def codes(self, start: int, stop: int) -> Tensor:
        words = self.parts["weight"].view(torch.int32).reshape(self.rows, -1)
        return unpack_bits(words[start:stop], self.bits, self.columns)

    def grid(self, start: int, stop: int) -> Grid:
        levels = torch.arange(2**self.bits, dtype=torch.float32)
        scale, bias = (
            self.parts[name].reshape(self.rows, -1)[start:stop].to(torch.float32)
            for name in ("scales", "biases")
        )
        group = torch.arange(self.columns) // (self.columns // scale.shape[1])
        return Grid(levels, scale, group, uniform=True, offset=bias)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        words = pack_bits(codes, self.bits)
        values = words.view(self.parts["weight"].dtype)
        yield Patch("weight", start * words.shape[1], values)


def quantise_mlx(values: Tensor, bits: int, group: int) -> MLXWeight:
    """Return (out, in) float32 in MLX's affine mode, byte-identical to MLX for float32.

    The step is signed so that the end of larger magnitude is exact, and is stretched so that zero
    falls on a code.

    Args:
        values: (out, in) float32.
        bits: 2, 3, 4, 5, 6 or 8.
        group: inputs per scale: 32, 64 or 128.
    """
    rows, columns = values.shape
    blocks = values.view(rows, -1, group)
    low, high = blocks.amin(-1), blocks.amax(-1)
    last = float(2**bits - 1)
    below = low.abs() > high.abs()
    step = torch.div(high - low, torch.tensor(last)).clamp_min(_TINY)
    step = torch.where(below, step, -step)
    edge = torch.where(below, low, high)
    zero = torch.round(edge / step)
    at_zero = zero == 0
    step = torch.where(at_zero, step, edge / torch.where(at_zero, 1.0, zero))
    bias = torch.where(at_zero, 0.0, edge)
    codes = torch.round((blocks - bias[..., None]) / step[..., None]).clamp_(0, last)
    words = pack_bits(codes.to(torch.uint8).view(rows, columns), bits).view(torch.uint32)
    parts = {"weight": words, "scales": step, "biases": bias}
    return MLXWeight((rows, columns), parts, bits)
