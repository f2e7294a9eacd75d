"""GGUF adapter files as bundles: tensors decoded on the way in, encoded on the way out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from loratools.codecs.ggml import GGML_TYPES
from loratools.errors import OptionError, UnknownFormatError, UnsupportedError
from loratools.formats.format import Bundle
from loratools.tensorfiles.gguf import GGUFTensor, read_gguf_header
from loratools.tensorfiles.gguf_tensors import block_entry, map_tensors, plain_entry
from loratools.tensorfiles.gguf_types import MAGIC, TORCH_DTYPES
from loratools.tensorfiles.gguf_words import metadata_from_words, words_from_metadata
from loratools.tensorfiles.gguf_writing import Entry, save_gguf
from loratools.tensorfiles.inputs import open_input, quoted


_Q8_0 = GGML_TYPES["Q8_0"].codec


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
    if kind not in GGML_TYPES:
        raise UnsupportedError(
            f"{tensor.file}: {tensor.name} is stored as {kind}",
            hint="convert the adapter again as f32, f16, bf16 or q8_0",
        )
    return GGML_TYPES[kind].codec.decode(raw)


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
        metadata |= metadata_from_words({"general.quantization_version": "2"})
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
    return replace(bundle, tensors=tensors)


def _rounded(tensor: Tensor) -> Tensor:
    if tensor.shape[-1] % _Q8_0.elements:
        return tensor.to(torch.float16)
    return _Q8_0.decode(_Q8_0.encode(tensor.to(torch.float32).contiguous()))


def _small(name: str, tensor: Tensor) -> tuple[Entry, memoryview]:
    if tensor.shape[-1] % _Q8_0.elements:
        return plain_entry(name, tensor.to(torch.float16))
    raw = _Q8_0.encode(tensor.to(torch.float32).contiguous())
    return block_entry(name, _Q8_0.name, tuple(tensor.shape), raw)
