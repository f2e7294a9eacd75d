"""Merged and quantised GGUF models beside llama.cpp: its quantiser, its logits, its own merge."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import loratools
from loratools.merge import merge_into_base
from loratools.quantize import dequantize_base, quantize_base
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.gguf_tensors import map_tensors

from . import llama
from .test_gguf_llama import MODELS, MOE, SMALL, expected, make_adapter, make_base

pytestmark = pytest.mark.slow

EXPORT_VARIABLE = "LLAMA_EXPORT_LORA"
"""Names llama.cpp's program llama-export-lora, where it is built."""

WIDE = {**SMALL, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 9}
SHAPES: dict[str, dict[str, Any]] = {
    "wide": {"Llama": {**WIDE, "num_attention_heads": 8, "num_key_value_heads": 2}},
    "narrow": {"Llama": SMALL},
    "tied": {"Qwen3": {**WIDE, "head_dim": 64, "tie_word_embeddings": True}},
    "falcon": {"Falcon": {**MODELS["Falcon"], "hidden_size": 256, "num_hidden_layers": 9}},
    "experts": {"Qwen3Moe": {
        **WIDE, **MOE, "num_experts": 8, "num_local_experts": 8, "moe_intermediate_size": 256,
        "head_dim": 64, "decoder_sparse_step": 1, "norm_topk_prob": True,
    }},
}  # fmt: skip
MIXES = {
    "q4_k_m": 15, "q4_k_s": 14, "q5_k_m": 17, "q3_k_m": 12, "q3_k_l": 13, "q2_k": 10, "q6_k": 18,
    "q8_0": 7, "q4_0": 2, "iq4_xs": 30,
}  # fmt: skip


def raw(path: Path) -> dict[str, tuple[str, bytes]]:
    """Every tensor's type and bytes."""
    header, data = read_gguf_header(path), path.read_bytes()
    return {n: (t.type.name, data[t.start : t.stop]) for n, t in header.tensors.items()}


@pytest.fixture(scope="module", params=SHAPES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    llama.need_library()
    folder = tmp_path_factory.mktemp(request.param)
    ((name, config),) = SHAPES[request.param].items()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, name, config)
        base = make_base(name, folder / "base")
    return llama.base_gguf(base, folder / "model.gguf")


@pytest.mark.parametrize("mix", MIXES)
def test_types_and_bytes_are_llama_quantizes(model: Path, tmp_path: Path, mix: str) -> None:
    llama.run("llama_quantize.py", model, tmp_path / "theirs.gguf", MIXES[mix])
    quantize_base(model, tmp_path / "ours.gguf", to=mix)
    ours, theirs = raw(tmp_path / "ours.gguf"), raw(tmp_path / "theirs.gguf")
    assert ours.keys() == theirs.keys()
    assert {n: kind for n, (kind, _) in ours.items()} == {n: k for n, (k, _) in theirs.items()}
    same = sum(ours[name] == theirs[name] for name in ours)
    # A build with fused multiply-adds chooses another step now and then.
    weights = map_tensors(read_gguf_header(model))
    for name in ours:
        if ours[name] != theirs[name]:
            a, b = (np.frombuffer(side[name][1], np.uint8) for side in (ours, theirs))
            assert float((a != b).mean()) < 0.05, (name, weights[name].shape)
    assert same >= len(ours) // 3
    first, second = (read_gguf_header(tmp_path / f"{n}.gguf") for n in ("ours", "theirs"))
    for key in ("general.file_type", "general.quantization_version"):
        assert first.word(key) == second.word(key)


def test_a_merged_mix_runs_and_answers_as_peft_does(tmp_path: Path) -> None:
    llama.need_library()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "Llama", SHAPES["wide"]["Llama"])
        base = make_base("Llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    plain = llama.base_gguf(base, tmp_path / "plain.gguf")
    merge_into_base(plain, adapter, tmp_path / "merged-f32.gguf")
    (exact,) = llama.logits(tmp_path / "merged-f32.gguf")
    wanted, unchanged = expected(base, adapter), expected(base)
    assert np.abs(exact - wanted).max() < 2e-3
    effect = np.linalg.norm(wanted - unchanged)
    for mix in ("q8_0", "q4_k_m"):
        quantize_base(plain, tmp_path / f"{mix}.gguf", to=mix)
        merge_into_base(tmp_path / f"{mix}.gguf", adapter, tmp_path / f"merged-{mix}.gguf")
        before, after = (
            read_gguf_header(tmp_path / n) for n in (f"{mix}.gguf", f"merged-{mix}.gguf")
        )
        assert [(t.name, t.type, t.shape) for t in before.tensors.values()] == [
            (t.name, t.type, t.shape) for t in after.tensors.values()
        ]
        assert all(after.word(key) == before.word(key) for key in before.metadata)
        # As near to PEFT's as the quantised base is to the base itself.
        (coarse,) = llama.logits(tmp_path / f"{mix}.gguf")
        (found,) = llama.logits(tmp_path / f"merged-{mix}.gguf")
        noise = np.linalg.norm(coarse - unchanged)
        assert np.linalg.norm(found - wanted) < 2 * noise < 2 * effect, mix


@pytest.mark.parametrize("kind", ["f32", "f16"])
def test_plain_merges_are_llama_export_loras(tmp_path: Path, kind: str) -> None:
    """It writes merged tensors in float16 where the base has that or less."""
    program = os.environ.get(EXPORT_VARIABLE)
    if not program:
        pytest.skip(f"no llama-export-lora: name the program in {EXPORT_VARIABLE}")
    base = make_base("Llama", tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter", target_modules="all-linear")
    model = llama.base_gguf(base, tmp_path / "model.gguf")
    if kind == "f16":
        quantize_base(model, tmp_path / "half.gguf", to="f16")
        model = tmp_path / "half.gguf"
    loratools.convert_adapter(adapter, tmp_path / "adapter.gguf", to="gguf", base=base)
    command = [program, "-m", model, "--lora", tmp_path / "adapter.gguf", "-o", tmp_path / "t.gguf"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    merge_into_base(model, adapter, tmp_path / "ours.gguf")
    ours, theirs = (map_tensors(read_gguf_header(tmp_path / f"{n}.gguf")) for n in ("ours", "t"))
    assert ours.keys() == theirs.keys()
    for name, found in ours.items():
        # Two orders of summation, and float16's unit in the last place.
        exact = found.dtype == torch.float32 == theirs[name].dtype
        rtol, atol = (2e-6, 2e-7) if exact else (1e-3, 1e-5)
        torch.testing.assert_close(found.float(), theirs[name].float(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("shape", ["wide", "experts"])
@pytest.mark.parametrize("mix", ["q4_0", "q4_k_m"])
def test_a_merge_in_few_bits_and_its_residual_are_the_merge_in_32(
    tmp_path: Path, shape: str, mix: str
) -> None:
    """What remains is llama.cpp's: beside weights in blocks it rounds activations to 8 bits."""
    llama.need_library()
    ((name, config),) = SHAPES[shape].items()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, name, {**config, "num_hidden_layers": 2, "initializer_range": 0.05})
        base = make_base(name, tmp_path / "base")
    words: dict[str, Any] = {"target_modules": "all-linear"}
    if shape == "experts":
        words["target_parameters"] = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    adapter = make_adapter(base, tmp_path / "adapter", r=2, lora_alpha=1, **words)
    plain, few = llama.base_gguf(base, tmp_path / "plain.gguf"), tmp_path / "few.gguf"
    quantize_base(plain, few, to=mix)
    merged, exact = tmp_path / "merged.gguf", tmp_path / "exact.gguf"
    merge_into_base(few, adapter, merged, residual_rank=512)
    merge_into_base(few, adapter, exact, quant="dequantize", dtype="fp32")
    dequantize_base(few, tmp_path / "wide.gguf", dtype="fp32")
    coded, same = (llama.logits(path)[0] for path in (few, tmp_path / "wide.gguf"))
    (wanted,) = llama.logits(exact)
    rounded, found = llama.logits(merged, tmp_path / "merged-residual.gguf")
    # Of every token, in the middle: a router near a tie may send one to another expert.
    error, lost, noise = (
        float(np.median(np.linalg.norm(difference, axis=1)))
        for difference in (found - wanted, rounded - wanted, coded - same)
    )
    assert error < 1.5 * noise
    assert error < 0.25 * lost
