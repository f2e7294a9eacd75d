"""Whether one entry of a safetensors header makes sense."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from loratools.tensorfiles.dtypes import DTYPES
from loratools.tensorfiles.inputs import quoted

_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_MAX_ELEMENTS = 2**63 - 1


def entry_fault(entry: Any) -> str | None:
    """Return what is wrong with one entry of a header, taken by itself, or None."""
    return next((fault for check in _CHECKS if (fault := check(entry))), None)


def _fields_fault(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return f"{quoted(entry)} is not an object"
    if missing := sorted(_FIELDS - entry.keys()):
        return f"lacks {', '.join(missing)}"
    unknown = sorted(entry.keys() - _FIELDS)
    return f"has an unknown field {quoted(unknown[0])}" if unknown else None


def _dtype_fault(entry: Any) -> str | None:
    dtype = entry["dtype"]
    known = isinstance(dtype, str) and dtype in DTYPES
    return None if known else f"unknown dtype {quoted(dtype)}"


def _shape_fault(entry: Any) -> str | None:
    shape = entry["shape"]
    if not _are_naturals(shape):
        return f"shape {quoted(shape)} is not a list of whole numbers from 0"
    elements = 1
    # A zero hides an overflow from the product, not from a reader that multiplies step by step.
    for extent in shape:
        elements *= extent
        if elements > _MAX_ELEMENTS:
            return f"shape {quoted(shape)} overflows"
    return None


def _offsets_fault(entry: Any) -> str | None:
    offsets = entry["data_offsets"]
    if not _are_naturals(offsets) or len(offsets) != 2:
        return f"data_offsets {quoted(offsets)} is not two whole numbers from 0"
    return f"data_offsets {offsets} end before they begin" if offsets[0] > offsets[1] else None


def _size_fault(entry: Any) -> str | None:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    bits = math.prod(shape) * DTYPES[dtype]
    if bits % 8:
        return f"{dtype} of shape {quoted(shape)} does not end on a whole byte"
    if bits // 8 != end - begin:
        return f"{dtype} of shape {quoted(shape)} takes {bits // 8} bytes, not {end - begin}"
    return None


def _are_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


_CHECKS: tuple[Callable[[Any], str | None], ...] = (
    _fields_fault,
    _dtype_fault,
    _shape_fault,
    _offsets_fault,
    _size_fault,
)
