"""Rows of the table of schemes: 8 bits with scales, FP8 without, MXFP4 and NVFP4."""

from __future__ import annotations

import math
from collections.abc import Sequence

from loratools.codecs.float4 import MXFP4Weight, NVFP4Weight
from loratools.codecs.fp8 import FP8Weight
from loratools.codecs.int_blocks import IntBlocksWeight
from loratools.codecs.scheme_records import (
    EXPONENTS,
    FLOATS,
    FLOATS8,
    Found,
    Packing,
    Scheme,
    Spec,
    Understood,
)

CAST = "float8 without scales"
"""Weights that were cast to float8: each number is its own value."""

FP8_SCALES = (
    ".weight_scale_inv", ".weight_scale", ".scale", ".scale_weight", ".qscale_weight",
)  # fmt: skip

Block = tuple[int, int] | None

# ── 8 bits ──


def _is_fp8(found: Found) -> bool:
    if found.dtype("weight") not in FLOATS8 or len(found.shape("weight")) < 2:
        return False
    return "scale" in found.names or bool(found.config)


def _understand_fp8(found: Found) -> Understood:
    shape = found.shape("weight")
    block = _config_block(found)
    block = scale_block(found, "fp8", shape, "scale", block or (128, 128))
    return shape, lambda parts: FP8Weight(shape, parts, block), None


def _config_block(found: Found) -> Block:
    said = found.config.get("weight_block_size")
    if said is None:
        return None
    if not isinstance(said, Sequence) or len(said) != 2:
        raise found.fault("fp8", f"weight_block_size is {said!r}")
    words = dict(zip(("rows", "columns"), said, strict=True))
    down, across = (found.number("fp8", words, name) for name in words)
    if down < 1 or across < 1:
        raise found.fault("fp8", f"weight_block_size is {said!r}")
    return down, across


def scale_block(
    found: Found, scheme: str, shape: tuple[int, ...], part: str, block: tuple[int, int]
) -> Block:
    """Return the block that shares a scale, or None for one per tensor or row.

    Raises CorruptFileError where the scales of a weight of ``shape`` are neither these nor those
    of blocks of ``block``.
    """
    scale, count = found.shape(part), math.prod(found.shape(part))
    # As many blocks of columns as there are rows: (1, rows) are blocks.
    expected = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    if scale == expected and count > 1 and len(shape) < 4:
        return block
    matrices = math.prod(shape[:-2] if len(shape) < 4 else ())
    columns = shape[-1] if len(shape) < 4 else math.prod(shape[1:])
    rows = math.prod(shape) // columns
    if count == 1 or (count == rows and scale[-1:] in ((1,), (rows // matrices,))):
        return None
    stored = f"{found.ending(part)} has shape {scale}"
    if len(shape) > 3:
        raise found.fault(scheme, f"{stored} for a weight of {shape}")
    raise found.fault(scheme, f"{stored} where blocks of {block} make {expected}")


_INT8 = "int8 with scales"


def _is_int8(found: Found) -> bool:
    said = found.config.get("quant_method") == "modelopt"
    return found.dtype("weight") == "I8" and ("scale" in found.names or said)


def _understand_int8(found: Found) -> Understood:
    found.expect_rank(_INT8, "weight", 2, 3)
    shape = found.shape("weight")
    block = scale_block(found, _INT8, shape, "scale", (128, 128))
    return shape, lambda parts: IntBlocksWeight(shape, parts, block), None


# ── 4 bits ──


def _understand_mxfp4(found: Found) -> Understood:
    found.expect_rank("mxfp4", "blocks", 3, 4)
    *leading, groups, size = found.shape("blocks")
    if size != 16:
        raise found.fault("mxfp4", f"_blocks has shape {found.shape('blocks')}")
    found.expect("mxfp4", "scales", (*leading, groups))
    shape = (*leading, groups * 32)
    return shape, lambda parts: MXFP4Weight(shape, parts), "BF16"


def understand_nvfp4(found: Found, scheme: str) -> Understood:
    """Return what NVFP4 weights are, whose scales every scheme stores alike."""
    found.expect_rank(scheme, "weight", 2)
    rows, packed = found.shape("weight")
    if packed % 8:
        raise found.fault(scheme, f"rows of {packed * 2} are no groups of 16")
    found.expect(scheme, "scale", (rows, packed // 8))
    for part in ("scale_2", "global_scale"):
        if part in found.names and math.prod(found.shape(part)) != 1:
            raise found.fault(scheme, f"{found.ending(part)} has shape {found.shape(part)}")
    shape = (rows, packed * 2)
    return shape, lambda parts: NVFP4Weight(shape, parts), "BF16"


# ── without scales ──


def cast_packing(name: str, spec: Spec) -> Packing:
    """Return a float8 tensor that is its own value."""
    shape = tuple(spec.shape)
    return Packing(CAST, name, shape, {"weight": name}, lambda parts: FP8Weight(shape, parts))


FLOAT_SCHEMES: tuple[Scheme, ...] = (
    Scheme(
        "fp8",
        ".weight",
        {"weight": (".weight",), "scale": FP8_SCALES},
        _is_fp8,
        _understand_fp8,
        methods=frozenset({"fp8", "fbgemm_fp8", "modelopt", "modelopt_fp8", "mxfp8"}),
        dtypes={"scale": (*FLOATS, *EXPONENTS)},
    ),
    Scheme(
        "mxfp4",
        "_blocks",
        {"blocks": ("_blocks",), "scales": ("_scales",)},
        lambda found: found.dtype("blocks") == "U8",
        _understand_mxfp4,
        weight="",
        methods=frozenset({"mxfp4"}),
        dtypes={"scales": EXPONENTS},
    ),
    Scheme(
        "nvfp4",
        ".weight",
        {
            "weight": (".weight",), "scale": (".weight_scale",), "scale_2": (".weight_scale_2",),
        },
        lambda found: found.dtype("weight") == "U8"
        and ("scale_2" in found.names or "scale" in found.names),
        lambda found: understand_nvfp4(found, "nvfp4"),
        methods=frozenset({"modelopt", "modelopt_fp4", "nvfp4"}),
        dtypes={"scale": ("F8_E4M3",), "scale_2": FLOATS},
    ),
    Scheme(
        _INT8,
        ".weight",
        {"weight": (".weight",), "scale": (".weight_scale", ".scale_weight")},
        _is_int8,
        _understand_int8,
        methods=frozenset({"modelopt"}),
        dtypes={"scale": FLOATS},
    ),
)  # fmt: skip
