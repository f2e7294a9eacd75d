"""In which type a touched tensor is written, and what few bits leave of the change."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from loratools.basemodel import BaseModel, BaseTensor
from loratools.errors import OptionError, UnsupportedError
from loratools.report import Note
from loratools.streaming.checkpoint import DTYPE_WORDS, output_dtype
from loratools.streaming.stored import block_codec
from loratools.streaming.works import TensorResult
from loratools.suggest import did_you_mean
from loratools.tensorfiles.dtypes import DTYPES, FLOAT_WORDS, torch_dtype
from loratools.tensorfiles.gguf import GGUFHeader

KEEP, DEQUANTIZE = "keep", "dequantize"
LEAST = 0.5
"""The share of a change below which losing the rest is warned of."""

_BETTER = (
    "--rounding adapter-aware keeps most of it in the same space, --quant dequantize (for GGUF "
    "also --quant q8_0) in more"
)


def block_types() -> Mapping[str, str]:
    """Return what users may call the types that can be written → ggml's names."""
    from loratools.codecs.ggml import GGML_TYPES

    writable = [name for name, row in GGML_TYPES.items() if row.codec.can_encode]
    return {name.lower(): name for name in writable}


def check_quant(quant: str) -> str:
    """Return the user's word in our spelling; raises OptionError for an unknown one."""
    word = quant.lower()
    known = {KEEP: KEEP, DEQUANTIZE: DEQUANTIZE, "dequantise": DEQUANTIZE, **block_types()}
    if word not in known:
        raise OptionError(f"unknown type {quant!r}", hint=did_you_mean(word, known))
    return known[word]


def row_length(base: BaseModel, tensor: BaseTensor) -> int:
    """Return how long a tensor's rows are in its file, which folds some of image models'."""
    for shard in base.shards:
        if isinstance(shard.header, GGUFHeader) and tensor.name in shard.header.tensors:
            return shard.header.tensors[tensor.name].shape[-1]
    return tensor.shape[-1]


def written_type(name: str, word: str, columns: int, quant: str, dtype: str) -> str:
    """Return the type in which a touched tensor is written.

    Args:
        name: of the tensor, for errors.
        word: the type it is stored in.
        columns: its row length.
        quant: ``keep``, ``dequantize`` or a ggml type for tensors in blocks.
        dtype: ``keep``, ``fp32`` ... for plain floats and for what is dequantised.

    Raises UnsupportedError for a type that cannot be written, or holds no weights.
    """
    if word in DTYPES:
        if word not in FLOAT_WORDS:
            raise UnsupportedError(
                f"{name}: stored as {word} without a scale, which merge cannot fold into",
                hint="merge into the 16-bit original of this base",
            )
        return output_dtype(word, dtype)
    if quant == DEQUANTIZE:
        return "F16" if dtype == "keep" else DTYPE_WORDS[dtype]
    chosen = word if quant == KEEP else quant
    if chosen in DTYPES:
        return chosen
    codec = block_codec(chosen)
    if not codec.can_encode:
        raise UnsupportedError(
            f"{name}: stored as {chosen}, which can be read but not written",
            hint=f"{codec.remedy} Or: --quant q8_0, --quant dequantize",
        )
    if chosen == word:
        return chosen
    # Rows that are no whole blocks (llama.cpp falls back likewise) keep the smallest error.
    return chosen if columns % codec.elements == 0 else "Q8_0" if columns % 32 == 0 else "F16"


def retention_notes(results: Mapping[str, TensorResult]) -> list[Note]:
    """Return the warnings about changes that rounding to few bits has largely undone."""
    lost = [
        (result.retained, name)
        for name, result in results.items()
        if result.retained is not None and result.retained < LEAST
    ]
    if not lost:
        return []
    worst, name = min(lost)
    return [
        Note(
            f"{len(lost)} requantised tensors keep less than half of the change (the least "
            f"{max(worst, 0.0):.1%}, {name}): values round back to where they were; {_BETTER}",
            "warning",
        )
    ]


def rounding_of(word: str, values: Tensor) -> float:
    """Return the relative error of storing such values in a type: a unit roundoff, or measured.

    Args:
        word: safetensors' dtype word or ggml's type.
        values: (rows, columns) as stored in such a type, which mixed are no such values.
    """
    if word in DTYPES:
        return float(torch.finfo(torch_dtype(word)).eps)
    codec = block_codec(word)
    mixed = ((values + values.flip(0, -1)) / math.sqrt(2)).to(torch.float32)
    norm = float(mixed.norm())
    if not codec.can_encode or norm == 0 or mixed.shape[-1] % codec.elements:
        return 1.0
    return float((codec.decode(codec.encode(mixed)) - mixed).norm()) / norm


def retained_fact(results: Iterable[TensorResult]) -> dict[str, float]:
    """Return the share of the whole change that requantised tensors kept, if there are any."""
    parts = [(r.retained, r.change_norm**2) for r in results if r.retained is not None]
    whole = sum(square for _, square in parts)
    return {"retained": sum(kept * square for kept, square in parts) / whole} if whole else {}
