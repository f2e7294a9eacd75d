"""torchao's rows of the table of schemes: tensor subclasses that safetensors files hold in parts.

``m.weight`` lies in ``m._weight_qdata``, ``m._weight_scale`` ...; a word of the file's header, of
the weight's name, says which subclass it was, with its attributes as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from loratools.codecs.float4 import MXFP4Weight
from loratools.codecs.fp8 import FP8Weight
from loratools.codecs.int4_pairs import Int4PairsWeight
from loratools.codecs.int_blocks import IntBlocksWeight
from loratools.codecs.scheme_floats import Block, understand_nvfp4
from loratools.codecs.scheme_records import (
    EXPONENTS,
    FLOATS,
    FLOATS8,
    Found,
    Scheme,
    Understood,
    float_word,
)

MARKER = "_qdata"
_TILES = {
    "Int4TilePackedTo4dTensor": "tiles in the order of one GPU's instructions",
    "Int4PlainInt32Tensor": "words in the order of one vendor's instructions",
    "Int4PreshuffledTensor": "codes in the order of one GPU's instructions",
}
_BITS = {f"int{bits}": bits for bits in range(1, 9)}


def weight_name(module: str) -> str:
    """Return the parameter's name: ``m._weight`` → ``m.weight``."""
    path, _, leaf = module.rpartition(".")
    return f"{path}.{leaf.removeprefix('_')}" if path else leaf.removeprefix("_")


def stored_prefix(name: str) -> str:
    """Return what the names of a parameter's parts begin with: ``m.weight`` → ``m._weight``."""
    path, _, leaf = name.rpartition(".")
    return f"{path}._{leaf}" if path else f"_{leaf}"


def header_words(metadata: Mapping[str, str]) -> frozenset[str]:
    """Return the words of a header that describe torchao's tensors."""
    try:
        names = json.loads(metadata.get("tensor_names", ""))
    except ValueError:
        return frozenset()
    found = {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()
    return frozenset({"tensor_names", *found} & metadata.keys())


def _described(found: Found) -> Mapping[str, Any]:
    """Return what the header says of a weight; empty if it says nothing that can be read."""
    try:
        said = json.loads(found.metadata.get(weight_name(found.module), ""))
    except ValueError:
        return {}
    return said if isinstance(said, dict) and isinstance(said.get("_data"), dict) else {}


def _is_kind(kind: str, found: Found) -> bool:
    return _described(found).get("_type") == kind


def _attributes(found: Found, scheme: str) -> Mapping[str, Any]:
    if "act_pre_scale" in found.names:
        raise found.unknown(scheme, "with inputs scaled beforehand (act_pre_scale)")
    said = _described(found)
    listed = said.get("_tensor_data_names")
    stored = {found.ending(part) for part in found.names}
    for name in listed if isinstance(listed, list) else []:
        if f"_{name}" not in stored:
            raise found.fault(scheme, f"there is no {found.module}_{name}")
    attributes: Mapping[str, Any] = said["_data"]
    return attributes


def _word(attributes: Mapping[str, Any], name: str = "dtype") -> str | None:
    said = attributes.get(name)
    return float_word(said.get("_data")) if isinstance(said, Mapping) else None


def _block(found: Found, scheme: str, shape: tuple[int, ...], said: object) -> Block:
    """Return the block of a matrix that shares a scale, which the scales have to bear out."""
    sizes = [int(n) for n in said] if _are_sizes(said, len(shape)) else None  # type: ignore[attr-defined]
    if sizes is None or any(n != 1 for n in sizes[:-2]):
        if math.prod(found.shape("scale")) == 1:
            return None
        raise found.fault(scheme, f"block_size is {said!r} for a weight of {shape}")
    counts = tuple(-(-n // size) for n, size in zip(shape, sizes, strict=True))
    one = math.prod(counts) == 1
    shapes = [counts, counts[:-1]] if counts[-1] == 1 else [counts]
    found.expect(scheme, "scale", *shapes, *([(), (1,)] if one else []))
    return sizes[-2], sizes[-1]


def _are_sizes(said: object, count: int) -> bool:
    return (
        isinstance(said, list)
        and len(said) == count
        and all(isinstance(n, int) and n > 0 for n in said)
    )


def _understand_int8(scheme: str, found: Found) -> Understood:
    attributes = _attributes(found, scheme)
    found.expect_rank(scheme, "weight", 2, 3)
    shape = found.shape("weight")
    block = _block(found, scheme, shape, attributes.get("block_size"))
    if "zero_point" in found.names:
        found.expect(scheme, "zero_point", found.shape("scale"))
    target = attributes.get("target_dtype")
    said = str(target.get("_data")) if isinstance(target, Mapping) else "int8"
    if said not in _BITS:
        raise found.unknown(scheme, f"of {said}")
    bits = _BITS[said]
    return shape, lambda parts: IntBlocksWeight(shape, parts, block, bits), _word(attributes)


def _understand_float8(scheme: str, found: Found) -> Understood:
    attributes = _attributes(found, scheme)
    found.expect_rank(scheme, "weight", 2, 3)
    shape = found.shape("weight")
    sizes = attributes.get("block_size") or _inferred(shape, found.shape("scale"))
    block = _block(found, scheme, shape, sizes)
    return shape, lambda parts: FP8Weight(shape, parts, block), _word(attributes)


def _inferred(shape: tuple[int, ...], scale: tuple[int, ...]) -> list[int] | None:
    """Return the blocks that as many scales make, where the header says nothing of them."""
    if len(scale) != len(shape) or 0 in scale:
        return None
    return [-(-size // count) for size, count in zip(shape, scale, strict=True)]


def _understand_int4(scheme: str, found: Found) -> Understood:
    sizes = _attributes(found, scheme).get("block_size")
    found.expect_rank(scheme, "weight", 2, 3)
    *leading, rows, packed = found.shape("weight")
    shape = (*leading, rows, packed * 2)
    if not _are_sizes(sizes, len(shape)) or any(n != 1 for n in sizes[:-1]):  # type: ignore[index]
        raise found.fault(scheme, f"block_size is {sizes!r} for a weight of {shape}")
    size = sizes[-1]  # type: ignore[index]
    if shape[-1] % size:
        raise found.fault(scheme, f"rows of {shape[-1]} are no groups of {size}")
    for part in ("scale", "zero_point"):
        found.expect(scheme, part, (*leading, shape[-1] // size, rows))
    word = found.dtype("scale") if found.dtype("scale") != "F64" else None
    return shape, lambda parts: Int4PairsWeight(shape, parts), word


def _understand_mx(scheme: str, found: Found) -> Understood:
    attributes = _unswizzled(found, scheme)
    found.expect_rank(scheme, "weight", 2, 3)
    *leading, columns = found.shape("weight")
    four = found.dtype("weight") == "U8"
    size = found.number(scheme, attributes, "block_size", among=(32,)) or 32
    shape = (*leading, columns * 2 if four else columns)
    found.expect(scheme, "scale", (*leading, shape[-1] // size))
    word = _word(attributes, "orig_dtype")
    if not four:
        return shape, lambda parts: FP8Weight(shape, parts, (1, size)), word
    names = {"weight": "blocks", "scale": "scales"}
    return (
        shape,
        lambda parts: MXFP4Weight(shape, {names[part]: t for part, t in parts.items()}),
        word,
    )


def _understand_nvfp4(scheme: str, found: Found) -> Understood:
    _unswizzled(found, scheme)
    shape, build, _ = understand_nvfp4(found, scheme)
    return shape, build, _word(_described(found)["_data"], "orig_dtype")


def _unswizzled(found: Found, scheme: str) -> Mapping[str, Any]:
    attributes = _attributes(found, scheme)
    if attributes.get("is_swizzled_scales"):
        raise found.unknown(scheme, "with scales in the order of one GPU's instructions")
    return attributes


def _understand_other(found: Found) -> Understood:
    described = _described(found)
    if "_type" not in described:
        raise found.fault(
            "torchao", f"the file's header says nothing of {weight_name(found.module)}"
        )
    kind = str(described["_type"])
    reason = f"in {_TILES[kind]}" if kind in _TILES else "in a layout"
    raise found.unknown(f"torchao {kind}", reason)


_PARTS = {
    "weight": ("_qdata",), "scale": ("_scale",), "zero_point": ("_zero_point",),
    "act_pre_scale": ("_act_pre_scale",),
}  # fmt: skip
_MORE = {
    "scale_2": ("_per_tensor_scale",), "act_scale": ("_act_quant_scale",),
    "act_zero": ("_act_quant_zero_point",), "act_scale_2": ("_act_per_tensor_scale",),
}  # fmt: skip
_OPTIONAL = frozenset({"zero_point", "act_pre_scale", *_MORE})


def _row(
    name: str,
    kind: str,
    understand: Callable[[str, Found], Understood],
    dtypes: Mapping[str, Collection[str]],
    *needed: str,
) -> Scheme:
    return Scheme(
        name,
        MARKER,
        {**_PARTS, **_MORE},
        partial(_is_kind, kind),
        partial(understand, name),
        _OPTIONAL - frozenset(needed),
        weight_name,
        frozenset({"torchao"}),
        dtypes,
    )


_ZEROS = FLOATS | {"I8", "I16", "I32", "I64"}

TORCHAO_SCHEMES: tuple[Scheme, ...] = (
    _row(
        "torchao int8", "Int8Tensor", _understand_int8,
        {"weight": ("I8",), "scale": FLOATS, "zero_point": _ZEROS},
    ),
    _row(
        "torchao intx", "IntxUnpackedToInt8Tensor", _understand_int8,
        {"weight": ("I8",), "scale": FLOATS, "zero_point": _ZEROS}, "zero_point",
    ),
    _row(
        "torchao float8", "Float8Tensor", _understand_float8,
        {"weight": FLOATS8, "scale": FLOATS},
    ),
    _row(
        "torchao int4", "Int4Tensor", _understand_int4,
        {"weight": ("I8", "U8"), "scale": FLOATS, "zero_point": FLOATS}, "zero_point",
    ),
    _row(
        "torchao mx", "MXTensor", _understand_mx,
        {"weight": ("U8", *FLOATS8), "scale": EXPONENTS},
    ),
    _row(
        "torchao nvfp4", "NVFP4Tensor", _understand_nvfp4,
        {"weight": ("U8",), "scale": ("F8_E4M3",), "scale_2": FLOATS},
    ),
    Scheme(
        "torchao",
        MARKER,
        {"weight": ("_qdata",)},
        lambda found: found.module.rpartition(".")[2].startswith("_"),
        _understand_other,
        weight=weight_name,
        methods=frozenset({"torchao"}),
    ),
)  # fmt: skip


def scheme_of(metadata: Mapping[str, str], name: str) -> str | None:
    """Return the scheme of a weight by the header's word, or None for a plain tensor."""
    found = Found(stored_prefix(name), {}, {}, {}, _no_read, metadata)
    kind = _described(found).get("_type", "Tensor")
    if kind == "Tensor":
        return None
    return next((s.name for s in TORCHAO_SCHEMES[:-1] if s.applies(found)), f"torchao {kind}")


def _no_read(name: str) -> Tensor:
    raise KeyError(name)
