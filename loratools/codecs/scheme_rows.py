"""One row for each way to store a quantised weight: how it is found, and what it is."""

from __future__ import annotations

import json
from collections.abc import Mapping

import torch
from torch import Tensor

from loratools.codecs.bnb4_weight import BnB4Weight
from loratools.codecs.compressed import PackQuantizedWeight
from loratools.codecs.float4 import MXFP4Weight, NVFP4Weight
from loratools.codecs.fp8 import FP8Weight
from loratools.codecs.hqq import HQQWeight
from loratools.codecs.int8_rows import Int8Weight
from loratools.codecs.int_words import AWQWeight, GPTQWeight
from loratools.codecs.mlx_affine import MLXWeight
from loratools.codecs.packed import PackedWeight
from loratools.codecs.scheme_records import Build, Found, Scheme
from loratools.errors import UnsupportedError

Understood = tuple[tuple[int, ...], Build, str | None]

# ── bitsandbytes ──

_STATES = tuple(f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))


def _understand_bnb4(found: Found) -> Understood:
    state = json.loads(bytes(found.value("state").tolist()).decode("utf-8"))
    shape = tuple(int(size) for size in state["shape"])
    nested = int(state.get("nested_blocksize") or 0)
    offset = float(state.get("nested_offset") or 0.0)
    blocksize = int(state["blocksize"])
    count = torch.Size(shape).numel()
    if found.shape("absmax") != (-(-count // blocksize),):
        raise found.fault(
            "bitsandbytes 4-bit",
            f"absmax has shape {found.shape('absmax')} for {count} weights by {blocksize}",
        )
    if nested and "nested_absmax" not in found.names:
        raise found.fault("bitsandbytes 4-bit", "there is no .weight.nested_absmax")

    def build(parts: Mapping[str, Tensor]) -> PackedWeight:
        return BnB4Weight(shape, parts, blocksize, nested, offset)

    return shape, build, _float_word(state.get("dtype"))


def _understand_int8(found: Found) -> Understood:
    shape = found.shape("weight")
    if found.shape("SCB") != shape[:1]:
        raise found.fault("int8", f"SCB has shape {found.shape('SCB')} for a weight of {shape}")
    return shape, lambda parts: Int8Weight(shape, parts), None


# ── integers in words ──


def _is_gptq(found: Found) -> bool:
    # AWQ packs along the outputs, so its words are fewer than its scales.
    return found.shape("qweight")[1:] == found.shape("scales")[1:]


def _understand_gptq(found: Found) -> Understood:
    words, out = found.shape("qweight")
    groups = found.shape("scales")[0]
    bits = int(found.config.get("bits") or 0) or found.shape("qzeros")[1] * 32 // out
    columns = words * 32 // bits
    if found.shape("qzeros") != (groups, out * bits // 32):
        raise found.fault("gptq", f"qzeros has shape {found.shape('qzeros')}")
    step = 0 if found.config.get("checkpoint_format") == "gptq_v2" else 1
    size = int(found.config.get("group_size") or -1)
    size = columns if size < 1 else size

    def build(parts: Mapping[str, Tensor]) -> PackedWeight:
        listed = parts.get("g_idx")
        order = torch.arange(columns, dtype=torch.int32) // size if listed is None else listed
        return GPTQWeight((out, columns), {**parts, "g_idx": order}, bits, step)

    return (out, columns), build, "F16"


def _understand_awq(found: Found) -> Understood:
    columns, words = found.shape("qweight")
    groups, out = found.shape("scales")
    if out != words * 8 or columns % groups:
        raise found.fault("awq", f"scales have shape {(groups, out)} for {words} words a row")
    version = str(found.config.get("version", "gemm")).lower()
    if version != "gemm":
        raise UnsupportedError(
            f"{found.module}: AWQ in the {version!r} layout, and only gemm is known",
            hint="merge into the 16-bit original of this base",
        )
    return (out, columns), lambda p: AWQWeight((out, columns), p, columns // groups), "F16"


# ── floats of 8 and 4 bits ──

_FP8_SCALES = (
    ".weight_scale_inv", ".weight_scale", ".scale", ".scale_weight", ".qscale_weight",
)  # fmt: skip


def _is_fp8(found: Found) -> bool:
    if not found.dtype("weight").startswith("F8_E") or len(found.shape("weight")) < 2:
        return False
    # Without a word of quantisation a float8 tensor is just narrow (ComfyUI's cast files).
    return "scale" in found.names or bool(found.config)


def _understand_fp8(found: Found) -> Understood:
    shape, scale = found.shape("weight"), found.shape("scale")
    block = _fp8_block(found, shape, scale)
    return shape, lambda parts: FP8Weight(shape, parts, block), None


def _fp8_block(
    found: Found, shape: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[int, int] | None:
    """Return the block that shares a scale, or None for one per tensor or row."""
    count = torch.Size(scale).numel()
    if count == 1 or (
        count == torch.Size(shape[:-1]).numel() and scale[-1:] in ((1,), shape[-2:-1])
    ):
        return None
    size = found.config.get("weight_block_size") or (128, 128)
    block = (int(size[0]), int(size[1]))
    expected = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    if scale != expected:
        raise found.fault(
            "fp8", f"its scale has shape {scale} where blocks of {block} make {expected}"
        )
    return block


def _understand_mxfp4(found: Found) -> Understood:
    *leading, groups, size = found.shape("blocks")
    if found.shape("scales") != (*leading, groups) or size != 16:
        raise found.fault("mxfp4", f"scales have shape {found.shape('scales')}")
    shape = (*leading, groups * 32)
    return shape, lambda parts: MXFP4Weight(shape, parts), "BF16"


def _understand_packed_mxfp4(found: Found) -> Understood:
    rows, packed = found.shape("blocks")
    if found.shape("scales") != (rows, packed // 16):
        raise found.fault("mxfp4", f"its scale has shape {found.shape('scales')}")
    return (rows, packed * 2), lambda parts: MXFP4Weight((rows, packed * 2), parts), "BF16"


def _understand_nvfp4(found: Found) -> Understood:
    rows, packed = found.shape("weight")
    if found.shape("scale") != (rows, packed // 8):
        raise found.fault("nvfp4", f"its scale has shape {found.shape('scale')}")
    return (rows, packed * 2), lambda parts: NVFP4Weight((rows, packed * 2), parts), "BF16"


# ── the others ──


def _understand_pack_quantized(found: Found) -> Understood:
    shape = tuple(int(size) for size in found.value("weight_shape").flatten().tolist())
    words = found.shape("weight_packed")[1]
    bits = _compressed_bits(found) or words * 32 // shape[1]
    if found.shape("weight_packed") != (shape[0], -(-shape[1] * bits // 32)):
        raise found.fault(
            "compressed-tensors pack-quantized",
            f"{words} words a row do not hold {shape[1]} values of {bits} bits",
        )
    return shape, lambda parts: PackQuantizedWeight(shape, parts, bits), None


def _compressed_bits(found: Found) -> int:
    """Return the bits that the config's only group of weights has, or 0."""
    groups = found.config.get("config_groups") or {}
    bits = {int(group["weights"]["num_bits"]) for group in groups.values() if group.get("weights")}
    return bits.pop() if len(bits) == 1 else 0


def _understand_hqq(found: Found) -> Understood:
    words = {part: found.value(part) for part in ("shape", "nbits", "group_size", "axis")}
    shape = tuple(int(size) for size in words.pop("shape").flatten().tolist())
    bits, size, axis = (int(words[name]) for name in ("nbits", "group_size", "axis"))
    return shape, lambda parts: HQQWeight(shape, parts, bits, axis, size), None


def _understand_mlx(found: Found) -> Understood:
    *leading, words = found.shape("weight")
    own = found.config.get(found.module)
    config = own if isinstance(own, Mapping) else found.config
    bits = int(config.get("bits") or 0)
    size = int(config.get("group_size") or 64)
    columns = found.shape("scales")[-1] * size
    bits = bits or words * 32 // columns
    if words * 32 != columns * bits:
        raise found.fault(
            "mlx affine", f"{words} words a row do not hold {columns} values of {bits} bits"
        )
    shape = (*leading, columns)
    return shape, lambda parts: MLXWeight(shape, parts, bits), found.dtype("scales")


_FLOAT_WORDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def _float_word(name: object) -> str | None:
    return _FLOAT_WORDS.get(str(name).removeprefix("torch."))


def _always(found: Found) -> bool:
    return True


SCHEMES: tuple[Scheme, ...] = (
    *(
        Scheme(
            "bitsandbytes 4-bit",
            state,
            {
                "state": (state,), "weight": (".weight",), "absmax": (".weight.absmax",),
                "quant_map": (".weight.quant_map",), "nested_absmax": (".weight.nested_absmax",),
                "nested_quant_map": (".weight.nested_quant_map",),
            },
            _always,
            _understand_bnb4,
            frozenset({"nested_absmax", "nested_quant_map"}),
        )
        for state in _STATES
    ),
    Scheme(
        "bitsandbytes int8",
        ".SCB",
        {"weight": (".weight",), "SCB": (".SCB",), "format": (".weight_format",)},
        _always,
        _understand_int8,
        frozenset({"format"}),
    ),
    Scheme(
        "gptq",
        ".qweight",
        {
            "qweight": (".qweight",), "qzeros": (".qzeros",), "scales": (".scales",),
            "g_idx": (".g_idx",),
        },
        lambda found: "scales" not in found.names or _is_gptq(found),
        _understand_gptq,
        frozenset({"g_idx"}),
    ),
    Scheme(
        "awq",
        ".qweight",
        {"qweight": (".qweight",), "qzeros": (".qzeros",), "scales": (".scales",)},
        _always,
        _understand_awq,
    ),
    Scheme(
        "fp8",
        ".weight",
        {"weight": (".weight",), "scale": _FP8_SCALES},
        _is_fp8,
        _understand_fp8,
    ),
    Scheme(
        "mxfp4",
        "_blocks",
        {"blocks": ("_blocks",), "scales": ("_scales",)},
        lambda found: found.dtype("blocks") == "U8",
        _understand_mxfp4,
        weight="",
    ),
    Scheme(
        "compressed-tensors mxfp4",
        ".weight_packed",
        {"blocks": (".weight_packed",), "scales": (".weight_scale",)},
        lambda found: found.dtype("blocks") == "U8"
        and found.specs.get("scales") is not None
        and found.dtype("scales") in ("U8", "F8_E8M0"),
        _understand_packed_mxfp4,
    ),
    Scheme(
        "compressed-tensors nvfp4",
        ".weight_packed",
        {
            "weight": (".weight_packed",), "scale": (".weight_scale",),
            "global_scale": (".weight_global_scale",),
        },
        lambda found: found.dtype("weight") == "U8",
        _understand_nvfp4,
    ),
    Scheme(
        "nvfp4",
        ".weight",
        {
            "weight": (".weight",), "scale": (".weight_scale",), "scale_2": (".weight_scale_2",),
        },
        lambda found: found.dtype("weight") == "U8" and "scale_2" in found.names,
        _understand_nvfp4,
    ),
    Scheme(
        "compressed-tensors pack-quantized",
        ".weight_packed",
        {
            "weight_packed": (".weight_packed",), "weight_scale": (".weight_scale",),
            "weight_shape": (".weight_shape",), "weight_zero_point": (".weight_zero_point",),
            "weight_g_idx": (".weight_g_idx",),
        },
        lambda found: found.dtype("weight_packed") == "I32",
        _understand_pack_quantized,
        frozenset({"weight_zero_point", "weight_g_idx"}),
    ),
    Scheme(
        "hqq",
        ".W_q",
        {
            "W_q": (".W_q",), "scale": (".scale",), "zero": (".zero",), "shape": (".shape",),
            "nbits": (".nbits",), "group_size": (".group_size",), "axis": (".axis",),
        },
        _always,
        _understand_hqq,
    ),
    Scheme(
        "mlx affine",
        ".weight",
        {"weight": (".weight",), "scales": (".scales",), "biases": (".biases",)},
        lambda found: found.dtype("weight") == "U32" and "scales" in found.names,
        _understand_mlx,
    ),
)  # fmt: skip
"""In order of trial: the first row that a module fits is its scheme."""
