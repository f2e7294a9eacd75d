"""The codec of a block format: rows of float32 as rows of bytes, every block on its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.errors import CorruptFileError, InputError, UnsupportedError

CPU_ELEMENTS = 1 << 18
"""Weights handled at a time on a CPU: a MiB of float32. With fewer the time goes into starting
kernels, with more the five arrays of a search no longer fit a shared cache."""
DEVICE_ELEMENTS = 1 << 26
"""The same on an accelerator, where only many weights at a time keep it busy."""


@dataclass(frozen=True, slots=True)
class BlockCodec:
    """One block format.

    A block of ``elements`` weights takes ``bytes`` bytes. Blocks lie along the last axis, none
    crosses a row, and each is coded without regard to the others; so any split of a tensor into
    rows gives the same bytes. Nothing here starts threads: callers code several ranges of rows at a
    time.

    Attributes:
        name: as the format's own tools spell it.
        elements: weights in a block.
        bytes: bytes of a block.
        decode_blocks: (n, bytes) uint8 → (n, elements) float32, exactly as the reference decoder.
        encode_blocks: (n, elements) float32 → (n, bytes) uint8, byte for byte as the reference
            encoder without an importance matrix; ``None`` for a format that can only be read.
        remedy: what to do instead of encoding, for a format that can only be read.
    """

    name: str
    elements: int
    bytes: int
    decode_blocks: Callable[[Tensor], Tensor]
    encode_blocks: Callable[[Tensor], Tensor] | None = None
    remedy: str | None = None

    @property
    def can_encode(self) -> bool:
        """Whether :meth:`encode` works; if not, ``remedy`` says what to choose instead."""
        return self.encode_blocks is not None

    def decode(self, raw: Tensor) -> Tensor:
        """Return the float32 weights, (..., k·elements), of ``raw``, uint8 (..., k·bytes).

        Raises:
            CorruptFileError: the rows of ``raw`` are not whole blocks.
        """
        if raw.dtype != torch.uint8:
            raise TypeError(f"{self.name} is decoded from uint8, not {raw.dtype}")
        if raw.shape[-1] % self.bytes:
            raise CorruptFileError(
                f"{self.name}: a row of {raw.shape[-1]} bytes is not whole {self.bytes}-byte blocks"
            )
        shape = (*raw.shape[:-1], raw.shape[-1] // self.bytes * self.elements)
        values = raw.new_empty(shape, dtype=torch.float32)
        self._convert(raw.reshape(-1, self.bytes), self.decode_blocks, values)
        return values

    def encode(self, values: Tensor) -> Tensor:
        """Return the bytes, uint8 (..., k·bytes), of ``values``, float32 (..., k·elements).

        Raises:
            InputError: the rows of ``values`` are not whole blocks.
            NonFiniteError: a value or a block's scale is NaN or infinite in the format.
            UnsupportedError: the format can only be read.
        """
        if self.encode_blocks is None:
            raise UnsupportedError(f"{self.name} can be read but not written", self.remedy)
        if values.dtype != torch.float32:
            raise TypeError(f"{self.name} is encoded from float32, not {values.dtype}")
        if values.shape[-1] % self.elements:
            raise InputError(
                f"{self.name} takes rows of whole {self.elements}-weight blocks,"
                f" not of {values.shape[-1]} weights",
                "Choose a type with shorter blocks: Q8_0 (32 weights) or F16 (any number).",
            )
        shape = (*values.shape[:-1], values.shape[-1] // self.elements * self.bytes)
        raw = values.new_empty(shape, dtype=torch.uint8)
        self._convert(values.reshape(-1, self.elements), self.encode_blocks, raw)
        return raw

    def _convert(self, blocks: Tensor, convert: Callable[[Tensor], Tensor], out: Tensor) -> None:
        """Fill ``out`` with the converted ``blocks``, some at a time."""
        weights = CPU_ELEMENTS if blocks.device.type == "cpu" else DEVICE_ELEMENTS
        count = max(1, weights // self.elements)
        rows = out.view(blocks.shape[0], -1) if blocks.shape[0] else out.view(0, 1)
        for part, target in zip(blocks.split(count), rows.split(count), strict=True):
            if part.shape[0]:
                target.copy_(convert(part))
