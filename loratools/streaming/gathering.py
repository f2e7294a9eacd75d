"""Tensors put together from rows of other tensors: in another order, from several, transposed."""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.basetensors import BaseTensor
from loratools.errors import CorruptFileError
from loratools.keymaps.gguf_weights import Gather
from loratools.streaming.stored import source_storage
from loratools.tensorfiles.copying import open_source, read_at

_GAP = 16
"""Rows that are read and thrown away rather than read apart."""


def gathered(
    name: str, gather: Gather, sources: Sequence[BaseTensor], shift: float = 0.0
) -> BaseTensor:
    """Return the tensor that a gathering makes; its values are read when they are needed.

    Args:
        name: of the result.
        gather: which number comes from where.
        sources: the tensors that it counts.
        shift: what is added to every number.
    """
    first = sources[0]
    if gather.is_copy and shift == 0 and gather.shape == first.shape and first.start is not None:
        return BaseTensor(name, first.dtype, first.shape, first.file, first.start)
    reader = _Reader(gather, sources, shift)
    return BaseTensor(name, "F32", gather.shape, first.file, rows=reader.read)


class _Reader:
    """Reads rows of the result in float32; a transposed matrix is held whole while it lasts."""

    def __init__(self, gather: Gather, sources: Sequence[BaseTensor], shift: float) -> None:
        self.gather = gather
        self.sources = sources
        self.shift = shift
        self.matrix: tuple[int, Tensor] | None = None

    def read(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop``, counted through all matrices of a stack."""
        gather = self.gather
        take = self._turned if gather.turned else self._straight
        out = take(start, stop)
        if gather.factor is not None:
            out = out * gather.factor[start:stop, None]
        return out.add_(self.shift) if self.shift else out

    def _straight(self, start: int, stop: int) -> Tensor:
        part, row = self.gather.part[start:stop], self.gather.row[start:stop]
        columns = self.gather.shape[-1] if len(self.gather.shape) > 1 else 1
        out = torch.empty(stop - start, columns)
        for number in part.unique().tolist():
            chosen = part == number
            found = read_rows(self.sources[number], row[chosen])
            out[chosen] = found if self.gather.column is None else found[:, self.gather.column]
        return out

    def _turned(self, start: int, stop: int) -> Tensor:
        each = self.gather.shape[-2]
        done = []
        while start < stop:
            number = start // each
            end = min(stop, (number + 1) * each)
            done.append(self._matrix(number)[self.gather.row[start:end]])
            start = end
        if stop == len(self.gather.row):
            self.matrix = None
        return torch.cat(done)

    def _matrix(self, number: int) -> Tensor:
        """Return a source's matrix transposed, its own columns as rows."""
        if self.matrix is None or self.matrix[0] != number:
            assert self.gather.column is not None
            self.matrix = None
            source = self.sources[int(self.gather.part[number * self.gather.shape[-2]])]
            self.matrix = number, read_rows(source, self.gather.column[number]).T.contiguous()
        return self.matrix[1]


def read_rows(source: BaseTensor, rows: Tensor) -> Tensor:
    """Return the chosen rows of a tensor in float32, (n, columns); a vector's numbers are rows.

    Raises CorruptFileError if the file ends before them.
    """
    columns = source.shape[-1] if len(source.shape) > 1 else 1
    wanted, places = rows.unique(return_inverse=True)
    breaks = (wanted.diff() > _GAP).nonzero().flatten() + 1
    found = []
    for run in wanted.tensor_split(breaks):
        low, high = int(run[0]), int(run[-1]) + 1
        found.append(_decoded(source, low, high, columns)[run - low])
    return torch.cat(found)[places]


def _decoded(source: BaseTensor, low: int, high: int, columns: int) -> Tensor:
    storage = source_storage(source)
    if source.values is not None:
        raw = source.values.reshape(-1, columns)[low:high]
    else:
        assert source.start is not None
        unit = storage.codec.elements if storage.codec else 1
        # A vector in blocks: whole blocks around what is wanted.
        first, last = low * columns // unit, -(-high * columns // unit)
        bytes_each = storage.codec.bytes if storage.codec else storage.dtype.itemsize
        raw = _read(source, source.start + first * bytes_each, (last - first) * bytes_each)
        values = storage.decode(raw.view(storage.dtype)).to(torch.float32)
        skipped = low * columns - first * unit
        return values[skipped : skipped + (high - low) * columns].view(-1, columns)
    return raw.to(torch.float32)


def _read(source: BaseTensor, start: int, count: int) -> Tensor:
    raw = torch.empty(count, dtype=torch.uint8)
    view = memoryview(raw.numpy())  # type: ignore[arg-type]
    file = open_source(source.file)
    try:
        if read_at(file, view, start) < count:
            raise CorruptFileError(
                f"{source.file}: ends inside {source.name}", hint="was it changed meanwhile?"
            )
    finally:
        os.close(file)
    return raw
