"""The words of a GGUF file: value types of its metadata, storage types of its tensors.

Names, numbers and block sizes are those of the gguf package.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from types import MappingProxyType

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
ALIGNMENT_KEY = "general.alignment"
MAX_DIMENSIONS = 4
MAX_NAME_BYTES = 63
"""The longest tensor name that ggml reads (GGML_MAX_NAME, a final zero included, is 64)."""


class ValueType(IntEnum):
    """Type of a metadata value; the number is what the file holds."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


SCALARS: Mapping[ValueType, struct.Struct] = MappingProxyType(
    {
        ValueType.UINT8: struct.Struct("<B"),
        ValueType.INT8: struct.Struct("<b"),
        ValueType.UINT16: struct.Struct("<H"),
        ValueType.INT16: struct.Struct("<h"),
        ValueType.UINT32: struct.Struct("<I"),
        ValueType.INT32: struct.Struct("<i"),
        ValueType.FLOAT32: struct.Struct("<f"),
        ValueType.BOOL: struct.Struct("<?"),
        ValueType.UINT64: struct.Struct("<Q"),
        ValueType.INT64: struct.Struct("<q"),
        ValueType.FLOAT64: struct.Struct("<d"),
    }
)
"""How each value of fixed size lies in a file."""

TORCH_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "F64": "float64",
        "F32": "float32",
        "F16": "float16",
        "BF16": "bfloat16",
        "I8": "int8",
        "I16": "int16",
        "I32": "int32",
        "I64": "int64",
    }
)
"""Storage types that hold plain numbers, and torch's names of them; all others come in blocks."""


@dataclass(frozen=True, slots=True)
class StorageType:
    """How a tensor's numbers are stored: ``size`` bytes for each block of ``elements``."""

    name: str
    number: int
    elements: int
    size: int


@lru_cache(maxsize=1)
def storage_types() -> Mapping[int, StorageType]:
    """Return the storage types that the gguf package knows, by the number in a file."""
    from gguf.constants import GGML_QUANT_SIZES

    found = (
        StorageType(kind.name, int(kind), elements, size)
        for kind, (elements, size) in GGML_QUANT_SIZES.items()
    )
    return MappingProxyType({kind.number: kind for kind in found})


def storage_type(name: str) -> StorageType:
    """Return the storage type called ``name`` (``Q8_0``); raises KeyError for any other word."""
    return {kind.name: kind for kind in storage_types().values()}[name]
