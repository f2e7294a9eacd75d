"""Whole safetensors files as torch tensors, memory-mapped on the way in."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from loratools.errors import OutputError, UnsupportedError
from loratools.tensorfiles.dtypes import DTYPES, PACKED, dtype_word, torch_dtype
from loratools.tensorfiles.header import TensorSpec, encode_header, read_header
from loratools.tensorfiles.inputs import quoted

_RANK = {word: rank for rank, word in enumerate(DTYPES)}


def load_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Map a safetensors file into memory.

    The tensors are private views of the file: pages are read when touched, and writing to a
    tensor changes neither the file nor another tensor. They stay valid when the file is renamed
    or deleted (not on Windows, which keeps a mapped file in place).

    Returns:
        Tensors by name, in the order of their data, each with a storage of its own; the metadata.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: the header cannot be trusted.
        UnsupportedError: a dtype that the installed torch lacks.
    """
    header = read_header(path)
    mapped = torch.from_file(str(path), shared=False, size=header.size, dtype=torch.uint8)
    memory = mapped.untyped_storage()
    tensors = {name: _view(memory, spec) for name, spec in header.tensors.items()}
    return tensors, dict(header.metadata)


def save_tensors(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file, byte for byte the one that the safetensors library writes.

    Equal tensors and metadata give equal bytes, in whatever order they come. Tensors that share
    memory are each written whole. An existing file is overwritten: see ``atomic.staged_output``.

    Raises:
        OutputError: a tensor that the format cannot hold, or the system refuses to write.
    """
    described = {name: _described(name, tensor) for name, tensor in tensors.items()}
    order = sorted(described, key=lambda name: (-_RANK[described[name][0]], name))
    header = encode_header([(name, *described[name]) for name in order], metadata)
    try:
        with path.open("wb") as file:
            file.write(header)
            for name in order:
                file.write(_flat_bytes(tensors[name]))
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def _view(memory: torch.UntypedStorage, spec: TensorSpec) -> torch.Tensor:
    dtype = torch_dtype(spec.dtype)
    shape = _torch_shape(spec)
    if not spec.nbytes:
        return torch.empty(shape, dtype=dtype)
    storage = memory[spec.start : spec.stop]
    if spec.start % dtype.itemsize:
        storage = storage.clone()
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def _torch_shape(spec: TensorSpec) -> tuple[int, ...]:
    packed = PACKED.get(spec.dtype, 1)
    if packed == 1:
        return spec.shape
    *rows, last = spec.shape
    if last % packed:
        raise UnsupportedError(
            f"tensor {quoted(spec.name)}: torch holds {spec.dtype} in rows of an even length only"
        )
    return (*rows, last // packed)


def _described(name: str, tensor: torch.Tensor) -> tuple[str, tuple[int, ...]]:
    """Return the dtype word and the shape that the file states."""
    if tensor.layout != torch.strided or tensor.is_meta or tensor.is_quantized:
        raise OutputError(f"tensor {quoted(name)}: only dense tensors with data can be written")
    try:
        word = dtype_word(tensor.dtype)
    except UnsupportedError as error:
        raise OutputError(f"tensor {quoted(name)}: {error.message}", error.hint) from error
    packed = PACKED.get(word, 1)
    if packed == 1:
        return word, tuple(tensor.shape)
    if not tensor.ndim:
        raise OutputError(f"tensor {quoted(name)}: {word} needs at least one dimension")
    return word, (*tensor.shape[:-1], tensor.shape[-1] * packed)


def _flat_bytes(tensor: torch.Tensor) -> memoryview:
    dense = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    # A lone element counts as contiguous whatever its stride, and keeps it under reshape.
    flat = dense.as_strided((dense.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
