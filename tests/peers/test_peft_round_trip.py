"""What loratools writes, PEFT reloads: the same merged weights, no key missing or unexpected."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from . import builders, oracles
from .builders import LINEARS, Base, lora

KINDS: dict[str, dict[str, Any]] = {
    "linear": {"target_modules": list(LINEARS)},
    "rslora": {"target_modules": list(LINEARS), "use_rslora": True},
    "patterns": {
        "target_modules": list(LINEARS),
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 6},
        "alpha_pattern": {"k_proj|v_proj": 3, "mlp.up_proj": 7.5},
    },
    "dora": {"target_modules": list(LINEARS), "use_dora": True},
    "embedding": {"target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "one layer": {"target_modules": ["q_proj"], "layers_to_transform": [1]},
    "modules_to_save": {"target_modules": ["q_proj"], "modules_to_save": ["norm", "lm_head"]},
    "token rows": {"target_modules": ["q_proj"], "trainable_token_indices": [9, 3, 5]},
    "pissa": {"target_modules": list(LINEARS), "init_lora_weights": "pissa"},
}
BIASED: dict[str, dict[str, Any]] = {
    "lora_bias": {"target_modules": ["q_proj", "v_proj"], "lora_bias": True},
    "bias all": {"target_modules": ["q_proj"], "bias": "all"},
    "bias lora_only": {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only"},
}


def rewritten(adapter: Path, folder: Path) -> Path:
    """Read an adapter and write it again."""
    from loratools.adapter_io import load_adapter, save_adapter

    save_adapter(load_adapter(adapter), folder)
    return folder


def assert_reloads(base: Base, original: Path, written: Path, atol: float = 1e-6) -> None:
    """Assert that PEFT takes every key of the written adapter, and merges the same weights."""
    from peft import PeftConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(base.load(), PeftConfig.from_pretrained(written))
        loaded = model.load_adapter(written, "default")
    own = ("lora_", "modules_to_save", "trainable_tokens", "bias")
    assert [key for key in loaded.missing_keys if any(word in key for word in own)] == []
    assert loaded.unexpected_keys == []
    expected = oracles.peft_merged(base, original)
    oracles.assert_agrees(oracles.peft_merged(base, written), expected, base, atol=atol)


@pytest.mark.parametrize("kind", KINDS)
def test_llama(kind: str, llama: Base, tmp_path: Path) -> None:
    """Kinds of adapter which need no biases in the base."""
    adapter = lora(llama, tmp_path / "a", r=4, lora_alpha=12, **KINDS[kind])
    written = rewritten(adapter, tmp_path / "b")
    assert set(builders.adapter_tensors(written)) == set(builders.adapter_tensors(adapter))
    assert_reloads(llama, adapter, written, 1e-5 if kind == "pissa" else 1e-6)


@pytest.mark.parametrize("kind", BIASED)
def test_biases(kind: str, llama_biased: Base, tmp_path: Path) -> None:
    """Kinds of adapter that change biases."""
    adapter = lora(llama_biased, tmp_path / "a", r=4, lora_alpha=12, **BIASED[kind])
    assert_reloads(llama_biased, adapter, rewritten(adapter, tmp_path / "b"))


def test_gpt2(gpt2: Base, tmp_path: Path) -> None:
    """Weights stored as (in, out)."""
    adapter = lora(gpt2, tmp_path / "a", r=4, target_modules=["c_attn", "c_proj"])
    assert_reloads(gpt2, adapter, rewritten(adapter, tmp_path / "b"))


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_convolutions(dora: bool, tmp_path: Path) -> None:
    """Kernels of one, two and three dimensions."""
    base = builders.custom(tmp_path / "base", builders.Convs)
    targets = ["line", "square", "pixel", "cube"]
    adapter = lora(base, tmp_path / "a", r=4, target_modules=targets, use_dora=dora)
    assert_reloads(base, adapter, rewritten(adapter, tmp_path / "b"))


def test_attention(tmp_path: Path) -> None:
    """nn.MultiheadAttention, whose out_proj PEFT nests."""
    base = builders.custom(tmp_path / "base", builders.Attention)
    adapter = lora(base, tmp_path / "a", r=4, target_modules=["mha"])
    assert_reloads(base, adapter, rewritten(adapter, tmp_path / "b"))


@pytest.mark.parametrize("kind", ["linear", "dora", "pissa"])
def test_minimal_config(kind: str, llama: Base, tmp_path: Path) -> None:
    """Every setting that has PEFT's default is left out: older PEFT refuses names it lacks."""
    from peft import LoraConfig

    adapter = lora(llama, tmp_path / "a", r=4, lora_alpha=12, **KINDS[kind])
    written = json.loads((rewritten(adapter, tmp_path / "b") / "adapter_config.json").read_text())
    defaults = LoraConfig().to_dict()
    idle = {key for key, value in written.items() if value == defaults.get(key)}
    assert idle <= {"peft_type", "task_type", "base_model_name_or_path", "peft_version", "revision"}


def test_other_spelling(llama: Base, tmp_path: Path) -> None:
    """An adapter read without its prefix is written with it."""
    adapter = lora(llama, tmp_path / "a", r=4, target_modules=LINEARS)
    bare = builders.edited(
        adapter,
        tmp_path / "bare",
        tensors=builders.renamed(lambda key: key.removeprefix(builders.PREFIX)),
    )
    written = rewritten(bare, tmp_path / "b")
    original, again = (
        builders.load_tensors(folder / "adapter_model.safetensors") for folder in (adapter, written)
    )
    assert sorted(again) == sorted(original)
    assert all(oracles.same_bits(again[key], tensor) for key, tensor in original.items())
