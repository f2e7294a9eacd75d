"""GGUF tensors as torch tensors: mapped on the way in, flat bytes on the way out."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from loratools.errors import OutputError
from loratools.tensorfiles.gguf import GGUFHeader, GGUFTensor
from loratools.tensorfiles.gguf_types import TORCH_DTYPES
from loratools.tensorfiles.gguf_writing import Entry
from loratools.tensorfiles.inputs import quoted

_WORDS: Mapping[torch.dtype, str] = {
    getattr(torch, name): word for word, name in TORCH_DTYPES.items()
}


def map_tensors(header: GGUFHeader) -> dict[str, torch.Tensor]:
    """Return the tensors of a GGUF file as private views of it.

    Plain numbers come in their own dtype and shape. Types in blocks come as bytes: uint8, with
    the bytes of a row in place of its length.
    """
    if not header.tensors:
        return {}
    mapped = torch.from_file(str(header.path), shared=False, size=header.size, dtype=torch.uint8)
    memory = mapped.untyped_storage()
    return {name: _view(memory, tensor) for name, tensor in header.tensors.items()}


def _view(memory: torch.UntypedStorage, tensor: GGUFTensor) -> torch.Tensor:
    word = TORCH_DTYPES.get(tensor.type.name)
    dtype = getattr(torch, word) if word else torch.uint8
    shape = tensor.shape if word else (*tensor.shape[:-1], tensor.row_bytes)
    if not tensor.nbytes:
        return torch.empty(shape, dtype=dtype)
    storage = memory[tensor.start : tensor.stop]
    if tensor.start % dtype.itemsize:
        storage = storage.clone()
    return torch.empty(0, dtype=dtype).set_(storage).view(shape)


def plain_entry(name: str, tensor: torch.Tensor) -> tuple[Entry, memoryview]:
    """Return what a tensor of plain numbers is in a file, and its bytes.

    Raises OutputError for a dtype that GGUF does not have.
    """
    word = _WORDS.get(tensor.dtype)
    if word is None:
        raise OutputError(
            f"tensor {quoted(name)}: GGUF cannot hold {tensor.dtype}",
            hint="use --dtype fp32, fp16 or bf16",
        )
    return Entry(name, word, tuple(tensor.shape)), _flat_bytes(tensor)


def block_entry(
    name: str, kind: str, shape: tuple[int, ...], raw: torch.Tensor
) -> tuple[Entry, memoryview]:
    """Return what a tensor in blocks is in a file, and its bytes (uint8, any shape)."""
    return Entry(name, kind, shape), _flat_bytes(raw)


def _flat_bytes(tensor: torch.Tensor) -> memoryview:
    dense = tensor.detach().cpu().contiguous()
    flat = dense.as_strided((dense.numel(),), (1,))
    return flat.view(torch.uint8).numpy().data
