"""Whole models between GGUF and Hugging Face folders, against llama.cpp's own converter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from loratools.quantize import dequantize_base, quantize_base
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.gguf_tensors import map_tensors

from . import llama
from .test_gguf_llama import MODELS, MOE, OLD, SMALL, make_base

pytestmark = pytest.mark.slow

TIED = {**SMALL, "tie_word_embeddings": True}
MORE: dict[str, dict[str, Any]] = {
    "Qwen2": SMALL,
    "Qwen2Moe": {**SMALL, **MOE, "shared_expert_intermediate_size": 48, "decoder_sparse_step": 1},
    "Gemma": {**TIED, "head_dim": 16},
    "Gemma2": {**TIED, "head_dim": 16, "query_pre_attn_scalar": 16},
    "Cohere": {**TIED, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "Glm4": {**SMALL, "head_dim": 16, "pad_token_id": 0, "eos_token_id": 1},
    "Phi": SMALL,
    "StableLm": SMALL,
    "Nemotron": {**SMALL, "head_dim": 16},
    "Olmoe": {**SMALL, **MOE, "pad_token_id": 0, "eos_token_id": 1},
    "GPTBigCode": {**OLD, "n_positions": 64},
    "SmolLM3": {**SMALL, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
    "SeedOss": {**SMALL, "head_dim": 16},
    "Ernie4_5": {**SMALL, "head_dim": 16},
}


@pytest.mark.parametrize("name", [*MODELS, *MORE])
def test_a_checkpoint_there_and_back(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(MODELS, name, MODELS.get(name) or MORE[name])
    base = make_base(name, tmp_path / "base")
    theirs = llama.base_gguf(base, tmp_path / "theirs.gguf")
    dequantize_base(theirs, tmp_path / "back", base_config=base, dtype="fp32")
    found = load_file(tmp_path / "back" / "model.safetensors")
    wanted = load_file(base / "model.safetensors")
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        # Norms that llama.cpp stores plus one lose what float32 has no room for.
        torch.testing.assert_close(found[key], value, rtol=0, atol=2e-7, msg=key)
    quantize_base(base, tmp_path / "ours.gguf", to="f16", template=theirs)
    quantize_base(theirs, tmp_path / "half.gguf", to="f16")
    ours, half = (map_tensors(read_gguf_header(tmp_path / f"{n}.gguf")) for n in ("ours", "half"))
    assert list(ours) == list(half)
    for key, value in half.items():
        assert torch.equal(ours[key], value), key
