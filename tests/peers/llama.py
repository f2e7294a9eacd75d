"""Where llama.cpp is: its library by llama-cpp-python, its converter by that package's source."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

HERE = Path(__file__).parent
SOURCE_VARIABLE = "LLAMA_CPP"
"""Names the folder of llama.cpp's source; `make peers` unpacks it beside the environment."""


def source() -> Path:
    """Return llama.cpp's source folder, or skip the test."""
    named = os.environ.get(SOURCE_VARIABLE)
    folder = Path(named) if named else Path(sys.prefix) / "llama.cpp"
    if not (folder / "convert_lora_to_gguf.py").is_file():
        pytest.skip(f"no llama.cpp source: `make llama`, or name its folder in {SOURCE_VARIABLE}")
    return folder


def need_library() -> None:
    """Skip the test where llama-cpp-python is not installed."""
    if importlib.util.find_spec("llama_cpp") is None:
        pytest.skip("llama-cpp-python is not installed: `make llama` builds it")


def run(script: str, *words: object) -> str:
    """Run a script of this folder in a process of its own; returns what it printed."""
    done = subprocess.run(
        [sys.executable, str(HERE / script), *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout + done.stderr


def convert(cases: list[dict[str, Any]], folder: Path) -> list[dict[str, Any]]:
    """Return what llama.cpp's converter makes of dense weights; see ``llama_convert``."""
    torch.save(cases, folder / "cases.pt")
    run("llama_convert.py", source(), folder / "cases.pt", folder / "out.pt")
    results: list[dict[str, Any]] = torch.load(folder / "out.pt", weights_only=True)
    return results


def base_gguf(folder: Path, out: Path, *, fused: bool = False) -> Path:
    """Write a model folder as GGUF with llama.cpp's converter."""
    run("llama_base.py", source(), folder, out, *(["fuse"] if fused else []))
    return out


def logits(model: Path, *adapters: Path) -> np.ndarray:
    """Return llama.cpp's logits for the model alone and with each adapter, stacked."""
    need_library()
    out = model.with_suffix(".npy")
    run("llama_run.py", model, out, *adapters)
    return np.load(out)
