"""Where everything goes in an output file: its first bytes, and the place of every tensor."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from types import MappingProxyType

from loratools.basemodel import ORIGINAL_SHAPE, Shard
from loratools.errors import CorruptFileError
from loratools.streaming.works import TensorWork
from loratools.tensorfiles.copying import open_source
from loratools.tensorfiles.gguf import GGUFHeader
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_writing import Entry, encode_gguf_header, padding
from loratools.tensorfiles.header import encode_header

CHANGED = "was it changed meanwhile?"


@dataclass(frozen=True, slots=True)
class FileWork:
    """One output weights file.

    Attributes:
        name: of the file.
        tensors: in the order of their data.
        original: the shard that it takes the place of, of the same container.
        words: metadata to set in a GGUF file, beside the original's own; ``None``: to leave out.
    """

    name: str
    tensors: tuple[TensorWork, ...]
    original: Shard
    words: Mapping[str, Value | None] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Layout:
    """The places of a file's parts.

    Attributes:
        header: the first bytes.
        offsets: of every tensor, from the file's beginning.
        size: of the whole file.
    """

    header: bytes
    offsets: tuple[int, ...]
    size: int


def layout_of(file: FileWork) -> Layout:
    """Return the layout of a file: the original's own header where nothing in it changes."""
    original = file.original.header
    if isinstance(original, GGUFHeader):
        return _gguf(file, original)
    header = _own_header(file) if original and _is_unchanged(file) else None
    if header is None:
        entries = [(work.name, work.dtype, work.shape) for work in file.tensors]
        header = encode_header(entries, file.original.metadata)
    return _placed(header, file.tensors, 1)


def _gguf(file: FileWork, original: GGUFHeader) -> Layout:
    if _is_unchanged(file) and not file.words:
        header = _own_header(file)
    else:
        entries = [Entry(work.name, work.dtype, _folded(work, original)) for work in file.tensors]
        words = {**original.metadata, **file.words}
        kept = {key: value for key, value in words.items() if value is not None}
        header = encode_gguf_header(kept, entries)
    return _placed(header, file.tensors, original.alignment)


def _folded(work: TensorWork, original: GGUFHeader) -> tuple[int, ...]:
    """Return the shape that a tensor has in the file, where that is not the model's own."""
    held = original.tensors.get(work.name)
    said = f"{ORIGINAL_SHAPE}{work.name}" in original.metadata
    return held.shape if held is not None and said else work.shape


def _placed(header: bytes, tensors: Sequence[TensorWork], alignment: int) -> Layout:
    sizes = (work.nbytes + padding(work.nbytes, alignment) for work in tensors)
    *offsets, size = accumulate(sizes, initial=len(header))
    return Layout(header, tuple(offsets), size)


def _is_unchanged(file: FileWork) -> bool:
    ours = [(work.name, work.dtype, work.shape) for work in file.tensors]
    return ours == [(t.name, t.dtype, t.shape) for t in file.original.tensors]


def _own_header(file: FileWork) -> bytes:
    """Return the original's first bytes as they stand."""
    shard = file.original
    assert shard.header is not None
    with os.fdopen(open_source(shard.path), "rb") as source:
        found = source.read(shard.header.data_start)
    if len(found) < shard.header.data_start:
        raise CorruptFileError(f"{shard.path}: ends inside its header", hint=CHANGED)
    return found
