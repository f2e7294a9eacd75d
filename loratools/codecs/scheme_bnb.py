"""bitsandbytes' rows of the table of schemes: NF4, FP4 and LLM.int8."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loratools.codecs import bnb4
from loratools.codecs.bnb4_weight import BnB4Weight
from loratools.codecs.int8_rows import Int8Weight
from loratools.codecs.packed import PackedWeight
from loratools.codecs.scheme_records import (
    FLOATS,
    Found,
    Scheme,
    Understood,
    always,
    float_word,
)

_FOUR, _EIGHT = "bitsandbytes 4-bit", "bitsandbytes int8"
_METHODS = frozenset({"bitsandbytes"})
_STATES = {
    kind: f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4")
}  # fmt: skip


def _understand_bnb4(found: Found) -> Understood:
    kind = found.names["state"].rpartition("__")[2]
    state = _state(found)
    shape, blocksize = _sizes(found, state), found.number(_FOUR, state, "blocksize")
    count = math.prod(shape)
    if blocksize < 1:
        raise found.unknown(_FOUR, f"with blocksize {state.get('blocksize')!r}")
    found.expect(_FOUR, "absmax", (-(-count // blocksize),))
    found.expect(_FOUR, "quant_map", (16,))
    _expect_bytes(found, -(-count // 2))
    nested, offset = _nesting(found, state, -(-count // blocksize))

    def build(parts: Mapping[str, Tensor]) -> PackedWeight:
        return BnB4Weight(shape, _exact_map(parts, kind), min(blocksize, count), nested, offset)

    return shape, build, float_word(state.get("dtype"))


def _state(found: Found) -> Mapping[str, Any]:
    try:
        state = json.loads(bytes(found.value("state").tolist()).decode("utf-8"))
    except (ValueError, TypeError):
        state = None
    if not isinstance(state, dict):
        raise found.fault(_FOUR, f"{found.ending('state')} is no JSON object")
    return state


def _sizes(found: Found, state: Mapping[str, Any]) -> tuple[int, ...]:
    shape = state.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n > 0 for n in shape):
        raise found.fault(_FOUR, f"its shape is said to be {shape!r}")
    return tuple(shape)


def _expect_bytes(found: Found, count: int) -> None:
    """Raise unless the codes take so many bytes, of whatever dtype they are stored in."""
    shape, word = found.shape("weight"), found.dtype("weight")
    width = bnb4.STORAGES[word]
    if not count <= math.prod(shape) * width < count + width:
        raise found.fault(_FOUR, f".weight is {word} {shape}, not {count} bytes")


def _nesting(found: Found, state: Mapping[str, Any], blocks: int) -> tuple[int, float]:
    """Return how many scales share a nested one, or 0, and the mean they are measured from."""
    nested = found.number(_FOUR, state, "nested_blocksize")
    if nested < 1:
        if found.dtype("absmax") not in FLOATS:
            raise found.fault(_FOUR, f".weight.absmax is {found.dtype('absmax')} and not nested")
        return 0, 0.0
    for part in ("nested_absmax", "nested_quant_map"):
        if part not in found.names:
            raise found.fault(_FOUR, f"there is no .weight.{part}")
    if found.dtype("absmax") != "U8":
        raise found.fault(_FOUR, f".weight.absmax is {found.dtype('absmax')}, not U8, and nested")
    found.expect(_FOUR, "nested_absmax", (-(-blocks // nested),))
    found.expect(_FOUR, "nested_quant_map", (256,))
    offset = state.get("nested_offset") or 0.0
    if not isinstance(offset, int | float):
        raise found.fault(_FOUR, f"nested_offset is {offset!r}")
    return min(nested, blocks), float(offset)


def _exact_map(parts: Mapping[str, Tensor], kind: str) -> Mapping[str, Tensor]:
    """Return the parts with the table of codes as bitsandbytes has it, if it was only rounded.

    A model that was cast as a whole (``.to(bfloat16)``) rounds the table too, and bitsandbytes'
    own kernels go on with theirs.
    """
    stored, exact = parts["quant_map"], bnb4.levels(kind)
    if stored.dtype == torch.float32 or not torch.equal(exact.to(stored.dtype), stored):
        return parts
    return {**parts, "quant_map": exact}


def _understand_int8(found: Found) -> Understood:
    found.expect_rank(_EIGHT, "weight", 2)
    shape = found.shape("weight")
    found.expect(_EIGHT, "SCB", shape[:1])
    return shape, lambda parts: Int8Weight(shape, parts), None


def _lacks_scales(found: Found) -> bool:
    """Whether the config says int8 of a weight whose scales, which tell it otherwise, are gone."""
    said = found.config.get("quant_method") == "bitsandbytes"
    return said and found.dtype("weight") == "I8" and "SCB" not in found.names


BNB_SCHEMES: tuple[Scheme, ...] = (
    *(
        Scheme(
            _FOUR,
            state,
            {
                "state": (state,), "weight": (".weight",), "absmax": (".weight.absmax",),
                "quant_map": (".weight.quant_map",), "nested_absmax": (".weight.nested_absmax",),
                "nested_quant_map": (".weight.nested_quant_map",),
            },
            always,
            _understand_bnb4,
            frozenset({"nested_absmax", "nested_quant_map"}),
            methods=_METHODS,
            dtypes={
                "state": ("U8",), "weight": tuple(bnb4.STORAGES), "absmax": ("U8", *FLOATS),
                "quant_map": FLOATS, "nested_absmax": FLOATS, "nested_quant_map": FLOATS,
            },
        )
        for state in _STATES.values()
    ),
    *(
        Scheme(
            _EIGHT,
            marker,
            {"weight": (".weight",), "SCB": (".SCB",), "format": (".weight_format",)},
            applies,
            _understand_int8,
            frozenset({"format"}),
            methods=_METHODS,
            dtypes={"weight": ("I8",), "SCB": FLOATS},
        )
        for marker, applies in ((".SCB", always), (".weight", _lacks_scales))
    ),
)  # fmt: skip
