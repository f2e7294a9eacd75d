"""GPTQ and AWQ: integer codes in 32-bit words, one scale and zero per group of input columns.

Both store the transpose, (in, out): w[o, i] = (q − zero[g, o]) · scale[g, o].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs.bitstream import pack_bits, unpack_bits
from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch

# Which output column each nibble of a word holds, from the low one up.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True, slots=True, eq=False)
class GPTQWeight(PackedWeight):
    """GPTQ (arXiv:2210.17323) as AutoGPTQ and GPTQModel store it.

    Attributes:
        shape: (out, in).
        parts: ``qweight`` (in·bits/32, out) int32, a stream along the inputs; ``qzeros``
            (groups, out·bits/32) int32; ``scales`` (groups, out); ``g_idx`` (in,) int32, the group
            of every input, not in order with act-order.
        bits: 2, 3, 4 or 8.
        zero_step: what is added to stored zeros: 1 in the first format, 0 in ``gptq_v2``.
    """

    scheme: ClassVar[str] = "gptq"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    bits: int
    zero_step: int = 1

    def codes(self, start: int, stop: int) -> Tensor:
        words = self.parts["qweight"][:, start:stop].T
        return unpack_bits(words, self.bits, self.columns)

    def grid(self, start: int, stop: int) -> Grid:
        zeros = unpack_bits(self.parts["qzeros"], self.bits, self.rows)[:, start:stop]
        # A stored zero of all ones stands for 0 in the first format's later files: it wraps.
        zeros = (zeros.to(torch.float32) + self.zero_step) if self.zero_step else zeros.float()
        scale = self.parts["scales"][:, start:stop].to(torch.float32)
        group = self.parts["g_idx"].to(torch.int64)
        return _affine(scale, zeros, group, self.bits)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        yield Patch("qweight", start, pack_bits(codes, self.bits).T, axis=1)


@dataclass(frozen=True, slots=True, eq=False)
class AWQWeight(PackedWeight):
    """AWQ (arXiv:2306.00978) in the ``gemm`` layout, 4 bits.

    Attributes:
        shape: (out, in).
        parts: ``qweight`` (in, out/8) int32; ``qzeros`` (groups, out/8) int32; ``scales``
            (groups, out).
        group_size: inputs per group.
    """

    scheme: ClassVar[str] = "awq"
    row_step: ClassVar[int] = 8

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    group_size: int

    def codes(self, start: int, stop: int) -> Tensor:
        words = self.parts["qweight"][:, start // 8 : -(-stop // 8)]
        return _from_awq(words).T

    def grid(self, start: int, stop: int) -> Grid:
        zeros = _from_awq(self.parts["qzeros"][:, start // 8 : -(-stop // 8)])
        scale = self.parts["scales"][:, start:stop].to(torch.float32)
        group = torch.arange(self.columns) // self.group_size
        return _affine(scale, zeros.to(torch.float32), group, 4)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        ordered = codes.T.unflatten(1, (-1, 8))[..., list(_AWQ_ORDER)]
        yield Patch("qweight", start // 8, pack_bits(ordered, 4).flatten(1), axis=1)


def _from_awq(words: Tensor) -> Tensor:
    """Return the nibbles of (n, m) words as (n, 8m) in the order of the columns."""
    nibbles = unpack_bits(words.unsqueeze(-1), 4, 8)
    place = torch.tensor(_AWQ_ORDER).argsort()
    return nibbles[..., place].flatten(1)


def _affine(scale: Tensor, zeros: Tensor, group: Tensor, bits: int) -> Grid:
    """Return the grid of (q − zero)·scale for (groups, out) scales and zeros."""
    levels = torch.arange(2**bits, dtype=torch.float32)
    return Grid(levels, scale.T, group, uniform=True, zero=zeros.T)
