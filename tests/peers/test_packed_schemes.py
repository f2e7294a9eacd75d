"""Packed weights against the libraries that define them, element by element and byte by byte."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from loratools.codecs import bnb4
from loratools.codecs.bnb4_weight import quantise_bnb4
from loratools.codecs.compressed import PackQuantizedWeight
from loratools.codecs.float4 import MXFP4Weight, NVFP4Weight
from loratools.codecs.int8_rows import quantise_int8
from loratools.codecs.mlx_affine import quantise_mlx

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
