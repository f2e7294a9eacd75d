"""A weight of a bitsandbytes 4-bit checkpoint: codes and scales over the flattened matrix."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from loratools.codecs import bnb4
from loratools.codecs.grid import Grid
from loratools.codecs.packed import PackedWeight, Patch


@dataclass(frozen=True, slots=True, eq=False)
class BnB4Weight(PackedWeight):
    """NF4 or FP4, with plain or nested scales; see ``bnb4``.

    Attributes:
        shape: (out, in).
        parts: ``weight`` (⌈n/2⌉, 1) of any dtype (the bytes count); ``absmax`` (⌈n/blocksize⌉,)
            in float, or uint8 with ``nested_absmax`` and ``nested_quant_map``; ``quant_map`` (16,).
        blocksize: elements per scale.
        nested: scales per nested scale, or 0.
        nested_offset: the mean that nested scales are measured from.
    """

    scheme: ClassVar[str] = "bitsandbytes 4-bit"

    shape: tuple[int, ...]
    parts: Mapping[str, Tensor]
    blocksize: int = 64
    nested: int = 0
    nested_offset: float = 0.0

    @property
    def row_step(self) -> int:  # type: ignore[override]
        """Return the rows after which two codes end together: 2 for an odd number of columns."""
        return 1 + self.columns % 2

    def scales(self, first: int, last: int) -> Tensor:
        """Return the scales of blocks ``first`` to ``last`` in float32."""
        absmax = self.parts["absmax"]
        if not self.nested:
            return absmax[first:last].to(torch.float32)
        table = self.parts["nested_quant_map"].to(torch.float32)
        outer = self.parts["nested_absmax"].to(torch.float32)
        outer = outer[torch.arange(first, last) // self.nested]
        return table[absmax[first:last].long()] * outer + self.nested_offset

    def decode(self, start: int, stop: int) -> Tensor:
        if self.columns % self.blocksize:
            return self.grid(start, stop).values(self.codes(start, stop))
        count = (stop - start) * self.columns
        first = start * self.columns // self.blocksize
        scales = self.scales(first, first + count // self.blocksize)
        table = self.parts["quant_map"].to(torch.float32)
        flat = bnb4.decode(self._bytes(start, stop), scales, table, self.blocksize, count)
        return flat.view(stop - start, self.columns)

    def codes(self, start: int, stop: int) -> Tensor:
        count = (stop - start) * self.columns
        found = bnb4.unpack(self._bytes(start, stop))[:count]
        return self._order().argsort()[found.long()].to(torch.uint8).view(-1, self.columns)

    def grid(self, start: int, stop: int) -> Grid:
        levels = self.parts["quant_map"].to(torch.float32)[self._order()]
        first, last = start * self.columns, stop * self.columns
        if self.columns % self.blocksize == 0:
            scales = self.scales(first // self.blocksize, last // self.blocksize)
            group = torch.arange(self.columns) // self.blocksize
            return Grid(levels, scales.view(stop - start, -1), group, uniform=False)
        # Blocks run over the ends of rows: every column of a row may have a scale of its own.
        block = torch.arange(first, last) // self.blocksize
        low = first // self.blocksize
        scales = self.scales(low, int(block[-1]) + 1)[block - low].view(-1, self.columns)
        return Grid(levels, scales, torch.arange(self.columns), uniform=False)

    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        stored = self._order()[codes.long()].to(torch.uint8).flatten()
        if len(stored) % 2:
            stored = torch.cat([stored, stored.new_zeros(1)])
        values = bnb4.pack(stored).view(self.parts["weight"].dtype)
        yield Patch("weight", start * self.columns // 2 // values.element_size(), values)

    def _order(self) -> Tensor:
        """Return the stored codes in the order of their levels."""
        return self.parts["quant_map"].to(torch.float32).argsort(stable=True)

    def _bytes(self, start: int, stop: int) -> Tensor:
        flat = self.parts["weight"].reshape(-1).view(torch.uint8)
        return flat[start * self.columns // 2 : -(-stop * self.columns // 2)].contiguous()


def quantise_bnb4(
    values: Tensor, kind: str, blocksize: int = 64, *, nested: bool = False
) -> BnB4Weight:
    """Return (out, in) float32 in NF4 or FP4, bit-identical to bitsandbytes.

    Args:
        values: (out, in) float32.
        kind: ``nf4`` or ``fp4``.
        blocksize: elements per scale.
        nested: whether to store the scales in 8 bits (double quantisation).
    """
    packed, scales = bnb4.encode(values.flatten(), kind, blocksize)
    parts = {"weight": packed.unsqueeze(1), "absmax": scales, "quant_map": bnb4.levels(kind)}
    plain = BnB4Weight(tuple(values.shape), parts, blocksize)
    if not nested:
        return plain
    inner = bnb4.encode_scales(scales)
    more = {
        "absmax": inner.codes,
        "nested_absmax": inner.absmax,
        "nested_quant_map": inner.table,
    }
    return replace(
        plain, parts={**parts, **more}, nested=inner.blocksize, nested_offset=inner.offset
    )
