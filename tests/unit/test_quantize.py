"""Quantising and dequantising GGUF models, against gguf-py and the codecs, tensor by tensor."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from loratools.codecs.ggml import GGML_TYPES
from loratools.demo import make_base
from loratools.errors import InputError, OptionError, UnsupportedError
from loratools.quantize import dequantize_base, quantize_base
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_split import open_gguf
from loratools.tensorfiles.gguf_tensors import block_entry, map_tensors
from loratools.tensorfiles.gguf_types import ValueType
from loratools.tensorfiles.gguf_writing import save_gguf

from ..gguf_models import write_adapter, write_model

HALF = {"attn": "F16", "ffn": "BF16", "token_embd": "F32"}
MIX = {"attn": "Q4_K", "attn_v": "Q6_K", "ffn": "Q5_K", "ffn_down": "Q8_0", "token_embd": "Q4_0"}
MATTERS = {"blk.1.attn_v.weight", "blk.1.ffn_down.weight", "output.weight"}
"""What Q4_K_M gives Q6_K: the head, and values and downs of the last eighth of the blocks."""


def types(file: Path) -> dict[str, str]:
    return {name: t.type.name for name, t in read_gguf_header(file).tensors.items()}


def reference(file: Path) -> dict[str, np.ndarray]:
    """Every tensor in float32, read and decoded by gguf-py."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(
            tuple(reversed(tensor.shape.tolist()))
        )
        for tensor in gguf.GGUFReader(file).tensors
    }


def stored(file: Path) -> dict[str, np.ndarray]:
    """Every tensor's bytes, read by gguf-py."""
    return {
        t.name: np.ascontiguousarray(t.data).view(np.uint8).reshape(-1)
        for t in gguf.GGUFReader(file).tensors
    }


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("kind", ["q8_0", "Q4_0", "q5_1"])
def test_a_single_type_has_the_bytes_of_gguf_py(tmp_path: Path, kind: str) -> None:
    base = write_model(tmp_path / "base.gguf", HALF)
    quantize_base(base, tmp_path / "out.gguf", to=kind)
    weights, found, chosen = (
        reference(base),
        stored(tmp_path / "out.gguf"),
        types(tmp_path / "out.gguf"),
    )
    for name, weight in weights.items():
        # llama-quantize gives the head more bits, but where there are eight already.
        wanted = "F32" if "norm" in name else "Q6_K" if name == "output.weight" else kind.upper()
        wanted = "Q8_0" if kind == "q8_0" and wanted == "Q6_K" else wanted
        assert chosen[name] == wanted, name
        if wanted == "Q6_K":
            continue
        coded = gguf.quants.quantize(weight, gguf.GGMLQuantizationType[wanted])
        assert np.array_equal(coded.view(np.uint8).reshape(-1), found[name]), name


def test_a_mix_gives_what_matters_more(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", HALF)
    report = quantize_base(base, tmp_path / "out.gguf", to="q4_k_m")
    weights, found = reference(base), stored(tmp_path / "out.gguf")
    for name, kind in types(tmp_path / "out.gguf").items():
        wanted = "F32" if "norm" in name else "Q6_K" if name in MATTERS else "Q4_K"
        assert kind == wanted, name
        coded = GGML_TYPES[kind].codec.encode(torch.from_numpy(weights[name].copy()))
        assert np.array_equal(coded.flatten().numpy(), found[name]), name
    header = read_gguf_header(tmp_path / "out.gguf")
    assert header.word("general.file_type") == 15
    assert header.word("general.quantization_version") == 2
    assert report.facts["mix"] == "Q4_K_M"
    assert report.facts["bytes_written"] == sum(len(data) for data in found.values())
    assert not report.warnings


def test_everything_else_of_the_file_stays(tmp_path: Path) -> None:
    words = {
        "general.file_type": Value(ValueType.UINT32, 1),
        "quantize.imatrix.file": Value(ValueType.STRING, "calibration"),
        "general.alignment": Value(ValueType.UINT32, 64),
    }
    base = write_model(tmp_path / "base.gguf", HALF, **words)
    quantize_base(base, tmp_path / "out.gguf", to="q8_0")
    before, after = read_gguf_header(base), read_gguf_header(tmp_path / "out.gguf")
    assert after.alignment == 64
    assert list(after.tensors) == list(before.tensors)
    changed = {k for k in before.metadata if after.word(k) != before.word(k)}
    # An importance matrix had no part in these types.
    assert changed == {"general.file_type", "quantize.imatrix.file"}
    assert after.word("quantize.imatrix.file") is None
    assert set(after.metadata) - set(before.metadata) == {"general.quantization_version"}


def test_parts_stay_parts(tmp_path: Path) -> None:
    torch.manual_seed(1)
    whole = write_model(tmp_path / "whole.gguf", HALF)
    torch.manual_seed(1)
    first = write_model(tmp_path / "base.gguf", HALF, parts=3)
    quantize_base(whole, tmp_path / "out.gguf", to="q4_k_s")
    quantize_base(first, tmp_path / "out", to="q4_k_s")
    model = open_gguf(tmp_path / "out" / first.name)
    assert len(model.parts) == 3
    found = {name: data for part in model.parts for name, data in stored(part.path).items()}
    expected = stored(tmp_path / "out.gguf")
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)


def test_what_was_quantised_before_is_warned_of_or_copied(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    report = quantize_base(base, tmp_path / "out.gguf", to="q8_0")
    (warning,) = report.warnings
    assert "quantised before" in warning.message
    assert "6 Q4_K" in warning.message
    before, after = stored(base), stored(tmp_path / "out.gguf")
    assert np.array_equal(before["blk.0.ffn_down.weight"], after["blk.0.ffn_down.weight"])
    weights = reference(base)
    for name, kind in types(tmp_path / "out.gguf").items():
        coded = gguf.quants.quantize(weights[name], gguf.GGMLQuantizationType[kind])
        assert np.array_equal(coded.view(np.uint8).reshape(-1), after[name]), name
    with pytest.raises(InputError, match="already is Q8_0"):
        quantize_base(tmp_path / "out.gguf", tmp_path / "again.gguf", to="q8_0")


@pytest.mark.parametrize(
    ("kind", "error", "hint"),
    [
        ("iq2_xxs", UnsupportedError, "Q4_K"),
        ("q2_k_s", UnsupportedError, "q2_k"),
        ("q4_k_n", OptionError, "q4_k_m"),
    ],
)
def test_types_that_cannot_be_made(
    tmp_path: Path, kind: str, error: type[Exception], hint: str
) -> None:
    base = write_model(tmp_path / "base.gguf", HALF)
    with pytest.raises(error, match=kind) as caught:
        quantize_base(base, tmp_path / "out.gguf", to=kind)
    assert hint in caught.value.hint
    assert not (tmp_path / "out.gguf").exists()


@pytest.mark.parametrize("dtype", [None, "fp16", "bf16", "fp32"])
def test_dequantising_is_gguf_pys(tmp_path: Path, dtype: str | None) -> None:
    base = write_model(tmp_path / "base.gguf", MIX)
    dequantize_base(base, tmp_path / "out.gguf", dtype=dtype)
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}.get(dtype or "", torch.float16)
    found = map_tensors(read_gguf_header(tmp_path / "out.gguf"))
    for name, weight in reference(base).items():
        wanted = torch.from_numpy(weight.copy())
        wanted = wanted if "norm" in name else wanted.to(torch_dtype)
        assert torch.equal(found[name], wanted), name
    numbers = {None: 1, "fp16": 1, "bf16": 32, "fp32": 0}
    header = read_gguf_header(tmp_path / "out.gguf")
    assert header.word("general.file_type") == numbers[dtype]


def test_without_a_dtype_plain_tensors_stay(tmp_path: Path) -> None:
    base = write_model(tmp_path / "base.gguf", {"attn": "BF16", "ffn": "Q8_0"})
    dequantize_base(base, tmp_path / "out.gguf")
    kinds = types(tmp_path / "out.gguf")
    assert {kinds[name] for name in kinds if "attn_q" in name} == {"BF16"}
    assert {kinds[name] for name in kinds if "ffn" in name} == {"F16"}
    with pytest.raises(InputError, match="plain numbers"):
        dequantize_base(tmp_path / "out.gguf", tmp_path / "again.gguf")


def test_folded_tensors_of_image_models_keep_their_shape(tmp_path: Path) -> None:
    name, stacked = "input_blocks.1.0.in_layers.2.weight", "double_blocks.0.img_attn.qkv.weight"
    weight, other = torch.randn(64, 8, 3, 3), torch.randn(96, 256)
    words = {
        "general.architecture": Value(ValueType.STRING, "flux"),
        f"comfy.gguf.orig_shape.{name}": Value(ValueType.ARRAY, (64, 8, 3, 3), ValueType.INT32),
    }
    coded = GGML_TYPES["Q4_K"].codec.encode(weight.reshape(-1, 256))
    entries = [
        block_entry(name, "Q4_K", (18, 256), coded),
        block_entry(stacked, "Q4_K", (96, 256), GGML_TYPES["Q4_K"].codec.encode(other)),
    ]
    save_gguf(tmp_path / "base.gguf", words, entries)
    dequantize_base(tmp_path / "base.gguf", tmp_path / "out.gguf", dtype="fp32")
    header = read_gguf_header(tmp_path / "out.gguf")
    assert header.tensors[name].shape == (18, 256)
    assert header.word(f"comfy.gguf.orig_shape.{name}") == [64, 8, 3, 3]
    wanted = reference(tmp_path / "base.gguf")
    found = map_tensors(header)
    assert all(np.array_equal(found[key].numpy(), wanted[key]) for key in wanted)


def test_experts_are_coded_matrix_by_matrix(tmp_path: Path) -> None:
    weight = torch.randn(4, 96, 256)
    words = {
        "general.architecture": Value(ValueType.STRING, "llama"),
        "llama.block_count": Value(ValueType.UINT32, 1),
        "llama.expert_count": Value(ValueType.UINT32, 4),
    }
    raw = weight.half().view(torch.uint8)
    save_gguf(
        tmp_path / "base.gguf",
        words,
        [block_entry("blk.0.ffn_up_exps.weight", "F16", tuple(weight.shape), raw)],
    )
    quantize_base(tmp_path / "base.gguf", tmp_path / "out.gguf", to="q4_0")
    coded = gguf.quants.quantize(weight.half().float().numpy(), gguf.GGMLQuantizationType.Q4_0)
    (found,) = stored(tmp_path / "out.gguf").values()
    assert np.array_equal(coded.reshape(-1), found)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.gguf"
    words = {
        "general.type": Value(ValueType.STRING, "adapter"),
        "general.architecture": Value(ValueType.STRING, "llama"),
    }
    raw = torch.zeros(32, 32).view(torch.uint8)
    save_gguf(adapter, words, [block_entry("blk.0.attn_q.weight.lora_a", "F32", (32, 32), raw)])
    with pytest.raises(UnsupportedError, match="an adapter"):
        quantize_base(adapter, tmp_path / "out.gguf", to="q8_0")
    folder = write_adapter(tmp_path / "folder")
    with pytest.raises(UnsupportedError, match="an adapter"):
        quantize_base(folder / "adapter_model.safetensors", tmp_path / "out.gguf", to="q8_0")
    make_base(tmp_path / "plain")
    with pytest.raises(UnsupportedError, match="not a GGUF model") as caught:
        quantize_base(tmp_path / "plain", tmp_path / "out.gguf", to="q8_0")
    assert "convert_hf_to_gguf.py" in (caught.value.hint or "")
