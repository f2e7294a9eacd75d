"""Writing GGUF version 3: metadata, tensor entries and data, each at its aligned place."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import OutputError
from loratools.tensorfiles.gguf_reading import ArrayValue, Scalar, Value
from loratools.tensorfiles.gguf_types import (
    ALIGNMENT_KEY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMENSIONS,
    MAX_NAME_BYTES,
    SCALARS,
    ValueType,
    storage_type,
)
from loratools.tensorfiles.inputs import quoted


@dataclass(frozen=True, slots=True)
class Entry:
    """A tensor to be written: ``shape`` as numpy counts, ``type`` a storage type's name."""

    name: str
    type: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Size of the data in bytes, without padding."""
        kind, elements = storage_type(self.type), 1
        for extent in self.shape:
            elements *= extent
        return elements // kind.elements * kind.size


def encode_gguf_header(metadata: Mapping[str, Value], entries: Sequence[Entry]) -> bytes:
    """Return the first bytes of a GGUF file, up to where the data begins.

    Args:
        metadata: key → value, written in this order; ``general.alignment`` holds for the file.
        entries: the tensors in the order of their data, which follow one another, each padded.

    Raises:
        OutputError: a name, shape, type or value that the format cannot hold.
    """
    alignment = alignment_of(metadata)
    body = [MAGIC, struct.pack("<IQQ", 3, len(entries), len(metadata))]
    body += [_text(key) + _value(key, value) for key, value in metadata.items()]
    offset, names = 0, set[str]()
    for entry in entries:
        _check_entry(entry, names)
        names.add(entry.name)
        extents = struct.pack(f"<{len(entry.shape)}Q", *reversed(entry.shape))
        number = storage_type(entry.type).number
        body += [_text(entry.name), struct.pack("<I", len(entry.shape)), extents]
        body.append(struct.pack("<IQ", number, offset))
        offset += entry.nbytes + padding(entry.nbytes, alignment)
    raw = b"".join(body)
    return raw + bytes(padding(len(raw), alignment))


def save_gguf(
    path: Path, metadata: Mapping[str, Value], tensors: Iterable[tuple[Entry, memoryview]]
) -> None:
    """Write a GGUF file; an existing one is overwritten: see ``atomic.staged_output``.

    Args:
        path: the file.
        metadata: key → value.
        tensors: what each tensor is and its bytes, in blocks of its type.

    Raises:
        OutputError: what the format cannot hold, or the system refuses to write.
    """
    found = list(tensors)
    header = encode_gguf_header(metadata, [entry for entry, _ in found])
    alignment = alignment_of(metadata)
    try:
        with path.open("wb") as file:
            file.write(header)
            for entry, data in found:
                if data.nbytes != entry.nbytes:
                    raise OutputError(
                        f"tensor {quoted(entry.name)}: {data.nbytes} bytes for {entry.nbytes}"
                    )
                file.write(data)
                file.write(bytes(padding(entry.nbytes, alignment)))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def alignment_of(metadata: Mapping[str, Value]) -> int:
    """Return what offsets are multiples of; raises OutputError if it is no power of two."""
    value = metadata.get(ALIGNMENT_KEY)
    if value is None:
        return DEFAULT_ALIGNMENT
    number = value.data
    if not isinstance(number, int) or number < 1 or number & (number - 1):
        raise OutputError(f"{ALIGNMENT_KEY} {quoted(number)} is not a power of two")
    return number


def padding(number: int, alignment: int) -> int:
    """Return how many bytes are missing to a multiple of ``alignment``."""
    return -number % alignment


def _check_entry(entry: Entry, names: set[str]) -> None:
    what = f"tensor {quoted(entry.name)}"
    if entry.name in names:
        raise OutputError(f"{what}: the name is taken")
    if len(entry.name.encode()) > MAX_NAME_BYTES:
        raise OutputError(f"{what}: llama.cpp reads names of up to {MAX_NAME_BYTES} bytes")
    if not 1 <= len(entry.shape) <= MAX_DIMENSIONS:
        raise OutputError(f"{what}: {len(entry.shape)} dimensions; GGUF holds 1 to 4")
    if entry.shape[-1] % storage_type(entry.type).elements:
        raise OutputError(f"{what}: rows of {entry.shape[-1]} are no whole blocks of {entry.type}")


def _text(text: str) -> bytes:
    try:
        raw = text.encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"{quoted(text)} is not Unicode text") from error
    return struct.pack("<Q", len(raw)) + raw


def _value(key: str, value: Value) -> bytes:
    head = struct.pack("<I", value.type)
    if value.type != ValueType.ARRAY:
        assert not isinstance(value.data, (ArrayValue, tuple))
        return head + _scalar(key, value.type, value.data)
    assert value.item is not None
    assert isinstance(value.data, (ArrayValue, tuple))
    head += struct.pack("<IQ", value.item, len(value.data))
    if isinstance(value.data, ArrayValue):
        return head + value.data.raw()
    return head + b"".join(_scalar(key, value.item, item) for item in value.data)


def _scalar(key: str, kind: ValueType, value: Scalar) -> bytes:
    if kind == ValueType.STRING:
        return _text(str(value))
    try:
        return SCALARS[kind].pack(value)
    except (struct.error, OverflowError) as error:
        raise OutputError(f"metadata {quoted(key)}: {quoted(value)} is no {kind.name}") from error
