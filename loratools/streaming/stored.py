"""How the rows of a tensor are stored: as plain numbers, or as blocks of a quantised type."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.basetensors import BaseTensor
from loratools.codecs.block import BlockCodec
from loratools.errors import UnsupportedError
from loratools.tensorfiles.dtypes import DTYPES, torch_dtype
from loratools.tensorfiles.gguf_types import storage_type


@dataclass(frozen=True, slots=True)
class Storage:
    """One way to store rows.

    Attributes:
        word: safetensors' dtype word or ggml's type name.
        dtype: of what is read and written: the numbers', or uint8 for blocks.
        codec: between blocks and float32, or None for plain numbers.
    """

    word: str
    dtype: torch.dtype
    codec: BlockCodec | None = None

    @property
    def elements(self) -> int:
        """How many numbers are coded together."""
        return 1 if self.codec is None else self.codec.elements

    def items(self, count: int) -> int:
        """Return how many items of ``dtype`` so many numbers take, which are whole blocks."""
        return count if self.codec is None else count // self.codec.elements * self.codec.bytes

    def decode(self, raw: Tensor) -> Tensor:
        """Return rows as numbers: those of plain types as they are, others in float32."""
        return raw if self.codec is None else self.codec.decode(raw)

    def encode(self, values: Tensor) -> Tensor:
        """Return float32 rows as they are stored in blocks; plain types are the caller's matter."""
        assert self.codec is not None
        return self.codec.encode(values)


def source_storage(tensor: BaseTensor) -> Storage:
    """Return how a base's tensor is read: a packed weight arrives as float32."""
    if tensor.packed is not None:
        return Storage(tensor.packed.scheme, torch.float32)
    return storage_of(tensor.dtype)


def target_storage(word: str, *, packed: bool) -> Storage:
    """Return how an output is written: a scheme of several tensors is coded from float32."""
    if packed:
        return Storage(word, torch.float32)
    return storage_of(word)


def storage_of(word: str) -> Storage:
    """Return how a dtype word or ggml type stores rows."""
    if word in DTYPES:
        return Storage(word, torch_dtype(word))
    return Storage(word, torch.uint8, block_codec(word))


def block_codec(word: str) -> BlockCodec:
    """Return the codec of a ggml type of blocks; raises UnsupportedError for a type without."""
    from loratools.codecs.ggml import GGML_TYPES

    if word not in GGML_TYPES:
        raise UnsupportedError(
            f"{word} tensors can neither be read nor written",
            hint=f"types that can: {', '.join(GGML_TYPES)}",
        )
    return GGML_TYPES[word].codec


def block_elements(word: str) -> int:
    """Return how many numbers are coded together; raises KeyError for an unknown word."""
    return 1 if word in DTYPES else storage_type(word).elements


def stored_bytes(word: str, shape: Sequence[int]) -> int:
    """Return the size of a tensor in a file; raises KeyError for an unknown word."""
    count = math.prod(shape)
    if word in DTYPES:
        return count * DTYPES[word] // 8
    kind = storage_type(word)
    return count // kind.elements * kind.size
