"""compressed-tensors' rows of the table of schemes.

The config names groups of modules, each with the bits, the type and the strategy of its weights,
and perhaps a format of its own; the tensors have to bear it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from loratools.codecs.compressed import PackQuantizedWeight
from loratools.codecs.float4 import MXFP4Weight
from loratools.codecs.float6 import MXFP6Weight
from loratools.codecs.fp8 import FP8Weight
from loratools.codecs.int_blocks import IntBlocksWeight
from loratools.codecs.packed import PackedWeight
from loratools.codecs.scheme_floats import Block, scale_block, understand_nvfp4
from loratools.codecs.scheme_groups import (
    FLOAT,
    INT,
    METHOD,
    MXFP4,
    MXFP6,
    MXFP8,
    NVFP4,
    PACKED,
    arguments_of,
    is_said,
)
from loratools.codecs.scheme_records import (
    EXPONENTS,
    FLOATS,
    FLOATS8,
    WHOLE,
    Found,
    Scheme,
    Understood,
)


def _bits(found: Found, scheme: str, kind: str, known: range) -> int:
    return found.number(scheme, arguments_of(found, scheme, kind), "num_bits", among=known)


def _block(found: Found, scheme: str, kind: str, shape: tuple[int, ...]) -> Block:
    """Return the block of a weight that shares a scale, by the config and by the scales."""
    arguments = arguments_of(found, scheme, kind)
    size = found.number(scheme, arguments, "group_size")
    structure = arguments.get("block_structure")
    scale = found.shape("scale")
    if structure:
        down, across = _structure(found, scheme, structure)
        return scale_block(found, scheme, shape, "scale", (down, across))
    if size > 0:
        if shape[-1] % size:
            raise found.fault(scheme, f"rows of {shape[-1]} are no groups of {size}")
        found.expect(scheme, "scale", (*shape[:-1], shape[-1] // size))
        return 1, size
    whole = scale[:-1] == shape[:-1] and scale[-1] and shape[-1] % scale[-1] == 0
    if whole and not arguments:
        return 1, shape[-1] // scale[-1]
    return scale_block(found, scheme, shape, "scale", (128, 128))


def _structure(found: Found, scheme: str, said: object) -> tuple[int, int]:
    parts = said.split("x") if isinstance(said, str) else said
    if not isinstance(parts, list | tuple) or len(parts) != 2:
        raise found.fault(scheme, f"block_structure is {said!r}")
    words = {"block_structure": parts[0], "columns": parts[1]}
    down, across = (found.number(scheme, words, name) for name in words)
    if down < 1 or across < 1:
        raise found.fault(scheme, f"block_structure is {said!r}")
    return down, across


# ── the schemes ──


def _is_compressed(found: Found) -> bool:
    return found.config.get("quant_method") == METHOD


def _understand_int(found: Found) -> Understood:
    found.expect_rank(INT, "weight", 2, 3)
    shape = found.shape("weight")
    bits = _bits(found, INT, "int", range(1, 9)) or 8
    block = _block(found, INT, "int", shape)
    if "zero_point" in found.names:
        found.expect(INT, "zero_point", found.shape("scale"))
    elif arguments_of(found, INT, "int").get("symmetric") is False:
        raise found.fault(INT, "there is no .weight_zero_point")
    return shape, lambda parts: IntBlocksWeight(shape, parts, block, bits), None


def _understand_float(found: Found, scheme: str) -> Understood:
    found.expect_rank(scheme, "weight", 2, 3)
    shape = found.shape("weight")
    _bits(found, scheme, "float", range(8, 9))
    block = _block(found, scheme, "float", shape)
    if "zero_point" in found.names:
        found.expect(scheme, "zero_point", found.shape("scale"))
    return shape, lambda parts: FP8Weight(shape, parts, block), None


def _understand_mxfp8(found: Found) -> Understood:
    found.expect_rank(MXFP8, "weight", 2, 3)
    *leading, columns = found.shape("weight")
    if columns % 32:
        raise found.fault(MXFP8, f"rows of {columns} are no groups of 32")
    found.expect(MXFP8, "scale", (*leading, columns // 32))
    return _understand_float(found, MXFP8)


def _is_mxfp(found: Found, scheme: str, bits: int) -> bool:
    """Whether packed bytes are microscaled floats of 4 or 6 bits, else by the number of scales."""
    likely = "scales" in found.names and found.dtype("scales") in EXPONENTS
    if likely:
        six = found.shape("blocks")[-1:] == tuple(24 * n for n in found.shape("scales")[-1:])
        likely = six == (bits == 6)
    return found.dtype("blocks") == "U8" and is_said(found, scheme, likely=likely)


def _is_mxfp8(found: Found) -> bool:
    if not _is_compressed(found) or found.dtype("weight") not in FLOATS8:
        return False
    likely = "scale" in found.names and found.dtype("scale") in EXPONENTS
    return is_said(found, MXFP8, likely=likely)


def _understand_mxfp(found: Found, scheme: str, bits: int) -> Understood:
    found.expect_rank(scheme, "blocks", 2)
    _bits(found, scheme, "float", range(bits, bits + 1))
    rows, packed = found.shape("blocks")
    columns = packed * 8 // bits
    found.expect(scheme, "scales", (rows, packed // (4 * bits)))
    if columns % 32:
        raise found.fault(scheme, f"rows of {columns} are no groups of 32")
    kind = MXFP4Weight if bits == 4 else MXFP6Weight
    return (rows, columns), lambda parts: kind((rows, columns), parts), "BF16"


def _understand_packed(found: Found) -> Understood:
    found.expect_rank(PACKED, "weight_packed", 2)
    shape, words = found.sizes("weight_shape"), found.shape("weight_packed")[1]
    if len(shape) != 2 or min(shape) < 1:
        raise found.fault(PACKED, f".weight_shape says {shape}")
    bits = _bits(found, PACKED, "int", range(1, 9)) or words * 32 // shape[1]
    if bits not in range(1, 9):
        raise found.fault(PACKED, f"{words} words a row do not hold {shape[1]} values")
    if found.shape("weight_packed") != (shape[0], -(-shape[1] * bits // 32)):
        raise found.fault(
            PACKED, f"{words} words a row do not hold {shape[1]} values of {bits} bits"
        )
    groups = _expect_groups(found, shape)
    if "weight_zero_point" in found.names:
        packed = (-(-shape[0] * bits // 32), groups)
        plain = found.dtype("weight_zero_point") == "I8"
        found.expect(PACKED, "weight_zero_point", found.shape("weight_scale") if plain else packed)
    elif arguments_of(found, PACKED, "int").get("symmetric") is False:
        raise found.fault(PACKED, "there is no .weight_zero_point")
    return shape, lambda parts: _with_groups(shape, parts, bits, groups), None


def _expect_groups(found: Found, shape: tuple[int, ...]) -> int:
    """Return into how many groups a row falls."""
    size = found.number(PACKED, arguments_of(found, PACKED, "int"), "group_size")
    scale = found.shape("weight_scale")
    if math.prod(scale) == 1 and size < 1:
        return 1
    groups = -(-shape[1] // size) if size > 0 else scale[-1] if scale else 0
    if groups < 1 or shape[1] % groups:
        raise found.fault(PACKED, f".weight_scale has shape {scale} for rows of {shape[1]}")
    found.expect(PACKED, "weight_scale", (shape[0], groups))
    if "weight_g_idx" in found.names:
        found.expect(PACKED, "weight_g_idx", shape[1:])
    return groups


def _with_groups(
    shape: tuple[int, ...], parts: Mapping[str, Tensor], bits: int, groups: int
) -> PackedWeight:
    """Return the weight, a scale of the whole tensor repeated for every row."""
    scale = parts["weight_scale"].reshape(-1, groups).expand(shape[0], groups)
    return PackQuantizedWeight(shape, {**parts, "weight_scale": scale}, bits)


_WORD8 = {
    "weight": (".weight",), "scale": (".weight_scale",), "zero_point": (".weight_zero_point",),
}  # fmt: skip
_BYTES = {"blocks": (".weight_packed",), "scales": (".weight_scale",)}


def _microscaled(scheme: str, bits: int) -> Scheme:
    return Scheme(
        scheme,
        ".weight_packed",
        _BYTES,
        lambda found: _is_mxfp(found, scheme, bits),
        lambda found: _understand_mxfp(found, scheme, bits),
        methods=_METHODS,
        dtypes={"scales": EXPONENTS},
    )


_OPTIONAL, _METHODS = frozenset({"zero_point"}), frozenset({METHOD})

COMPRESSED_SCHEMES: tuple[Scheme, ...] = (
    Scheme(
        INT,
        ".weight",
        _WORD8,
        lambda found: _is_compressed(found) and found.dtype("weight") == "I8",
        _understand_int,
        _OPTIONAL,
        methods=_METHODS,
        dtypes={"scale": FLOATS, "zero_point": ("I8", *FLOATS)},
    ),
    Scheme(
        MXFP8,
        ".weight",
        _WORD8,
        _is_mxfp8,
        _understand_mxfp8,
        _OPTIONAL,
        methods=_METHODS,
        dtypes={"scale": EXPONENTS},
    ),
    Scheme(
        FLOAT,
        ".weight",
        _WORD8,
        lambda found: _is_compressed(found) and found.dtype("weight") in FLOATS8,
        lambda found: _understand_float(found, FLOAT),
        _OPTIONAL,
        methods=_METHODS,
        dtypes={"scale": FLOATS, "zero_point": (*FLOATS, *FLOATS8)},
    ),
    _microscaled(MXFP6, 6),
    _microscaled(MXFP4, 4),
    Scheme(
        NVFP4,
        ".weight_packed",
        {
            "weight": (".weight_packed",), "scale": (".weight_scale",),
            "global_scale": (".weight_global_scale",),
        },
        lambda found: found.dtype("weight") == "U8",
        lambda found: understand_nvfp4(found, NVFP4),
        methods=_METHODS,
        dtypes={"scale": ("F8_E4M3",), "global_scale": FLOATS},
    ),
    Scheme(
        PACKED,
        ".weight_packed",
        {
            "weight_packed": (".weight_packed",), "weight_scale": (".weight_scale",),
            "weight_shape": (".weight_shape",), "weight_zero_point": (".weight_zero_point",),
            "weight_g_idx": (".weight_g_idx",),
        },
        lambda found: found.dtype("weight_packed") == "I32",
        _understand_packed,
        frozenset({"weight_zero_point", "weight_g_idx"}),
        methods=_METHODS,
        dtypes={
            "weight_scale": FLOATS, "weight_shape": WHOLE, "weight_zero_point": ("I32", "I8"),
            "weight_g_idx": ("I32", "I64"),
        },
    ),
)  # fmt: skip
