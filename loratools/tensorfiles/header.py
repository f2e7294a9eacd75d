"""The header of a safetensors file: read with suspicion, written exactly.

Specification: https://huggingface.co/docs/safetensors/index#format. Whatever ``read_header`` takes,
the safetensors library (0.8) takes too; the reverse does not hold, e.g. for repeated names.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, BinaryIO

from loratools.errors import CorruptFileError, OutputError
from loratools.tensorfiles.dtypes import DTYPES
from loratools.tensorfiles.entries import entry_fault
from loratools.tensorfiles.impostors import FIRST_BYTES, not_what_it_says
from loratools.tensorfiles.inputs import INCOMPLETE_HINT, open_input, parse_object, quoted

MAX_HEADER_BYTES = 100_000_000
"""The longest header that the safetensors library reads or writes."""

_METADATA = "__metadata__"


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor of a file: ``start`` and ``stop`` are byte offsets from the file's beginning."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.stop - self.start

    @property
    def elements(self) -> int:
        """Count of numbers; 1 for the empty shape."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        tensors: name to spec, in the order in which the data lie in the file, without gaps.
        metadata: the file's own words.
        data_start: byte offset of the first tensor.
        size: bytes in the whole file.
    """

    tensors: Mapping[str, TensorSpec]
    metadata: Mapping[str, str]
    data_start: int
    size: int


def read_header(path: Path) -> Header:
    """Read and validate the header of a safetensors file; tensor data is not touched.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: the header contradicts itself, the specification or the file's size.
    """
    with open_input(path) as file:
        size = os.fstat(file.fileno()).st_size
        raw = _raw_header(path, file, size)
    members = parse_object(raw, f"{path}: header", parse_int=_natural)
    metadata = _read_metadata(path, members.pop(_METADATA, {}))
    data_start = 8 + len(raw)
    specs = sorted(
        (_spec(path, name, entry, data_start) for name, entry in members.items()),
        key=lambda spec: (spec.start, spec.stop),
    )
    _check_layout(path, specs, data_start, size)
    tensors = MappingProxyType({spec.name: spec for spec in specs})
    return Header(tensors, MappingProxyType(metadata), data_start, size)


def encode_header(
    entries: Iterable[tuple[str, str, Sequence[int]]], metadata: Mapping[str, str]
) -> bytes:
    """Return the first bytes of a safetensors file, up to where the data begins.

    Args:
        entries: name, dtype word and shape of each tensor, in the order of their data.
        metadata: free text; written first and sorted, so that equal words give equal bytes.

    Returns:
        Eight bytes of length, then JSON padded with spaces to a multiple of eight bytes.

    Raises:
        OutputError: the format cannot hold a name, dtype, shape, text, or so long a header.
    """
    members = _encode_metadata(metadata)
    position = 0
    for name, dtype, shape in entries:
        if name in members or name == _METADATA:
            raise OutputError(f"tensor {quoted(name)}: the name is taken")
        stop = position + math.prod(shape) * DTYPES.get(dtype, 0) // 8
        entry = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, stop]}
        if fault := entry_fault(entry):
            raise OutputError(f"tensor {quoted(name)}: {fault}")
        members[name] = entry
        position = stop
    return _framed(members)


def _encode_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    # The words often come from JSON, where a type annotation holds nobody back.
    words: Mapping[Any, Any] = metadata
    for key, value in words.items():
        if not (isinstance(key, str) and isinstance(value, str)):
            raise OutputError(f"metadata {quoted(key)}: {quoted(value)} is not text")
    return {_METADATA: dict(sorted(metadata.items()))} if metadata else {}


def _framed(members: Mapping[str, Any]) -> bytes:
    try:
        raw = json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise OutputError(f"a tensor name or metadata is not Unicode text: {error}") from error
    raw += b" " * (-len(raw) % 8)
    if len(raw) > MAX_HEADER_BYTES:
        raise OutputError(f"the header would take {len(raw)} bytes; {MAX_HEADER_BYTES} is the most")
    return struct.pack("<Q", len(raw)) + raw


def _raw_header(path: Path, file: BinaryIO, size: int) -> bytes:
    prefix = file.read(8)
    if len(prefix) < 8:
        raise CorruptFileError(
            f"{path}: {len(prefix)} bytes are too few for a safetensors file", INCOMPLETE_HINT
        )
    length: int = struct.unpack("<Q", prefix)[0]
    if not 2 <= length <= MAX_HEADER_BYTES:
        raise not_what_it_says(
            path,
            "a safetensors file",
            prefix + file.read(FIRST_BYTES - len(prefix)),
            f"header length {length} is outside 2 to {MAX_HEADER_BYTES} bytes",
        )
    raw = file.read(length)
    if len(raw) < length:
        raise _truncated(path, 8 + length - size, "in the header")
    if not raw.startswith(b"{"):
        raise CorruptFileError(f"{path}: header begins with {quoted(raw[:1])}, not with '{{'")
    return raw


def _natural(digits: str) -> int | float:
    # Numbers that the format does not allow become floats, which `entry_fault` refuses.
    return int(digits) if digits.isdigit() and len(digits) <= 20 else float(digits)


def _read_metadata(path: Path, value: Any) -> dict[str, str]:
    if value is None:
        # MLX writes null where there is nothing to say, and Rust's reader takes it.
        return {}
    if not isinstance(value, dict):
        raise CorruptFileError(f"{path}: {_METADATA} is not an object of text: {quoted(value)}")
    for key, word in value.items():
        if not isinstance(word, str):
            raise CorruptFileError(
                f"{path}: {_METADATA} entry {quoted(key)} is not text: {quoted(word)}"
            )
    return value


def _spec(path: Path, name: str, entry: Any, data_start: int) -> TensorSpec:
    if fault := entry_fault(entry):
        raise CorruptFileError(f"{path}: tensor {quoted(name)}: {fault}")
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    return TensorSpec(name, entry["dtype"], shape, data_start + begin, data_start + end)


def _check_layout(path: Path, specs: Sequence[TensorSpec], data_start: int, size: int) -> None:
    """Refuse overlaps, holes, missing bytes and trailing bytes: hidden data hides in those."""
    position = data_start
    for spec in specs:
        gap = spec.start - position
        if gap:
            fault = f"follows a hole of {gap} bytes" if gap > 0 else "overlaps another tensor"
            raise CorruptFileError(f"{path}: tensor {quoted(spec.name)}: {fault}")
        position = spec.stop
    if position > size:
        first = next(spec for spec in specs if spec.stop > size)
        raise _truncated(path, position - size, f"tensor {quoted(first.name)} is the first cut off")
    if position < size:
        raise CorruptFileError(f"{path}: {size - position} bytes trail after the last tensor")


def _truncated(path: Path, missing: int, where: str) -> CorruptFileError:
    return CorruptFileError(
        f"{path}: truncated, {missing} bytes are missing ({where})", INCOMPLETE_HINT
    )
