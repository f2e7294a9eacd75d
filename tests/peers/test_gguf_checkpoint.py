"""Whole models between GGUF and Hugging Face folders, against llama.cpp's own converter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loratools.quantize import dequantize_base, quantize_base
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.gguf_tensors import map_tensors

from . import llama
from .test_gguf_llama import MODELS, make_base

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_there_and_back(name: str, tmp_path: Path) -> None:
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
