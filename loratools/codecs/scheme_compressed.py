"""compressed-tensors' rows of the table of schemes.

The config names groups of modules, each with the bits, the type and the strategy of its weights,
and perhaps a format of its own; the tensors have to bear it out.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from loratools.codecs.compressed import PackQuantizedWeight
from loratools.codecs.float4 import MXFP4Weight
from loratools.codecs.float6 import MXFP6Weight
from loratools.codecs.fp8 import FP8Weight
from loratools.codecs.int_blocks import IntBlocksWeight
from loratools.codecs.packed import PackedWeight
from loratools.codecs.scheme_floats import Block, scale_block, understand_nvfp4
from loratools.codecs.scheme_records import (
    EXPONENTS,
    FLOATS,
    FLOATS8,
    ORIGINAL,
    WHOLE,
    Found,
    Scheme,
    Understood,
)
from loratools.errors import UnsupportedError

_METHOD = "compressed-tensors"
_PACKED = f"{_METHOD} pack-quantized"
_INT = f"{_METHOD} int-quantized"
_FLOAT = f"{_METHOD} float-quantized"
_MXFP4, _MXFP6, _MXFP8 = (f"{_METHOD} {kind}" for kind in ("mxfp4", "mxfp6", "mxfp8"))
_NVFP4 = f"{_METHOD} nvfp4"

_FORMATS = {
    "pack-quantized": {_PACKED}, "int-quantized": {_INT, _FLOAT},
    "naive-quantized": {_INT, _FLOAT}, "float-quantized": {_INT, _FLOAT},
    "mxfp4-pack-quantized": {_MXFP4}, "mxfp6-pack-quantized": {_MXFP6},
    "mxfp8-quantized": {_MXFP8}, "nvfp4-pack-quantized": {_NVFP4},
}  # fmt: skip
"""Format → schemes: the three that store a weight's own tensor differ by its dtype alone, and
files call them by each other's names."""

_SPARSE = {
    "marlin-24": "holds tiles in the order of one GPU's instructions, every other pair of weights "
    "left out",
    "sparse-24-bitmask": "leaves out two weights of four, and a merge would need them",
    "sparse-bitmask": "leaves out the weights that are zero, and a merge would need them",
}
_SPARSE_PARTS = {".scale_packed": "marlin-24", ".bitmask": "sparse-bitmask"}


def refuse_sparse(tensors: Mapping[str, object], config: Mapping[str, Any]) -> None:
    """Raise UnsupportedError for formats that have no room for a merged weight."""
    sparsity = config.get("sparsity_config")
    said = [config.get("format"), (sparsity or {}).get("format")] if config else []
    named = [(name, _SPARSE_PARTS[end]) for name in tensors for end in _SPARSE_PARTS
             if name.endswith(end)]  # fmt: skip
    found = [(next(iter(tensors), "config.json"), word) for word in said if word in _SPARSE]
    for name, word in [*named, *found]:
        raise UnsupportedError(
            f"{name}: stored as {_METHOD} {word}, which {_SPARSE[word]}", hint=ORIGINAL
        )


# ── what the config says of a module ──


def group_of(found: Found) -> Mapping[str, Any]:
    """Return the config's group that a module is in; empty if the config names none.

    A name counts before a pattern, and that before a class, of which a checkpoint says nothing:
    ``Linear`` then means every module.
    """
    groups = found.config.get("config_groups")
    known = [g for g in groups.values() if _is_group(g)] if isinstance(groups, Mapping) else []
    ranked = [(rank, group) for group in known if (rank := _rank(found.module, group)) is not None]
    return min(ranked, key=lambda pair: pair[0])[1] if ranked else {}


def _is_group(group: object) -> bool:
    return isinstance(group, Mapping) and isinstance(group.get("weights"), Mapping)


def _rank(module: str, group: Mapping[str, Any]) -> int | None:
    targets = group.get("targets") or ["Linear"]
    return min((rank for t in targets if (rank := _fit(module, str(t))) is not None), default=None)


def _fit(module: str, target: str) -> int | None:
    """Return how closely a target means a module, 0 the closest; None if it does not."""
    if target == module:
        return 0
    if target.startswith("re:"):
        return 1 if _matches(target[3:], module) else None
    table = "embed" in module.rpartition(".")[2]
    if target == ("Embedding" if table else "Linear"):
        return 2
    return 3 if target in ("Embedding", "Linear") else None


def _matches(pattern: str, module: str) -> bool:
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False


def check_format(found: Found, scheme: str) -> None:
    """Raise CorruptFileError where the config says another format than the tensors are in."""
    if found.config.get("quant_method", _METHOD) != _METHOD:
        return
    word = _format(found)
    if word and scheme not in _FORMATS[word]:
        raise found.fault(scheme, f"the config says {word}")


def _format(found: Found) -> str | None:
    """Return the config's word for how a module is stored, if it is one of those above."""
    word = group_of(found).get("format") or found.config.get("format")
    return str(word) if word in _FORMATS else None


def _is_said(found: Found, scheme: str, *, likely: bool) -> bool:
    """Whether the config says that a module is so stored, or says nothing and it is likely."""
    word = _format(found)
    return scheme in _FORMATS[word] if word else likely


def _arguments(found: Found, scheme: str, kind: str) -> Mapping[str, Any]:
    """Return how the group's weights were quantised, after checking that they are of a kind."""
    arguments: Mapping[str, Any] = group_of(found).get("weights") or {}
    said = arguments.get("type") or kind
    if str(said).lower() != kind:
        raise found.fault(scheme, f"the config says that its weights are of type {said}")
    return arguments


def _bits(found: Found, scheme: str, kind: str, known: range) -> int:
    return found.number(scheme, _arguments(found, scheme, kind), "num_bits", among=known)


def _block(found: Found, scheme: str, kind: str, shape: tuple[int, ...]) -> Block:
    """Return the block of a weight that shares a scale, by the config and by the scales."""
    arguments = _arguments(found, scheme, kind)
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
    return found.config.get("quant_method") == _METHOD


def _understand_int(found: Found) -> Understood:
    found.expect_rank(_INT, "weight", 2, 3)
    shape = found.shape("weight")
    bits = _bits(found, _INT, "int", range(1, 9)) or 8
    block = _block(found, _INT, "int", shape)
    if "zero_point" in found.names:
        found.expect(_INT, "zero_point", found.shape("scale"))
    elif _arguments(found, _INT, "int").get("symmetric") is False:
        raise found.fault(_INT, "there is no .weight_zero_point")
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
    found.expect_rank(_MXFP8, "weight", 2, 3)
    *leading, columns = found.shape("weight")
    if columns % 32:
        raise found.fault(_MXFP8, f"rows of {columns} are no groups of 32")
    found.expect(_MXFP8, "scale", (*leading, columns // 32))
    return _understand_float(found, _MXFP8)


def _is_mxfp(found: Found, scheme: str, bits: int) -> bool:
    """Whether packed bytes are microscaled floats of 4 or 6 bits, else by the number of scales."""
    likely = "scales" in found.names and found.dtype("scales") in EXPONENTS
    if likely:
        six = found.shape("blocks")[-1:] == tuple(24 * n for n in found.shape("scales")[-1:])
        likely = six == (bits == 6)
    return found.dtype("blocks") == "U8" and _is_said(found, scheme, likely=likely)


def _is_mxfp8(found: Found) -> bool:
    if not _is_compressed(found) or found.dtype("weight") not in FLOATS8:
        return False
    likely = "scale" in found.names and found.dtype("scale") in EXPONENTS
    return _is_said(found, _MXFP8, likely=likely)


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
    found.expect_rank(_PACKED, "weight_packed", 2)
    shape, words = found.sizes("weight_shape"), found.shape("weight_packed")[1]
    if len(shape) != 2 or min(shape) < 1:
        raise found.fault(_PACKED, f".weight_shape says {shape}")
    bits = _bits(found, _PACKED, "int", range(1, 9)) or words * 32 // shape[1]
    if bits not in range(1, 9):
        raise found.fault(_PACKED, f"{words} words a row do not hold {shape[1]} values")
    if found.shape("weight_packed") != (shape[0], -(-shape[1] * bits // 32)):
        raise found.fault(
            _PACKED, f"{words} words a row do not hold {shape[1]} values of {bits} bits"
        )
    groups = _expect_groups(found, shape)
    if "weight_zero_point" in found.names:
        packed = (-(-shape[0] * bits // 32), groups)
        plain = found.dtype("weight_zero_point") == "I8"
        found.expect(_PACKED, "weight_zero_point", found.shape("weight_scale") if plain else packed)
    elif _arguments(found, _PACKED, "int").get("symmetric") is False:
        raise found.fault(_PACKED, "there is no .weight_zero_point")
    return shape, lambda parts: _with_groups(shape, parts, bits, groups), None


def _expect_groups(found: Found, shape: tuple[int, ...]) -> int:
    """Return into how many groups a row falls."""
    size = found.number(_PACKED, _arguments(found, _PACKED, "int"), "group_size")
    scale = found.shape("weight_scale")
    if torch.Size(scale).numel() == 1 and size < 1:
        return 1
    groups = -(-shape[1] // size) if size > 0 else scale[-1] if scale else 0
    if groups < 1 or shape[1] % groups:
        raise found.fault(_PACKED, f".weight_scale has shape {scale} for rows of {shape[1]}")
    found.expect(_PACKED, "weight_scale", (shape[0], groups))
    if "weight_g_idx" in found.names:
        found.expect(_PACKED, "weight_g_idx", shape[1:])
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


def _rows() -> Iterator[Scheme]:
    optional, methods = frozenset({"zero_point"}), frozenset({_METHOD})
    yield Scheme(
        _INT,
        ".weight",
        _WORD8,
        lambda found: _is_compressed(found) and found.dtype("weight") == "I8",
        _understand_int,
        optional,
        methods=methods,
        dtypes={"scale": FLOATS, "zero_point": ("I8", *FLOATS)},
    )
    yield Scheme(
        _MXFP8,
        ".weight",
        _WORD8,
        _is_mxfp8,
        _understand_mxfp8,
        optional,
        methods=methods,
        dtypes={"scale": EXPONENTS},
    )
    yield Scheme(
        _FLOAT,
        ".weight",
        _WORD8,
        lambda found: _is_compressed(found) and found.dtype("weight") in FLOATS8,
        lambda found: _understand_float(found, _FLOAT),
        optional,
        methods=methods,
        dtypes={"scale": FLOATS, "zero_point": (*FLOATS, *FLOATS8)},
    )
    for scheme, bits in ((_MXFP6, 6), (_MXFP4, 4)):
        yield Scheme(
            scheme,
            ".weight_packed",
            _BYTES,
            lambda found, scheme=scheme, bits=bits: _is_mxfp(found, scheme, bits),  # type: ignore[misc]
            lambda found, scheme=scheme, bits=bits: _understand_mxfp(found, scheme, bits),  # type: ignore[misc]
            methods=methods,
            dtypes={"scales": EXPONENTS},
        )
    yield Scheme(
        _NVFP4,
        ".weight_packed",
        {
            "weight": (".weight_packed",), "scale": (".weight_scale",),
            "global_scale": (".weight_global_scale",),
        },
        lambda found: found.dtype("weight") == "U8",
        lambda found: understand_nvfp4(found, _NVFP4),
        methods=methods,
        dtypes={"scale": ("F8_E4M3",), "global_scale": FLOATS},
    )  # fmt: skip
    yield Scheme(
        _PACKED,
        ".weight_packed",
        {
            "weight_packed": (".weight_packed",), "weight_scale": (".weight_scale",),
            "weight_shape": (".weight_shape",), "weight_zero_point": (".weight_zero_point",),
            "weight_g_idx": (".weight_g_idx",),
        },
        lambda found: found.dtype("weight_packed") == "I32",
        _understand_packed,
        frozenset({"weight_zero_point", "weight_g_idx"}),
        methods=methods,
        dtypes={
            "weight_scale": FLOATS, "weight_shape": WHOLE, "weight_zero_point": ("I32", "I8"),
            "weight_g_idx": ("I32", "I64"),
        },
    )  # fmt: skip


COMPRESSED_SCHEMES: tuple[Scheme, ...] = tuple(_rows())
