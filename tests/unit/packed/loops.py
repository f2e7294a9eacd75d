"""Quantised weights with random codes, and what they decode to by loops over single elements."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.codecs.bnb4_weight import BnB4Weight, quantise_bnb4
from loratools.codecs.compressed import PackQuantizedWeight
from loratools.codecs.float4 import MXFP4Weight, NVFP4Weight
from loratools.codecs.float6 import MXFP6Weight
from loratools.codecs.fp8 import FP8Weight
from loratools.codecs.hqq import HQQWeight
from loratools.codecs.int4_pairs import Int4PairsWeight
from loratools.codecs.int8_rows import Int8Weight
from loratools.codecs.int_blocks import IntBlocksWeight
from loratools.codecs.int_words import AWQWeight, GPTQWeight
from loratools.codecs.mlx_affine import MLXWeight
from loratools.codecs.packed import PackedWeight

FP4 = (0, 0.5, 1, 1.5, 2, 3, 4, 6)


@dataclass(frozen=True)
class Case:
    """A weight and its element (row, column), in float64, by its own reading of the parts."""

    weight: PackedWeight
    element: Callable[[int, int], float]


def _words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).to(torch.int32)


def _bits(words: list[int], start: int, width: int) -> int:
    """Read ``width`` bits of a little-endian stream of 32-bit words."""
    stream = sum((word & 0xFFFFFFFF) << (32 * i) for i, word in enumerate(words))
    return (stream >> start) & (2**width - 1)


def gptq(bits: int, zero_step: int, *, act_order: bool) -> Case:
    out, ins, groups = 32, 64, 2
    order = torch.randperm(ins) if act_order else torch.arange(ins)
    parts = {
        "qweight": _words(ins * bits // 32, out),
        "qzeros": _words(groups, out * bits // 32),
        "scales": torch.rand(groups, out).half(),
        "g_idx": (order // (ins // groups)).int(),
    }

    def element(row: int, column: int) -> float:
        group = int(parts["g_idx"][column])
        code = _bits(parts["qweight"][:, row].tolist(), column * bits, bits)
        zero = _bits(parts["qzeros"][group].tolist(), row * bits, bits) + zero_step
        return (code - zero) * float(parts["scales"][group, row])

    return Case(GPTQWeight((out, ins), parts, bits, zero_step), element)


def awq() -> Case:
    out, ins, size = 16, 64, 32
    parts = {
        "qweight": _words(ins, out // 8),
        "qzeros": _words(ins // size, out // 8),
        "scales": torch.rand(ins // size, out).half(),
    }
    nibble = {0: 0, 1: 4, 2: 1, 3: 5, 4: 2, 5: 6, 6: 3, 7: 7}

    def read(words: Tensor, row: int) -> int:
        return (int(words[row // 8]) >> (4 * nibble[row % 8])) & 15

    def element(row: int, column: int) -> float:
        group = column // size
        code, zero = read(parts["qweight"][column], row), read(parts["qzeros"][group], row)
        return (code - zero) * float(parts["scales"][group, row])

    return Case(AWQWeight((out, ins), parts, size), element)


def fp8(shape: tuple[int, ...], block: tuple[int, int] | None, dtype: torch.dtype) -> Case:
    out, ins = shape[-2:]
    weight = torch.randn(shape).to(dtype)
    if block:
        sizes = (*shape[:-2], -(-out // block[0]), -(-ins // block[1]))
        scale = torch.rand(sizes)
    else:
        scale = torch.rand(out, 1)

    def element(row: int, column: int) -> float:
        index = (row // out,) if len(shape) == 3 else ()
        value = float(weight[(*index, row % out, column)])
        if block is None:
            return value * float(scale[row, 0])
        return value * float(scale[(*index, row % out // block[0], column // block[1])])

    return Case(FP8Weight(shape, {"weight": weight, "scale": scale}, block), element)


def fp8_exponents() -> Case:
    weight, scale = torch.randn(8, 64).to(torch.float8_e4m3fn), torch.randint(110, 130, (1, 2))
    parts = {"weight": weight, "scale": scale.to(torch.uint8)}

    def element(row: int, column: int) -> float:
        return float(weight[row, column]) * 2.0 ** (int(scale[0, column // 32]) - 127)

    return Case(FP8Weight((8, 64), parts, (128, 32)), element)


def fp8_groups_of_exponents() -> Case:
    weight, scale = torch.randn(8, 64).to(torch.float8_e4m3fn), torch.randint(110, 130, (8, 2))
    parts = {"weight": weight, "scale": scale.to(torch.uint8)}

    def element(row: int, column: int) -> float:
        return float(weight[row, column]) * 2.0 ** (int(scale[row, column // 32]) - 127)

    return Case(FP8Weight((8, 64), parts, (1, 32)), element)


def int8() -> Case:
    codes = torch.randint(-127, 128, (6, 20), dtype=torch.int8)
    scale = torch.rand(6)
    weight = Int8Weight((6, 20), {"weight": codes, "SCB": scale})
    return Case(weight, lambda row, column: int(codes[row, column]) * float(scale[row]) / 127)


def int_blocks(shape: tuple[int, ...], block: tuple[int, int] | None, bits: int = 8) -> Case:
    """With zeros; without a block one scale for each row."""
    out, ins = shape[-2:]
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, shape, dtype=torch.int8)
    down, across = block or (1, ins)
    sizes = (*shape[:-2], -(-out // down), -(-ins // across))
    scale, zero = torch.rand(sizes), torch.randint(-half, half, sizes, dtype=torch.int8)

    def element(row: int, column: int) -> float:
        leading = (row // out,) if len(shape) == 3 else ()
        index, place = (*leading, row % out, column), (row % out // down, column // across)
        step = float(scale[(*leading, *place)])
        return (int(codes[index]) - int(zero[(*leading, *place)])) * step

    parts = {"weight": codes, "scale": scale, "zero_point": zero}
    return Case(IntBlocksWeight(shape, parts, block, bits), element)


def int_whole() -> Case:
    codes, scale = torch.randint(-128, 128, (6, 20), dtype=torch.int8), torch.rand(1)
    weight = IntBlocksWeight((6, 20), {"weight": codes, "scale": scale}, None)
    return Case(weight, lambda row, column: int(codes[row, column]) * float(scale))


def int4_pairs(shape: tuple[int, ...]) -> Case:
    *leading, out, ins = shape
    packed = torch.randint(-128, 128, (*leading, out, ins // 2), dtype=torch.int8)
    scale, zero = torch.rand(*leading, ins // 16, out), torch.randn(*leading, ins // 16, out)

    def element(row: int, column: int) -> float:
        index = (row // out,) if leading else ()
        byte = int(packed[(*index, row % out, column // 2)]) & 0xFF
        code = byte >> 4 if column % 2 else byte & 15
        place = (*index, column // 16, row % out)
        return (code - 16 if code > 7 else code) * float(scale[place]) + float(zero[place])

    parts = {"weight": packed, "scale": scale, "zero_point": zero}
    return Case(Int4PairsWeight(shape, parts), element)


def mxfp6() -> Case:
    blocks = torch.randint(0, 256, (6, 48), dtype=torch.uint8)
    scales = torch.randint(118, 130, (6, 2), dtype=torch.uint8)

    def element(row: int, column: int) -> float:
        triple = blocks[row, column // 4 * 3 :][:3].tolist()
        code = (sum(b << (8 * i) for i, b in enumerate(triple)) >> (6 * (column % 4))) & 63
        exponent, fraction = (code >> 3) & 3, code & 7
        size = 2.0 ** max(exponent - 1, 0) * ((exponent > 0) + fraction / 8)
        step = 2.0 ** (int(scales[row, column // 32]) - 127)
        return math.copysign(size, -1 if code & 32 else 1) * step

    return Case(MXFP6Weight((6, 64), {"blocks": blocks, "scales": scales}), element)


def float8_cast(shape: tuple[int, ...], dtype: torch.dtype) -> Case:
    weight = torch.randn(shape).to(dtype)
    flat = weight.reshape(-1)
    packed = FP8Weight(shape, {"weight": weight})
    return Case(packed, lambda row, column: float(flat[row * packed.columns + column]))


def bnb4(kind: str, shape: tuple[int, int], *, nested: bool) -> Case:
    weight = quantise_bnb4(torch.randn(shape) * torch.rand(shape[0], 1), kind, 32, nested=nested)
    parts = weight.parts

    def element(row: int, column: int) -> float:
        place = row * shape[1] + column
        byte = int(parts["weight"].flatten()[place // 2])
        code = byte & 15 if place % 2 else byte >> 4
        scale = float(parts["absmax"][place // 32])
        if nested:
            outer = float(parts["nested_absmax"][place // 32 // 256])
            scale = float(parts["nested_quant_map"][int(scale)]) * outer + weight.nested_offset
        return float(parts["quant_map"][code]) * scale

    return Case(weight, element)


def bnb4_as_bfloat16() -> Case:
    """The same bytes in another storage type (``bnb_4bit_quant_storage``)."""
    case = bnb4("nf4", (4, 64), nested=False)
    assert isinstance(case.weight, BnB4Weight)
    viewed = {
        **case.weight.parts,
        "weight": case.weight.parts["weight"].view(-1).view(torch.bfloat16),
    }
    return Case(BnB4Weight((4, 64), viewed, 32), case.element)


def pack_quantized(bits: int, *, zeros: bool, reordered: bool) -> Case:
    out, ins, groups = 8, 64, 2
    parts = {
        "weight_packed": _words(out, -(-ins * bits // 32)),
        "weight_scale": torch.rand(out, groups).bfloat16(),
    }
    if zeros:
        parts["weight_zero_point"] = _words(-(-out * bits // 32), groups)
    listed = torch.randperm(ins) // (ins // groups) if reordered else torch.arange(ins) // 32
    if reordered:
        parts["weight_g_idx"] = listed

    def element(row: int, column: int) -> float:
        group, half = int(listed[column]), 2 ** (bits - 1)
        code = _bits(parts["weight_packed"][row].tolist(), column * bits, bits) - half
        if zeros:
            code -= _bits(parts["weight_zero_point"][:, group].tolist(), row * bits, bits) - half
        return code * float(parts["weight_scale"][row, group])

    return Case(PackQuantizedWeight((out, ins), parts, bits), element)


def mxfp4() -> Case:
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, 6, 3), dtype=torch.uint8)

    def element(row: int, column: int) -> float:
        expert, inner, block, place = row // 6, row % 6, column // 32, column % 32
        byte = int(blocks[expert, inner, block, place // 2])
        return _e2m1(byte >> 4 if place % 2 else byte & 15) * 2.0 ** (
            int(scales[expert, inner, block]) - 127
        )

    return Case(MXFP4Weight((2, 6, 96), {"blocks": blocks, "scales": scales}), element)


def mxfp4_in_rows() -> Case:
    """As compressed-tensors and torchao store it: a matrix, the bytes of a row side by side."""
    blocks = torch.randint(0, 256, (6, 48), dtype=torch.uint8)
    scales = torch.randint(110, 130, (6, 3), dtype=torch.uint8)

    def element(row: int, column: int) -> float:
        byte = int(blocks[row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
        return _e2m1(code) * 2.0 ** (int(scales[row, column // 32]) - 127)

    return Case(MXFP4Weight((6, 96), {"blocks": blocks, "scales": scales}), element)


def nvfp4(*, divided: bool) -> Case:
    weight = torch.randint(0, 256, (6, 32), dtype=torch.uint8)
    scale = (torch.rand(6, 4) * 20).to(torch.float8_e4m3fn)
    outer = torch.tensor(0.37)
    parts = {"weight": weight, "scale": scale, "global_scale" if divided else "scale_2": outer}

    def element(row: int, column: int) -> float:
        byte = int(weight[row, column // 2])
        code = byte >> 4 if column % 2 else byte & 15
        factor = 1 / float(outer) if divided else float(outer)
        return _e2m1(code) * float(scale[row, column // 16]) * factor

    return Case(NVFP4Weight((6, 64), parts), element)


def _e2m1(code: int) -> float:
    return math.copysign(FP4[code & 7], -1 if code & 8 else 1)


def hqq(bits: int, axis: int) -> Case:
    out, ins, size = 16, 32, 32
    groups = out * ins // size
    per_word = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}[bits]
    height = groups if axis == 1 else size
    stored = -(-height // per_word)
    dtype = torch.int32 if bits == 3 else torch.uint8
    high = 2 ** (bits * per_word)
    words = torch.randint(0, high, (stored, out * ins // height)).to(dtype)
    if height % per_word:
        # The last fields of the last part are padding, which is zero.
        keep = height - (per_word - 1) * stored
        words[keep:] &= ~(2**bits - 1)
    shape = (groups, 1) if axis == 1 else (1, groups)
    parts = {"W_q": words, "scale": torch.rand(shape), "zero": torch.rand(shape) * 4}

    def element(row: int, column: int) -> float:
        place = row * ins + column
        line, across = divmod(place, out * ins // height)
        shift = bits * (per_word - 1 - line // stored)
        code = (int(words[line % stored, across]) >> shift) & (2**bits - 1)
        group = line if axis == 1 else across
        scale, zero = float(parts["scale"].flatten()[group]), float(parts["zero"].flatten()[group])
        return (code - zero) * scale

    return Case(HQQWeight((out, ins), parts, bits, axis, size), element)


def mlx(bits: int, shape: tuple[int, ...]) -> Case:
    *leading, ins = shape
    words = _words(*leading, ins * bits // 32)
    parts = {
        "weight": words.view(torch.uint32),
        "scales": torch.rand(*leading, ins // 32),
        "biases": torch.randn(*leading, ins // 32),
    }
    rows = {name: part.view(-1, part.shape[-1]) for name, part in parts.items()}

    def element(row: int, column: int) -> float:
        code = _bits(words.view(-1, words.shape[-1])[row].tolist(), column * bits, bits)
        group = column // 32
        return code * float(rows["scales"][row, group]) + float(rows["biases"][row, group])

    return Case(MLXWeight(shape, parts, bits), element)


CASES: dict[str, Callable[[], Case]] = {
    **{
        f"gptq-{bits}-v{2 - step}{'-act-order' if order else ''}": (
            lambda bits=bits, step=step, order=order: gptq(bits, step, act_order=order)
        )
        for bits in (2, 3, 4, 8)
        for step, order in ((1, False), (0, True))
    },
    "awq": awq,
    "fp8-row": lambda: fp8((12, 20), None, torch.float8_e4m3fn),
    "fp8-block-576x7168": lambda: fp8((576, 7168), (128, 128), torch.float8_e4m3fn),
    "fp8-block-192-rows": lambda: fp8((192, 130), (128, 128), torch.float8_e4m3fn),
    "fp8-block-stacked": lambda: fp8((3, 20, 24), (16, 16), torch.float8_e4m3fn),
    "fp8-e5m2": lambda: fp8((12, 20), None, torch.float8_e5m2),
    "fp8-exponents": fp8_exponents,
    "fp8-exponents-32": fp8_groups_of_exponents,
    "fp8-groups": lambda: fp8((12, 64), (1, 16), torch.float8_e4m3fn),
    "fp8-cast": lambda: float8_cast((12, 20), torch.float8_e4m3fn),
    "fp8-cast-e5m2-filters": lambda: float8_cast((6, 4, 3, 3), torch.float8_e5m2),
    "fp8-cast-vector": lambda: float8_cast((20,), torch.float8_e4m3fn),
    "int8": int8,
    "int-whole": int_whole,
    "int-rows": lambda: int_blocks((6, 20), None),
    "int-groups": lambda: int_blocks((6, 64), (1, 16)),
    "int-blocks": lambda: int_blocks((20, 40), (16, 32)),
    "int-4-groups": lambda: int_blocks((6, 64), (1, 16), 4),
    "int-blocks-stacked": lambda: int_blocks((3, 20, 24), (16, 16)),
    "int4-pairs": lambda: int4_pairs((6, 64)),
    "int4-pairs-stacked": lambda: int4_pairs((3, 6, 32)),
    "mxfp6": mxfp6,
    **{
        f"{kind}{'-nested' if nested else ''}-{shape[1]}": (
            lambda kind=kind, shape=shape, nested=nested: bnb4(kind, shape, nested=nested)
        )
        for kind in ("nf4", "fp4")
        for shape in ((6, 64), (6, 50), (5, 33))
        for nested in (False, True)
    },
    "nf4-in-bfloat16": bnb4_as_bfloat16,
    **{
        f"pack-quantized-{bits}": (
            lambda bits=bits: pack_quantized(bits, zeros=bits % 2 == 0, reordered=bits == 4)
        )
        for bits in range(1, 9)
    },
    "mxfp4": mxfp4,
    "mxfp4-rows": mxfp4_in_rows,
    "nvfp4-modelopt": lambda: nvfp4(divided=False),
    "nvfp4-compressed-tensors": lambda: nvfp4(divided=True),
    **{
        f"hqq-{bits}-axis{axis}": (lambda bits=bits, axis=axis: hqq(bits, axis))
        for bits in (1, 2, 3, 4, 8)
        for axis in (0, 1)
    },
    **{f"mlx-{bits}": (lambda bits=bits: mlx(bits, (6, 64))) for bits in (2, 3, 4, 5, 6, 8)},
    "mlx-stacked": lambda: mlx(4, (2, 3, 64)),
}
