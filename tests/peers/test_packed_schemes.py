"""Packed weights against the libraries that define them, element by element and byte by byte."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.codecs import bnb4
from loratools.codecs.bnb4_weight import quantise_bnb4
from loratools.codecs.compressed import PackQuantizedWeight
from loratools.codecs.float4 import MXFP4Weight, NVFP4Weight
from loratools.codecs.int4_pairs import Int4PairsWeight
from loratools.codecs.int8_rows import quantise_int8
from loratools.codecs.mlx_affine import quantise_mlx
from loratools.codecs.packed import PackedWeight
from loratools.codecs.rounding import nearest_codes
from loratools.codecs.schemes import find_packed
from loratools.tensorfiles.dtypes import dtype_word

pytestmark = pytest.mark.peers

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(64, 64), (33, 65), (128, 4096), (7, 13), (1, 100)]


def uneven(*shape: int) -> Tensor:
    """Rows of different size, one of zeros and one constant."""
    torch.manual_seed(sum(shape))
    weight = torch.randn(shape) * torch.rand(shape[0], 1)
    weight[0] = 0.0
    weight[-1] = 0.25
    return weight


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("blocksize", [32, 64, 128, 256, 512, 1024, 2048, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_4_bit_is_bit_identical(kind: str, blocksize: int, nested: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    for shape in SHAPES:
        for dtype in DTYPES:
            weight = uneven(*shape).to(dtype)
            stored, state = functional.quantize_4bit(
                weight, blocksize=blocksize, quant_type=kind, compress_statistics=nested
            )
            ours = quantise_bnb4(weight.float(), kind, blocksize, nested=nested)
            assert torch.equal(ours.parts["weight"], stored)
            assert torch.equal(ours.parts["absmax"], state.absmax)
            assert torch.equal(ours.parts["quant_map"], state.code)
            if nested:
                assert torch.equal(ours.parts["nested_absmax"], state.state2.absmax)
                assert torch.equal(ours.parts["nested_quant_map"], state.state2.code)
                assert ours.nested_offset == float(state.offset)
            # bitsandbytes' CPU kernel takes blocks to end with the rows, which they do not; seen
            # as one row, its answer is right.
            state.shape = torch.Size([1, weight.numel()])
            if weight.numel() % blocksize == 0:
                theirs = functional.dequantize_4bit(stored, state).view(shape)
                assert torch.equal(ours.decode(0, shape[0]).to(dtype), theirs)


def test_blocks_over_the_ends_of_rows_are_right_where_bitsandbytes_is_not() -> None:
    """Its AVX-512 path, and no other, decodes 1152x4304 with an error of 0.25 instead of 0.09."""
    weight = uneven(1152, 4304)
    ours = quantise_bnb4(weight, "nf4", 64)
    decoded = ours.decode(0, 1152)
    flat = bnb4.decode(
        ours.parts["weight"].flatten(),
        ours.parts["absmax"],
        bnb4.levels("nf4"),
        64,
        weight.numel(),
    )
    assert torch.equal(decoded, flat.view(weight.shape))
    assert float((decoded - weight).norm() / weight.norm()) < 0.1


def test_bitsandbytes_int8_is_bit_identical() -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = uneven(48, 96).half()
    codes, scale, _ = functional.int8_vectorwise_quant(weight)
    ours = quantise_int8(weight.float())
    assert torch.equal(ours.parts["weight"], codes)
    assert torch.equal(ours.parts["SCB"], scale)
    theirs = functional.int8_vectorwise_dequant(codes, scale)
    assert torch.equal(ours.decode(0, 48), theirs)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx_affine_is_byte_identical(bits: int, group: int) -> None:
    mx = pytest.importorskip("mlx.core")
    weight = uneven(24, 256)
    weight[3, :group].abs_()
    theirs = mx.quantize(mx.array(weight.numpy()), group_size=group, bits=bits)
    ours = quantise_mlx(weight, bits, group)
    for name, array in zip(("weight", "scales", "biases"), theirs, strict=True):
        assert np.array_equal(ours.parts[name].numpy(), np.array(array))
    decoded = mx.dequantize(*theirs, group_size=group, bits=bits)
    assert np.array_equal(ours.decode(0, 24).numpy(), np.array(decoded))


@pytest.mark.parametrize("mode", ["mxfp4", "nvfp4", "mxfp8"])
def test_mlx_modes_of_floats_are_bit_identical(mode: str) -> None:
    mx = pytest.importorskip("mlx.core")
    words, scales = mx.quantize(mx.array(uneven(24, 256).numpy()), mode=mode)
    stored = {
        "weight": torch.from_numpy(np.array(words)),
        "scales": torch.from_numpy(np.array(scales)),
    }
    ours = read(stored, {"mode": mode})
    expected = mx.dequantize(words, scales, mode=mode, dtype=mx.float32)
    decoded = ours.decode(0, 24)
    assert np.array_equal(decoded.numpy(), np.array(expected))
    assert_codes_survive(ours, decoded)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_quantized_reads_what_compressed_tensors_packs(bits: int) -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    half = 2 ** (bits - 1)
    codes = torch.randint(-half, half, (16, 96), dtype=torch.int8)
    zeros = torch.randint(-half, half, (16, 3), dtype=torch.int8)
    scale = torch.rand(16, 3)
    parts = {
        "weight_packed": helpers.pack_to_int32(codes, bits),
        "weight_scale": scale,
        "weight_zero_point": helpers.pack_to_int32(zeros, bits, packed_dim=0),
    }
    wide = [part.double().repeat_interleave(32, 1) for part in (zeros, scale)]
    expected = (codes.double() - wide[0]) * wide[1]
    found = PackQuantizedWeight((16, 96), parts, bits).decode(0, 16)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_nvfp4_reads_what_compressed_tensors_packs() -> None:
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    packed = torch.randint(0, 256, (8, 32), dtype=torch.uint8)
    scale = (torch.rand(8, 4) * 10).to(torch.float8_e4m3fn)
    outer = torch.tensor([3.5])
    values = helpers.unpack_fp4_from_uint8(packed, 8, 64, dtype=torch.float32)
    expected = values * (scale.float() / outer).repeat_interleave(16, 1)
    parts = {"weight": packed, "scale": scale, "global_scale": outer}
    found = NVFP4Weight((8, 64), parts).decode(0, 8)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_mxfp4_reads_what_transformers_reads() -> None:
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(118, 130, (2, 6, 3), dtype=torch.uint8)
    theirs = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    ours = MXFP4Weight((2, 6, 96), {"blocks": blocks, "scales": scales}).decode(0, 12)
    # transformers turns the matrices of experts over after decoding.
    assert torch.equal(ours.view(2, 6, 96), theirs.transpose(1, 2))


# ── compressed-tensors: every format and strategy, as its own compressors write them ──

STRATEGIES: dict[str, dict[str, Any]] = {
    "tensor": {"strategy": "tensor"},
    "channel": {"strategy": "channel"},
    "group": {"strategy": "group", "group_size": 32},
    "block": {"strategy": "block", "block_structure": [16, 48]},
}
COMPRESSED = [
    *(
        (form, {"num_bits": bits, "type": "int", "symmetric": even, **STRATEGIES[strategy]})
        for form in ("int-quantized", "naive-quantized")
        for bits in (4, 8)
        for even in (True, False)
        for strategy in STRATEGIES
    ),
    *(
        ("pack-quantized", {"num_bits": bits, "type": "int", "symmetric": even, **how})
        for bits in (2, 3, 4, 8)
        for even in (True, False)
        for name, how in STRATEGIES.items()
        if name != "block"
    ),
    *(("float-quantized", {"num_bits": 8, "type": "float", **how}) for how in STRATEGIES.values()),
    ("mxfp8-quantized", {"num_bits": 8, "type": "float", **STRATEGIES["group"]}),
    ("mxfp6-pack-quantized", {"num_bits": 6, "type": "float", **STRATEGIES["group"]}),
    ("mxfp4-pack-quantized", {"num_bits": 4, "type": "float", **STRATEGIES["group"]}),
    (
        "nvfp4-pack-quantized",
        {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16},
    ),
]


def scales(form: str, weights: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Scales and zeros for a weight of SIZE, as they are before compressing."""
    rows, columns = SIZE
    down, across = weights.get("block_structure", (1, weights.get("group_size", columns)))
    shape = (-(-rows // down), -(-columns // across))
    if weights["strategy"] == "tensor":
        shape = (1,)
    parts = {"weight_scale": (0.005 + 0.02 * torch.rand(shape)).to(dtype)}
    if form.startswith("mx"):
        parts["weight_scale"] = torch.exp2(torch.randint(-7, -3, shape)).to(dtype)
    if form.startswith("nv"):
        parts["weight_scale"] = (4 * torch.rand(shape)).to(torch.float8_e4m3fn).float()
        parts["weight_global_scale"] = torch.tensor([37.0])
    if not weights.get("symmetric", True):
        parts["weight_zero_point"] = torch.randint(-2, 2, shape).to(torch.int8)
    return parts


SIZE = (40, 192)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("form", "weights"),
    COMPRESSED,
    ids=[f"{form}-{'-'.join(map(str, words.values()))}" for form, words in COMPRESSED],
)
def test_compressed_tensors_is_bit_identical(
    form: str, weights: dict[str, Any], dtype: torch.dtype
) -> None:
    compressors = pytest.importorskip("compressed_tensors.compressors")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    torch.manual_seed(0)
    arguments = quantization.QuantizationArgs(**weights)
    scheme = quantization.QuantizationScheme(targets=["Linear"], weights=arguments, format=form)
    compressor = compressors.BaseCompressor.get_value_from_registry(form)
    state = {"weight": 0.1 * torch.randn(SIZE), **scales(form, weights, dtype)}
    stored = {n: t.detach().contiguous() for n, t in compressor.compress(state, scheme).items()}
    expected = compressor.decompress(dict(stored), scheme)["weight"]
    config = {
        "quant_method": "compressed-tensors", "format": form,
        "config_groups": {"group_0": scheme.model_dump(mode="json")},
    }  # fmt: skip
    weight = read(stored, config)
    decoded = weight.decode(0, weight.rows)
    assert torch.equal(decoded.to(expected.dtype), expected)
    assert_codes_survive(weight, decoded)


def read(stored: Mapping[str, Tensor], config: dict[str, Any], **metadata: str) -> PackedWeight:
    """The only packed weight among the tensors of a module ``m``."""
    named = {f"m.{name}" if "." not in name else name: t for name, t in stored.items()}
    specs = {name: Spec(dtype_word(t.dtype), tuple(t.shape)) for name, t in named.items()}
    (packing,) = find_packed(specs, config, named.__getitem__, metadata)
    assert packing.weight == "m.weight"
    return packing.build({part: named[name] for part, name in packing.names.items()})


def assert_codes_survive(weight: PackedWeight, decoded: Tensor) -> None:
    """Coding the decoded weight again, and storing it, changes no byte."""
    before = {part: t.clone() for part, t in weight.parts.items()}
    codes = nearest_codes(decoded, weight.grid(0, weight.rows))
    for patch in weight.patches(codes, 0):
        patch.apply(weight.parts)
    for part, tensor in before.items():
        assert torch.equal(raw(tensor), raw(weight.parts[part])), part


def raw(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class Spec:
    dtype: str
    shape: tuple[int, ...]


# ── torchao, where it is installed ──


def torchao_weights() -> dict[str, Any]:
    """What makes a weight of each subclass that a CPU can make."""
    quantization = pytest.importorskip("torchao.quantization")
    group, tensor = quantization.PerGroup(32), quantization.PerTensor()
    intx = quantization.IntxWeightOnlyConfig
    return {
        "int8 rows": quantization.Int8WeightOnlyConfig(),
        "int8 groups": quantization.Int8WeightOnlyConfig(granularity=group),
        "int8 whole": quantization.Int8WeightOnlyConfig(granularity=tensor),
        "int8 activations": quantization.Int8DynamicActivationInt8WeightConfig(),
        "float8 rows": quantization.Float8WeightOnlyConfig(),
        "int4 groups": intx(weight_dtype=torch.int4, granularity=group),
        "int2 groups": intx(weight_dtype=torch.int2, granularity=group),
        "int3 rows": intx(weight_dtype=torch.int3, granularity=quantization.PerAxis(0)),
    }


TORCHAO = [
    "int8 rows", "int8 groups", "int8 whole", "int8 activations", "float8 rows", "int4 groups",
    "int2 groups", "int3 rows",
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", TORCHAO)
def test_torchao_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    config = torchao_weights()[name]
    quantization = pytest.importorskip("torchao.quantization")
    torch.manual_seed(0)
    layer = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False).to(dtype))
    quantization.quantize_(layer, config)
    assert_torchao(layer[0].weight.data)


@pytest.mark.parametrize("name", ["whole", "rows", "blocks", "mxfp8", "mxfp4", "nvfp4"])
def test_torchaos_floats_are_bit_identical(name: str) -> None:
    assert_torchao(torchao_float(name, 0.1 * torch.randn(256, 384).bfloat16()))


def torchao_float(name: str, weight: Tensor) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    nv = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    own = {
        "whole": granularity.PerTensor(), "rows": granularity.PerRow(),
        "blocks": granularity.PerBlock((128, 128)),
    }  # fmt: skip
    if name in own:
        return quantization.Float8Tensor.from_hp(weight, granularity=own[name])
    if name == "nvfp4":
        return nv.NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=torch.tensor(0.001))
    element = torch.float8_e4m3fn if name == "mxfp8" else torch.float4_e2m1fn_x2
    return mx.MXTensor.to_mx(weight, element, 32)


def assert_torchao(weight: Any) -> None:
    support = pytest.importorskip("torchao.prototype.safetensors.safetensors_support")
    stored, words = support.flatten_tensor_state_dict({"m.weight": weight})
    ours = read(stored, {"quant_method": "torchao"}, **words)
    decoded, expected = ours.decode(0, ours.rows), weight.dequantize()
    assert torch.equal(decoded.to(expected.dtype), expected)
    assert_codes_survive(ours, decoded)


def test_torchaos_int4_is_what_it_computes_with() -> None:
    """Its own quantiser needs a GPU's library; what it makes of codes is here without."""
    api = pytest.importorskip("torchao.prototype.gptq.api")
    codes = torch.randint(-8, 8, (24, 64), dtype=torch.int8)
    scale, zero = torch.rand(2, 24), torch.randn(2, 24)
    expected = api._int4_row_dequantize_zp(codes, scale, zero, 32)
    packed = (codes[:, 0::2] & 15) | (codes[:, 1::2] << 4)
    parts = {"weight": packed, "scale": scale, "zero_point": zero}
    found = Int4PairsWeight((24, 64), parts).decode(0, 24)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("nested", [False, True])
def test_a_bitsandbytes_model_that_was_cast_to_bfloat16(kind: str, nested: bool) -> None:
    """``model.to(bfloat16)`` rounds scales and the table of codes too; bytes stay."""
    functional = pytest.importorskip("bitsandbytes.functional")
    stored, state = functional.quantize_4bit(
        torch.randn(32, 64), blocksize=64, quant_type=kind, compress_statistics=nested
    )
    packed = {
        f"m.weight.{name}" if name else "m.weight": t
        for name, t in {"": stored, **state.as_dict(packed=True)}.items()
    }
    cast = {n: t.bfloat16() if t.dtype == torch.float32 else t for n, t in packed.items()}
    # The order in a file means nothing.
    ours = read(dict(sorted(cast.items(), reverse=True)), {"quant_method": "bitsandbytes"})
    rounded = functional.QuantState.from_dict(
        {n.removeprefix("m.weight."): t for n, t in cast.items() if n != "m.weight"},
        device=torch.device("cpu"),
    )
    absmax = rounded.absmax.float()
    if nested:
        inner = rounded.state2
        absmax = inner.code.float()[rounded.absmax.long()]
        absmax = absmax * inner.absmax.float().repeat_interleave(inner.blocksize)[: len(absmax)]
        absmax = absmax + rounded.offset.float()
    table = bnb4.levels(kind)
    flat = stored.flatten()
    codes = torch.stack([flat >> 4, flat & 15], 1).flatten().long()
    expected = table[codes].view(-1, 64) * absmax[:, None]
    torch.testing.assert_close(ours.decode(0, 32), expected.view(32, 64), rtol=1e-6, atol=1e-7)
