"""Rows of the table of schemes: GPTQ, AWQ, HQQ and MLX's affine mode."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from loratools.codecs.float4 import MXFP4Weight, NVFP4Weight
from loratools.codecs.fp8 import FP8Weight
from loratools.codecs.hqq import HQQWeight
from loratools.codecs.int_words import AWQWeight, GPTQWeight
from loratools.codecs.mlx_affine import MLXWeight
from loratools.codecs.packed import PackedWeight
from loratools.codecs.scheme_records import FLOATS, WHOLE, Found, Scheme, Understood, always

# ── words of 32 bits ──

_GPTQ_BITS = (2, 3, 4, 8)


def _is_gptq(found: Found) -> bool:
    # AWQ packs along the outputs, so its words are fewer than its scales.
    method = found.config.get("quant_method")
    if method in ("gptq", "awq"):
        return bool(method == "gptq")
    if "scales" not in found.names or "g_idx" in found.names:
        return True
    return found.shape("qweight")[1:] == found.shape("scales")[1:]


def _understand_gptq(found: Found) -> Understood:
    for part in ("qweight", "qzeros", "scales"):
        found.expect_rank("gptq", part, 2)
    words, out = found.shape("qweight")
    groups = found.shape("scales")[0]
    bits = found.number("gptq", found.config, "bits", among=_GPTQ_BITS)
    bits = bits or found.shape("qzeros")[1] * 32 // out
    if bits not in _GPTQ_BITS:
        raise found.fault("gptq", f".qzeros has shape {found.shape('qzeros')}")
    columns = words * 32 // bits
    found.expect("gptq", "scales", (groups, out))
    found.expect("gptq", "qzeros", (groups, out * bits // 32))
    size = _group_size(found, columns, groups)
    step = _zero_step(found)

    def build(parts: Mapping[str, Tensor]) -> PackedWeight:
        listed = parts.get("g_idx")
        order = torch.arange(columns, dtype=torch.int32) // size if listed is None else listed
        return GPTQWeight((out, columns), {**parts, "g_idx": order}, bits, step)

    return (out, columns), build, "F16"


def _group_size(found: Found, columns: int, groups: int) -> int:
    """Return how many inputs share a scale, which the number of scales has to bear out."""
    size = found.number("gptq", found.config, "group_size") or columns // groups
    size = columns if size < 1 else min(size, columns)
    if "g_idx" in found.names:
        found.expect("gptq", "g_idx", (columns,))
    if -(-columns // size) != groups:
        raise found.fault(
            "gptq", f".scales has {groups} groups for {columns} inputs by group_size {size}"
        )
    return size


def _zero_step(found: Found) -> int:
    layout = str(found.config.get("checkpoint_format") or "gptq")
    steps = {"gptq": 1, "gptq_v2": 0}
    if layout not in steps or found.config.get("is_marlin_format"):
        raise found.unknown("gptq", f"in the {layout} layout")
    return steps[layout]


def _understand_awq(found: Found) -> Understood:
    for part in ("qweight", "qzeros", "scales"):
        found.expect_rank("awq", part, 2)
    found.number("awq", found.config, "bits", among=(4,))
    columns, words = found.shape("qweight")
    groups = found.shape("scales")[0]
    version = str(found.config.get("version") or "gemm").lower()
    if version != "gemm":
        raise found.unknown("awq", f"in the {version!r} layout")
    size = found.number("awq", found.config, "group_size")
    if columns % groups or (size > 0 and columns != groups * size):
        said = f" by group_size {size}" if size > 0 else ""
        raise found.fault("awq", f".scales has {groups} groups for {columns} inputs{said}")
    found.expect("awq", "scales", (groups, words * 8))
    found.expect("awq", "qzeros", (groups, words))
    shape = (words * 8, columns)
    return shape, lambda parts: AWQWeight(shape, parts, columns // groups), "F16"


# ── HQQ ──

_HQQ_PER_WORD = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def _understand_hqq(found: Found) -> Understood:
    shape = found.sizes("shape")
    bits, size, axis = (_one(found, part) for part in ("nbits", "group_size", "axis"))
    if bits not in _HQQ_PER_WORD:
        raise found.unknown("hqq", f"with nbits {bits}")
    count = math.prod(shape)
    if axis not in (0, 1) or size < 1 or len(shape) != 2 or count < 1 or count % size:
        raise found.fault("hqq", f"{shape} is no matrix of groups of {size} along axis {axis}")
    groups = count // size
    height, width = (groups, size) if axis else (size, groups)
    found.expect("hqq", "W_q", (-(-height // _HQQ_PER_WORD[bits]), width))
    for part in ("scale", "zero"):
        found.expect("hqq", part, (groups, 1) if axis else (1, groups))
    return shape, lambda parts: HQQWeight(shape, parts, bits, axis, size), None


def _one(found: Found, part: str) -> int:
    values = found.sizes(part)
    if len(values) != 1:
        raise found.fault("hqq", f".{part} has shape {found.shape(part)}")
    return values[0]


# ── MLX ──

_MLX = "mlx affine"
_MLX_BITS, _MLX_GROUPS = (2, 3, 4, 5, 6, 8), (16, 32, 64, 128)


def _understand_mlx(found: Found) -> Understood:
    config = _mlx_words(found)
    if str(config.get("mode") or "affine") != "affine":
        raise found.unknown(_MLX, f"in the {config['mode']} mode")
    for part in ("weight", "scales"):
        found.expect_rank(_MLX, part, 2, 3)
    bits = found.number(_MLX, config, "bits", among=_MLX_BITS)
    size = found.number(_MLX, config, "group_size", among=_MLX_GROUPS) or 64
    *leading, words = found.shape("weight")
    columns = found.shape("scales")[-1] * size
    bits = bits or words * 32 // columns
    if words * 32 != columns * bits or bits not in _MLX_BITS:
        raise found.fault(_MLX, f"{words} words a row do not hold {columns} values of {bits} bits")
    for part in ("scales", "biases"):
        found.expect(_MLX, part, (*leading, columns // size))
    shape = (*leading, columns)
    return shape, lambda parts: MLXWeight(shape, parts, bits), found.dtype("scales")


def _mlx_words(found: Found) -> Mapping[str, Any]:
    """Return what the config says of a module, or of all of them."""
    own = found.config.get(found.module)
    return own if isinstance(own, Mapping) else found.config


def _mxfp4(shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> PackedWeight:
    blocks = parts["blocks"].view(torch.uint8)
    return MXFP4Weight(shape, {"blocks": blocks, "scales": parts["scales"]})


def _nvfp4(shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> PackedWeight:
    scale = parts["scales"].view(torch.float8_e4m3fn)
    return NVFP4Weight(shape, {"weight": parts["weight"].view(torch.uint8), "scale": scale})


def _mxfp8(shape: tuple[int, ...], parts: Mapping[str, Tensor]) -> PackedWeight:
    weight = parts["weight"].view(torch.float8_e4m3fn)
    return FP8Weight(shape, {"weight": weight, "scale": parts["scales"]}, (1, 32))


_MLX_MODES = {"mxfp4": (4, 32, _mxfp4), "nvfp4": (4, 16, _nvfp4), "mxfp8": (8, 32, _mxfp8)}
"""Mode → bits, inputs per scale, and what makes the weight of words that are bytes in a row."""


def _understand_mlx_mode(found: Found, mode: str) -> Understood:
    scheme = f"mlx {mode}"
    bits, size, make = _MLX_MODES[mode]
    config = _mlx_words(found)
    found.number(scheme, config, "bits", among=(bits,))
    found.number(scheme, config, "group_size", among=(size,))
    codes = next(part for part in found.names if part != "scales")
    for part in found.names:
        found.expect_rank(scheme, part, 2, 3)
    *leading, words = found.shape(codes)
    columns = words * 32 // bits
    if columns % size:
        raise found.fault(scheme, f"rows of {columns} are no groups of {size}")
    shape = (*leading, columns)
    found.expect(scheme, "scales", (*leading, columns // size))
    return shape, lambda parts: make(shape, parts), "BF16"


def _mlx_mode(mode: str) -> Scheme:
    codes = "blocks" if mode == "mxfp4" else "weight"
    return Scheme(
        f"mlx {mode}",
        ".weight",
        {codes: (".weight",), "scales": (".scales",)},
        lambda found: found.dtype(codes) == "U32" and _mlx_words(found).get("mode") == mode,
        lambda found: _understand_mlx_mode(found, mode),
        methods=frozenset({"mlx"}),
        dtypes={"scales": ("U8",)},
    )


INT_SCHEMES: tuple[Scheme, ...] = (
    Scheme(
        "gptq",
        ".qweight",
        {
            "qweight": (".qweight",), "qzeros": (".qzeros",), "scales": (".scales",),
            "g_idx": (".g_idx",),
        },
        _is_gptq,
        _understand_gptq,
        frozenset({"g_idx"}),
        methods=frozenset({"gptq"}),
        dtypes={"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS, "g_idx": ("I32", "I64")},
    ),
    Scheme(
        "awq",
        ".qweight",
        {"qweight": (".qweight",), "qzeros": (".qzeros",), "scales": (".scales",)},
        always,
        _understand_awq,
        methods=frozenset({"awq"}),
        dtypes={"qweight": ("I32",), "qzeros": ("I32",), "scales": FLOATS},
    ),
    Scheme(
        "hqq",
        ".W_q",
        {
            "W_q": (".W_q",), "scale": (".scale",), "zero": (".zero",), "shape": (".shape",),
            "nbits": (".nbits",), "group_size": (".group_size",), "axis": (".axis",),
        },
        always,
        _understand_hqq,
        methods=frozenset({"hqq"}),
        dtypes={
            "W_q": ("U8", "I32"), "scale": FLOATS, "zero": FLOATS, "shape": WHOLE,
            "nbits": WHOLE, "group_size": WHOLE, "axis": WHOLE,
        },
    ),
    *(_mlx_mode(mode) for mode in _MLX_MODES),
    Scheme(
        _MLX,
        ".weight",
        {"weight": (".weight",), "scales": (".scales",), "biases": (".biases",)},
        lambda found: found.dtype("weight") == "U32",
        _understand_mlx,
        methods=frozenset({"mlx"}),
        dtypes={"scales": FLOATS, "biases": FLOATS},
    ),
)  # fmt: skip
