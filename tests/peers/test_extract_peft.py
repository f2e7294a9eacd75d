"""Extraction of everything from models whose every parameter moved, loaded by PEFT.

The oracle is the tuned model's own forward pass.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from loratools.extract import extract_adapter
from loratools.merge import merge_into_base

from . import builders
from .builders import Base, Tensors

POSITIONS = ("wpe", "position_embeddings")
TOKENS = torch.arange(1, 25).reshape(2, 12)


def tuned_copy(base: Base, folder: Path, change: Callable[[str, torch.Tensor], bool]) -> Path:
    """Write the base with noise on every float tensor that ``change`` picks."""
    shutil.copytree(base.folder, folder)
    generator = torch.Generator().manual_seed(3)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and change(name, tensor):
                noise = torch.randn(tensor.shape, generator=generator)
                tensors[name] = tensor + 0.1 * tensor.std(correction=0).clamp_min(0.1) * noise
        save_file(tensors, file, metadata={"format": "pt"})
    return folder


def logits(module: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return module(TOKENS).logits.double()


def with_peft(base: Base, adapter: Path) -> torch.Tensor:
    from peft import PeftModel

    with warnings.catch_warnings():
        # A key that finds no home is a warning of PEFT's.
        warnings.filterwarnings("error", message=".*(missing|unexpected).*")
        warnings.filterwarnings("ignore", message=".*(fan_in_fan_out|tied|lora_bias).*")
        model = PeftModel.from_pretrained(base.load(), adapter)
    return logits(model.eval())


def everything(name: str, tensor: torch.Tensor) -> bool:
    return True


BASES: dict[str, Callable[[Path], Base]] = {
    "llama": builders.llama,
    "llama, sharded": lambda folder: builders.llama(folder, shard_size="20KB"),
    "llama, tied": lambda folder: builders.llama(folder, tied=True),
    "llama, biases": lambda folder: builders.llama(folder, attention_bias=True, mlp_bias=True),
    "gpt2 as on the Hub": builders.gpt2,
    "bert": builders.bert,
}


@pytest.mark.parametrize("name", BASES)
def test_peft_with_the_adapter_is_the_tuned_model(name: str, tmp_path: Path) -> None:
    base = BASES[name](tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", everything)
    report = extract_adapter(base.folder, tuned, tmp_path / "adapter", energy=1.0)
    assert report.facts["left_out"] == 0
    expected, before = logits(base.load(tuned)), logits(base.load())
    found = with_peft(base, tmp_path / "adapter")
    assert (found - expected).abs().max() < 1e-4 * (expected - before).abs().max()


@pytest.mark.parametrize("name", BASES)
def test_merging_the_adapter_gives_the_tuned_weights(name: str, tmp_path: Path) -> None:
    base = BASES[name](tmp_path / "base")
    tuned = tuned_copy(base, tmp_path / "tuned", everything)
    # In models this small a table of positions is as long as the vocabulary, and might be its head.
    found = [word for word in POSITIONS if any(word in name for name in base.tensors)]
    extract_adapter(base.folder, tuned, tmp_path / "adapter", energy=1.0, exclude=found)
    merge_into_base(base.folder, tmp_path / "adapter", tmp_path / "merged")
    wanted: Tensors = builders.load_tensors(tuned)
    merged = builders.load_tensors(tmp_path / "merged")
    assert merged.keys() == wanted.keys()
    for key, tensor in wanted.items():
        expected = base.tensors[key] if any(word in key for word in POSITIONS) else tensor
        assert (merged[key] - expected).abs().max() < 1e-5, key
