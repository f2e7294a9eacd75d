"""MXFP4 and NVFP4: 4-bit floats (E2M1), a small scale for every 32 or 16 of them.

OCP Microscaling formats v1.0 (MXFP4, scales 2**(b − 127)); NVIDIA's NVFP4 (E4M3 scales and one
float32 for the tensor).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.fp8 import scale_values
from loratools.codecs.grid import Grid
from loratools.codecs.lookup import look_up_pairs
from loratools.codecs.packed import PackedWeight, Patch

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = torch.tensor([*_HALF, *(-x for x in _HALF)])
"""What the 16 codes stand for; code 8 is −0."""

# The 15 values ascending, as stored codes, and the place of every stored code among them.
_ORDER = torch.tensor([15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7], dtype=torch.uint8)
_PLACE = torch.tensor([7, 8, 9, 10, 11, 12, 13, 14, 7, 6, 5, 4, 3, 2, 1], dtype=torch.uint8)
_PLACES = torch.cat([_PLACE, torch.zeros(1, dtype=torch.uint8)])


@dataclass(frozen=True, slots=True, eq=False)
class _Float4Weight(PackedWeight):
    """Two codes per byte, the first in the low nibble; scales of blocks along the columns."""

    block: ClassVar[int]
    codes_part: ClassVar[str]

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]

    def scales(self, start: int, stop: int) -> Tensor:
        """Return the scales (stop − start, columns / block) of a range of rows, in float32."""
        raise NotImplementedError

    def decode(self, start: int, stop: int) -> Tensor:
        packed = self._bytes()[start:stop].contiguous().flatten()
        values = look_up_pairs(packed, E2M1, high_first=False).view(stop - start, -1, self.block)
        return (values * self.scales(start, stop)[..., None]).flatten(1)

    def codes(self, start: int, stop: int) -> Tensor:
        return _PLACES[self._stored(start, stop).long()]

    def grid(self, start: int, stop: int) -> Grid:
        group = torch.arange(self.columns) // self.block
        return Grid(E2M1[_ORDER.long()], self.scales(start, stop), group, uniform=False)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        before = self._stored(start, start + len(codes))
        # −0 has the code of 0, and stays what it is.
        same = _PLACES[before.long()] == codes
        stored = torch.where(same, before, _ORDER[codes.long()])
        packed = stored[:, 0::2] | (stored[:, 1::2] << 4)
        dtype = self.parts[self.codes_part].dtype
        yield Patch(self.codes_part, start * self.columns // 2, packed.view(dtype))

    def _stored(self, start: int, stop: int) -> Tensor:
        packed = self._bytes()[start:stop]
        return torch.stack([packed & 15, packed >> 4], dim=-1).flatten(1)

    def _bytes(self) -> Tensor:
        # Rows of whole words (MLX), or of bytes.
        return self.parts[self.codes_part].reshape(self.rows, -1).view(torch.uint8)


class MXFP4Weight(_Float4Weight):
    """Microscaling FP4, as gpt-oss stores it.

    Attributes:
        shape: (..., out, in).
        parts: ``blocks`` (..., out, in/32, 16) uint8; ``scales`` (..., out, in/32) uint8.
    """

    scheme = "mxfp4"
    block = 32
    codes_part = "blocks"

    def scales(self, start: int, stop: int) -> Tensor:
        found = self.parts["scales"].reshape(self.rows, -1)[start:stop]
        return scale_values(found.view(torch.uint8))


@dataclass(frozen=True, slots=True, eq=False)
class NVFP4Weight(_Float4Weight):
    """NVFP4, as ModelOpt and compressed-tensors store it.

    Attributes:
        shape: (out, in).
        parts: ``weight`` (out, in/2) uint8; ``scale`` (out, in/16) float8_e4m3fn; ``scale_2`` ()
            float32 that the scales are multiplied with, or ``global_scale`` that they are
            divided by; neither, where the scales are all there is.
    """

    scheme: ClassVar[str] = "nvfp4"
    block: ClassVar[int] = 16
    codes_part: ClassVar[str] = "weight"

    def scales(self, start: int, stop: int) -> Tensor:
        found = self.parts["scale"].reshape(self.rows, -1)[start:stop].to(torch.float32)
        if "global_scale" in self.parts:
            outer = self.parts["global_scale"].to(torch.float32).reshape(())
            # An infinite divisor would make every weight 0, and is to be seen: ∞ − ∞ is NaN.
            return found / outer + (outer - outer)
        if "scale_2" not in self.parts:
            return found
        return found * self.parts["scale_2"].to(torch.float32).reshape(())
