"""The table of ggml's block types: name → type id in a GGUF file, codec."""

from __future__ import annotations

from dataclasses import dataclass

from loratools.codecs import (
    ggml_float4,
    ggml_iq,
    ggml_iq4,
    ggml_k_affine,
    ggml_k_signed,
    ggml_plain,
    ggml_simple,
    ggml_ternary,
)
from loratools.codecs.block import BlockCodec
from loratools.errors import UnsupportedError


@dataclass(frozen=True, slots=True)
class GGMLType:
    """A block type: ``id`` is its number in a GGUF file (``enum ggml_type``)."""

    id: int
    codec: BlockCodec

    @property
    def name(self) -> str:
        return self.codec.name


_ROWS = (
    GGMLType(0, ggml_plain.F32),
    GGMLType(1, ggml_plain.F16),
    GGMLType(2, ggml_simple.Q4_0),
    GGMLType(3, ggml_simple.Q4_1),
    GGMLType(6, ggml_simple.Q5_0),
    GGMLType(7, ggml_simple.Q5_1),
    GGMLType(8, ggml_simple.Q8_0),
    GGMLType(10, ggml_k_affine.Q2_K),
    GGMLType(11, ggml_k_signed.Q3_K),
    GGMLType(12, ggml_k_affine.Q4_K),
    GGMLType(13, ggml_k_affine.Q5_K),
    GGMLType(14, ggml_k_signed.Q6_K),
    GGMLType(16, ggml_iq.IQ2_XXS),
    GGMLType(17, ggml_iq.IQ2_XS),
    GGMLType(18, ggml_iq.IQ3_XXS),
    GGMLType(19, ggml_iq.IQ1_S),
    GGMLType(20, ggml_iq4.IQ4_NL),
    GGMLType(21, ggml_iq.IQ3_S),
    GGMLType(22, ggml_iq.IQ2_S),
    GGMLType(23, ggml_iq4.IQ4_XS),
    GGMLType(29, ggml_iq.IQ1_M),
    GGMLType(30, ggml_plain.BF16),
    GGMLType(34, ggml_ternary.TQ1_0),
    GGMLType(35, ggml_ternary.TQ2_0),
    GGMLType(39, ggml_float4.MXFP4),
    GGMLType(40, ggml_float4.NVFP4),
)

GGML_TYPES = {row.name: row for row in _ROWS}
"""By name, as gguf-py and llama.cpp spell it."""

GGML_BY_ID = {row.id: row for row in _ROWS}
"""By number in a GGUF file."""


def find_ggml_type(type_id: int) -> GGMLType:
    """Return the type with a number; ``UnsupportedError`` for one that has no codec here."""
    if type_id not in GGML_BY_ID:
        raise UnsupportedError(
            f"GGUF tensor type {type_id} cannot be decoded",
            f"Types that can: {', '.join(GGML_TYPES)}.",
        )
    return GGML_BY_ID[type_id]
