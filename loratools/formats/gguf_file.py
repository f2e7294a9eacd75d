"""GGUF adapter files as bundles: tensors decoded on the way in, encoded on the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from loratools.errors import OptionError, UnknownFormatError, UnsupportedError
from loratools.formats.format import Bundle
from loratools.tensorfiles.gguf import GGUFTensor, read_gguf_header
from loratools.tensorfiles.gguf_tensors import block_entry, map_tensors, plain_entry
from loratools.tensorfiles.gguf_types import MAGIC, TORCH_DTYPES
from loratools.tensorfiles.gguf_words import metadata_from_words, words_from_metadata
from loratools.tensorfiles.gguf_writing import Entry, save_gguf
from loratools.tensorfiles.inputs import open_input, quoted

if TYPE_CHECKING:
    from loratools.codecs.block import BlockCodec


_VERSION = {"general.quantization_version": "2"}


def _codec(kind: str) -> BlockCodec | None:
    """Return the codec of a block type; the table is imported on use, as few files need it."""
    from loratools.codecs.ggml import GGML_TYPES

    row = GGML_TYPES.get(kind)
    return row.codec if row else None


def _q8_0() -> BlockCodec:
    codec = _codec("Q8_0")
    assert codec is not None
    return codec


def is_gguf(path: Path) -> bool:
    """Return whether a file is a GGUF file by its name or its first bytes."""
    if path.suffix == ".gguf":
        return True
    with open_input(path) as file:
        return file.read(len(MAGIC)) == MAGIC


def load_gguf(path: Path, source: str) -> Bundle:
    """Read a GGUF adapter.

    Raises:
        CorruptFileError, UnsupportedError: see ``read_gguf_header``.
        UnknownFormatError: a GGUF file of something else.
    """
    header = read_gguf_header(path)
    said = header.word("general.type")
    if said != "adapter":
        raise UnknownFormatError(
            f"{source}: a GGUF file of {'a model' if said in (None, 'model') else quoted(said)}, "
            "not of an adapter",
            hint="an adapter says so in its general.type; a model is a base, which comes first",
        )
    words = words_from_metadata(header.metadata)
    raw = map_tensors(header)
    tensors = {name: _decoded(header.tensors[name], tensor) for name, tensor in raw.items()}
    return Bundle(tensors, words, {}, source)


def _decoded(tensor: GGUFTensor, raw: Tensor) -> Tensor:
    kind = tensor.type.name
    if kind in TORCH_DTYPES:
        return raw
    codec = _codec(kind)
    if codec is None:
        raise UnsupportedError(
            f"{tensor.file}: {tensor.name} is stored as {kind}",
            hint="convert the adapter again as f32, f16, bf16 or q8_0",
        )
    return codec.decode(raw)


def save_bundle(path: Path, bundle: Bundle, storage: str | None = None) -> None:
    """Write a bundle as a GGUF file.

    Args:
        path: the file.
        bundle: tensors of plain numbers, and words that become metadata.
        storage: ``q8_0`` for every tensor whose rows are whole blocks of it, and half precision
            for the others, as llama.cpp's converter does; ``None``: each in its own dtype.

    Raises:
        OutputError: what the format cannot hold, or the system refuses to write.
        OptionError: an unknown storage.
    """
    if storage not in (None, "q8_0"):
        raise OptionError(f"unknown storage {storage!r}", hint="use q8_0")
    metadata = metadata_from_words(bundle.metadata)
    if storage:
        metadata |= metadata_from_words(_VERSION)
    entries = [
        _small(name, tensor) if storage else plain_entry(name, tensor)
        for name, tensor in bundle.tensors.items()
    ]
    save_gguf(path, metadata, entries)


def rounded_to(bundle: Bundle, storage: str | None) -> Bundle:
    """Return the values that a file written with ``storage`` would give back (``save_bundle``)."""
    if storage is None:
        return bundle
    tensors = {name: _rounded(tensor) for name, tensor in bundle.tensors.items()}
    return replace(bundle, tensors=tensors, metadata={**bundle.metadata, **_VERSION})


def _rounded(tensor: Tensor) -> Tensor:
    codec = _q8_0()
    if tensor.shape[-1] % codec.elements:
        return tensor.to(torch.float16)
    return codec.decode(codec.encode(tensor.to(torch.float32).contiguous()))


def _small(name: str, tensor: Tensor) -> tuple[Entry, memoryview]:
    codec = _q8_0()
    if tensor.shape[-1] % codec.elements:
        return plain_entry(name, tensor.to(torch.float16))
    raw = codec.encode(tensor.to(torch.float32).contiguous())
    return block_entry(name, codec.name, tuple(tensor.shape), raw)
