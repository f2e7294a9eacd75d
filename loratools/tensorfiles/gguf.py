"""The header of a GGUF file: metadata and tensors, read with suspicion.

Specification: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. What ggml refuses is
refused here too: tensors out of order or off their places, repeated names, unknown types. Reading
costs no memory beyond the header, and arrays (a vocabulary) stay in the file until asked for.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from loratools.errors import CorruptFileError, UnsupportedError
from loratools.tensorfiles.gguf_reading import Cursor, Value
from loratools.tensorfiles.gguf_types import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    VERSIONS,
    StorageType,
    ValueType,
    storage_types,
)
from loratools.tensorfiles.impostors import FIRST_BYTES, not_what_it_says
from loratools.tensorfiles.inputs import INCOMPLETE_HINT, open_input, quoted

_LEAST_KEY = 13  # length, one letter at most missing, type, one byte
_LEAST_TENSOR = 32  # length, dimensions, one extent, type, offset
_MAX_ELEMENTS = 2**63 - 1


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a file.

    Attributes:
        name: with its suffix (``blk.0.attn_q.weight``).
        type: how its numbers are stored.
        shape: as numpy counts: the row length last.
        start: byte offset from the file's beginning.
        file: which file of a split model holds it.
    """

    name: str
    type: StorageType
    shape: tuple[int, ...]
    start: int
    file: Path

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: the last extent, in whole blocks."""
        length = self.shape[-1] if self.shape else 1
        return length // self.type.elements * self.type.size

    @property
    def rows(self) -> int:
        """Number of rows: the product of the other extents."""
        return math.prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Size in bytes, without padding."""
        return self.rows * self.row_bytes

    @property
    def stop(self) -> int:
        """Byte offset of the tensor's end."""
        return self.start + self.nbytes


@dataclass(frozen=True, slots=True)
class GGUFHeader:
    """What one GGUF file says of itself.

    Attributes:
        path: the file.
        version: 2 or 3.
        metadata: key → value, in file order.
        tensors: name → tensor, in file order, which is that of the data.
        alignment: what offsets are multiples of.
        data_start: byte offset of the first tensor: the length of the header with its padding.
        size: bytes in the whole file.
    """

    path: Path
    version: int
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GGUFTensor]
    alignment: int
    data_start: int
    size: int

    def word(self, key: str) -> object:
        """Return a metadata value as plain Python, or ``None`` where the file has none."""
        value = self.metadata.get(key)
        return None if value is None else value.plain()

    def raw(self) -> bytes:
        """Return the header's bytes as they stand in the file, padding included."""
        with open_input(self.path) as file:
            return file.read(self.data_start)


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and validate the header of one GGUF file; tensor data is not touched.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: the header contradicts itself, the specification or the file's size.
        UnsupportedError: version 1, big-endian, or a tensor type that gguf does not know.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size == 0:
            raise CorruptFileError(f"{path}: an empty file", INCOMPLETE_HINT)
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            return parse_gguf_header(view, path, size)


def parse_gguf_header(view: memoryview, path: Path, size: int) -> GGUFHeader:
    """Validate a header from a file's first bytes, as ``read_gguf_header`` does.

    Args:
        view: as much of the file as is at hand; CorruptFileError where the header ends beyond it.
        path: what the file is called.
        size: bytes in the whole file.
    """
    return _read(Cursor(view, path), size)


def _read(cursor: Cursor, size: int) -> GGUFHeader:
    path, version = cursor.path, _read_version(cursor)
    tensor_count = cursor.u64("the number of tensors")
    key_count = cursor.count("the number of metadata keys", _LEAST_KEY)
    metadata: dict[str, Value] = {}
    for _ in range(key_count):
        key = cursor.text("a metadata key")
        if key in metadata:
            raise CorruptFileError(f"{path}: metadata {quoted(key)} appears twice")
        metadata[key] = cursor.value(key)
    if tensor_count * _LEAST_TENSOR > cursor.left:
        raise CorruptFileError(
            f"{path}: {tensor_count} tensors are more than {cursor.left} bytes can describe",
            INCOMPLETE_HINT,
        )
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    alignment = _alignment(path, metadata)
    data_start = _padded(cursor.place, alignment)
    tensors = _placed(path, entries, data_start, alignment)
    if tensors:
        _check_size(path, list(tensors.values()), size)
    return GGUFHeader(
        path,
        version,
        MappingProxyType(metadata),
        MappingProxyType(tensors),
        alignment,
        data_start,
        size,
    )


def _read_version(cursor: Cursor) -> int:
    start = cursor.take(4, "the magic word")
    magic = bytes(cursor.view[start : start + 4])
    if magic != MAGIC:
        head = bytes(cursor.view[:FIRST_BYTES])
        raise not_what_it_says(cursor.path, "a GGUF file", head, f"it begins with {quoted(magic)}")
    version = cursor.u32("the version")
    if version and version & 0xFFFF == 0:
        raise UnsupportedError(
            f"{cursor.path}: a big-endian GGUF file",
            hint="convert it with gguf-py's gguf_convert_endian.py",
        )
    if version not in VERSIONS:
        raise UnsupportedError(
            f"{cursor.path}: GGUF version {version}; versions 2 and 3 are read",
            hint="make the file again with a current llama.cpp",
        )
    return version


Entry = tuple[str, tuple[int, ...], StorageType, int]


def _read_entry(cursor: Cursor) -> Entry:
    name = cursor.text("a tensor's name")
    what = f"{cursor.path}: tensor {quoted(name)}"
    dimensions = cursor.u32(f"the dimensions of tensor {quoted(name)}")
    if not 1 <= dimensions <= MAX_DIMENSIONS:
        raise CorruptFileError(f"{what} has {dimensions} dimensions; {MAX_DIMENSIONS} are the most")
    extents = [cursor.u64(f"the shape of tensor {quoted(name)}") for _ in range(dimensions)]
    number = cursor.u32(f"the type of tensor {quoted(name)}")
    kind = storage_types().get(number)
    if kind is None:
        raise UnsupportedError(
            f"{what} has the type {number}, which this version of the gguf package does not know",
            hint="types 4, 5, 31-33 and 36-38 are no longer in use; for others, update gguf",
        )
    shape = tuple(reversed(extents))
    _check_shape(what, shape, kind)
    return name, shape, kind, cursor.u64(f"the offset of tensor {quoted(name)}")


def _check_shape(what: str, shape: Sequence[int], kind: StorageType) -> None:
    elements = 1
    for extent in shape:
        elements *= max(extent, 1)
        if elements > _MAX_ELEMENTS:
            raise CorruptFileError(f"{what}: shape {tuple(shape)} overflows")
    if shape[-1] % kind.elements:
        raise CorruptFileError(
            f"{what}: rows of {shape[-1]} are no whole blocks of {kind.name} ({kind.elements})"
        )


def _alignment(path: Path, metadata: Mapping[str, Value]) -> int:
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.data
    if value.type != ValueType.UINT32 or not isinstance(number, int) or number < 1:
        raise CorruptFileError(f"{path}: {ALIGNMENT_KEY} is {quoted(number)}, not a power of two")
    if number & (number - 1):
        raise CorruptFileError(f"{path}: {ALIGNMENT_KEY} {number} is not a power of two")
    return number


def _placed(
    path: Path, entries: Sequence[Entry], data_start: int, alignment: int
) -> dict[str, GGUFTensor]:
    """Return the tensors at their places in the file; each begins where the last one's pad ends."""
    tensors: dict[str, GGUFTensor] = {}
    expected = 0
    for name, shape, kind, offset in entries:
        if name in tensors:
            raise CorruptFileError(f"{path}: tensor {quoted(name)} appears twice")
        if offset != expected:
            raise CorruptFileError(
                f"{path}: tensor {quoted(name)} is said to be at {offset}; the data of those "
                f"before it end at {expected}"
            )
        tensor = GGUFTensor(name, kind, shape, data_start + offset, path)
        expected = _padded(offset + tensor.nbytes, alignment)
        tensors[name] = tensor
    return tensors


def _check_size(path: Path, tensors: Sequence[GGUFTensor], size: int) -> None:
    if tensors[-1].stop > size:
        first = next(tensor for tensor in tensors if tensor.stop > size)
        raise CorruptFileError(
            f"{path}: truncated, {tensors[-1].stop - size} bytes are missing (tensor "
            f"{quoted(first.name)} is the first cut off)",
            INCOMPLETE_HINT,
        )


def _padded(number: int, alignment: int) -> int:
    return -(-number // alignment) * alignment


def read_row_blocks(tensor: GGUFTensor, rows: int) -> Iterator[tuple[int, bytes]]:
    """Yield a tensor's rows as stored, ``rows`` at a time, each block with its first row's number.

    Raises CorruptFileError if the file has shrunk since its header was read.
    """
    with open_input(tensor.file) as file:
        file.seek(tensor.start)
        for first in range(0, tensor.rows, max(rows, 1)):
            count = min(rows, tensor.rows - first) * tensor.row_bytes
            block = file.read(count)
            if len(block) != count:
                raise CorruptFileError(f"{tensor.file}: changed while it was read")
            yield first, block
