"""The dtype words of safetensors files: width in bits, and the torch dtype of each."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from loratools.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

DTYPES: Mapping[str, int] = MappingProxyType(
    {
        "BOOL": 8,
        "F4": 4,
        "F6_E2M3": 6,
        "F6_E3M2": 6,
        "U8": 8,
        "I8": 8,
        "F8_E5M2": 8,
        "F8_E4M3": 8,
        "F8_E8M0": 8,
        "F8_E4M3FNUZ": 8,
        "F8_E5M2FNUZ": 8,
        "I16": 16,
        "U16": 16,
        "F16": 16,
        "BF16": 16,
        "I32": 32,
        "U32": 32,
        "F32": 32,
        "C64": 64,
        "F64": 64,
        "I64": 64,
        "U64": 64,
    }
)
"""Bits per element, in the order by which safetensors 0.8 sorts tensors in a file (last first)."""

FLOAT_WORDS = frozenset({"F64", "F32", "F16", "BF16"})
"""The words of plain floating-point numbers, which a delta can be added to."""

PACKED: Mapping[str, int] = MappingProxyType({"F4": 2})
"""Elements in one torch element: the file counts numbers, torch counts pairs of them."""

_TORCH_NAMES = MappingProxyType(
    {
        "BOOL": "bool",
        "F4": "float4_e2m1fn_x2",
        "U8": "uint8",
        "I8": "int8",
        "F8_E5M2": "float8_e5m2",
        "F8_E4M3": "float8_e4m3fn",
        "F8_E8M0": "float8_e8m0fnu",
        "F8_E4M3FNUZ": "float8_e4m3fnuz",
        "F8_E5M2FNUZ": "float8_e5m2fnuz",
        "I16": "int16",
        "U16": "uint16",
        "F16": "float16",
        "BF16": "bfloat16",
        "I32": "int32",
        "U32": "uint32",
        "F32": "float32",
        "C64": "complex64",
        "F64": "float64",
        "I64": "int64",
        "U64": "uint64",
    }
)
FLOAT_NAMES: Mapping[str, str] = MappingProxyType(
    {word: _TORCH_NAMES[word] for word in ("F32", "BF16", "F16", "F64")}
)
"""Words of plain floats → their names in torch and in ``config.json``."""

_WORDS = MappingProxyType({name: word for word, name in _TORCH_NAMES.items()})


def torch_dtype(word: str) -> torch.dtype:
    """Return the torch dtype of a safetensors dtype word.

    Raises:
        UnsupportedError: the installed torch has no such dtype (``F6_*`` never has one).
    """
    import torch

    dtype = getattr(torch, _TORCH_NAMES.get(word, ""), None)
    if not isinstance(dtype, torch.dtype):
        raise UnsupportedError(f"torch {torch.__version__} has no dtype for {word!r} tensors")
    return dtype


def dtype_word(dtype: torch.dtype) -> str:
    """Return the safetensors dtype word of a torch dtype.

    Raises:
        UnsupportedError: safetensors files cannot hold the dtype.
    """
    word = _WORDS.get(str(dtype).removeprefix("torch."))
    if word is None:
        raise UnsupportedError(
            f"safetensors files cannot hold {dtype} tensors",
            hint="Convert the tensor to a dtype such as float32 first.",
        )
    return word
