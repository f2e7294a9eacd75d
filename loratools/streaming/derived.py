"""Tensors whose values are computed from other tensors' when they are read, some rows at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from loratools.basetensors import BaseTensor, elements, find_weights
from loratools.streaming.blocks import Buffers
from loratools.streaming.gathering import read_rows
from loratools.streaming.packed_source import PackedSource
from loratools.streaming.packing import PackingBlocks, part_works
from loratools.streaming.works import TensorWork
from loratools.tensorfiles.dtypes import torch_dtype

Rows = Callable[[int, int], Tensor]
Value = TypeVar("Value")


def rounded(tensor: BaseTensor, *words: str) -> BaseTensor:
    """Return a tensor in another float type, rounded to each of ``words`` in turn.

    Args:
        tensor: plain floats, a packed weight, or values that are put together.
        words: safetensors' words of float types, the last of which is the result's.
    """
    read = _reader(tensor)

    def rows(start: int, stop: int) -> Tensor:
        values = read(start, stop)
        for word in words:
            values = values.to(torch_dtype(word))
        return values

    return _derived(tensor, words[-1], tensor.shape, rows)


def turned(tensor: BaseTensor) -> BaseTensor:
    """Return a matrix of plain floats with its axes exchanged, held whole while it is read."""
    count, columns = tensor.shape
    read = _reader(tensor)
    held = _Held(lambda: read(0, count).T.to(torch_dtype(tensor.dtype)).contiguous())

    def rows(start: int, stop: int) -> Tensor:
        return held.get(last=stop >= columns)[start:stop]

    return _derived(tensor, tensor.dtype, (columns, count), rows)


def round_trip(tensor: BaseTensor, work: TensorWork, config: Mapping[str, Any]) -> BaseTensor:
    """Return what a weight is after it has been packed and read again, in float32.

    The packed form, of few bits, is held in memory while the weight is read.

    Args:
        tensor: the weight.
        work: packs it.
        config: ``config.json`` as it is when the weight is packed.
    """
    count, columns = _matrix(tensor)
    held = _Held(lambda: PackedSource(_packed(work, config)))

    def rows(start: int, stop: int) -> Tensor:
        source = held.get(last=stop >= count)
        return source.read(start * columns, stop * columns).view(stop - start, columns)

    return _derived(tensor, "F32", tensor.shape, rows)


class _Held(Generic[Value]):
    """Something large that is made when it is first wanted, and dropped after the last use."""

    def __init__(self, make: Callable[[], Value]) -> None:
        self._make = make
        self._value: Value | None = None

    def get(self, *, last: bool) -> Value:
        value = self._make() if self._value is None else self._value
        self._value = None if last else value
        return value


def _derived(tensor: BaseTensor, dtype: str, shape: tuple[int, ...], rows: Rows) -> BaseTensor:
    return BaseTensor(tensor.name, dtype, shape, tensor.file, rows=rows)


def _matrix(tensor: BaseTensor) -> tuple[int, int]:
    """Return the rows and columns by which values are read: a vector's numbers are rows."""
    columns = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    return elements(tensor.shape) // max(columns, 1), columns


def _reader(tensor: BaseTensor) -> Rows:
    """Return what reads rows of any tensor, packed ones in float32."""
    count, columns = _matrix(tensor)
    if tensor.rows is not None:
        return tensor.rows
    if tensor.packed is None:
        flat = replace(tensor, shape=(count, columns))
        return lambda start, stop: read_rows(flat, torch.arange(start, stop))
    held = _Held(lambda: PackedSource(tensor))

    def rows(start: int, stop: int) -> Tensor:
        source = held.get(last=stop >= count)
        return source.read(start * columns, stop * columns).view(stop - start, columns)

    return rows


def _packed(work: TensorWork, config: Mapping[str, Any]) -> BaseTensor:
    """Return a weight packed in memory."""
    parts = part_works(work)
    held = {part.role: torch.empty(part.nbytes, dtype=torch.uint8) for part in parts}
    blocks = PackingBlocks(work, [], Buffers(), "cpu")
    with blocks:
        for patch in blocks.patches():
            raw = patch.values.contiguous().reshape(-1).view(torch.uint8)
            at = patch.start * patch.values.element_size()
            held[patch.part][at : at + len(raw)] = raw
    stored = [
        replace(part.source, values=held[part.role].view(torch_dtype(part.dtype)).view(part.shape))
        for part in parts
    ]
    (whole,) = find_weights(stored, config)
    return whole
