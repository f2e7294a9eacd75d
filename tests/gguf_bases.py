"""Tiny bases as config.json or GGUF file, an adapter for them, and its conversion."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

import loratools
from loratools.adapter import Adapter, in_natural_order
from loratools.adapter_io import save_adapter
from loratools.deltas import LayerDelta, LoRA
from tests.strategies import make_tensor

GOLDEN = Path(__file__).parent / "golden" / "gguf"
HIDDEN, HEADS, KEYS, FF, VOCABULARY = 16, 4, 2, 24, 20
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN,
    "num_attention_heads": HEADS, "num_key_value_heads": KEYS, "num_hidden_layers": 1,
    "intermediate_size": FF, "vocab_size": VOCABULARY, "tie_word_embeddings": False,
}  # fmt: skip
Q, K, V = (f"model.layers.0.self_attn.{x}_proj" for x in "qkv")
DOWN = "model.layers.0.mlp.down_proj"
EXPERT = "model.layers.0.mlp.experts.{}.{}_proj"


def lora(out: int, inner: int, rank: int = 2, alpha: float = 4.0, seed: int = 1) -> LoRA:
    return LoRA(make_tensor(seed, rank, inner), make_tensor(seed + 1, out, rank), alpha)


def plain() -> Adapter:
    """Return an adapter of one alpha: nothing needs folding."""
    return Adapter(
        in_natural_order({
            Q: lora(HIDDEN, HIDDEN), K: lora(HIDDEN // 2, HIDDEN, seed=3),
            V: lora(HIDDEN // 2, HIDDEN, seed=5), DOWN: lora(HIDDEN, FF, seed=7),
        })
    )  # fmt: skip


def write_config(folder: Path, **words: Any) -> Path:
    folder.mkdir(exist_ok=True, parents=True)
    file = folder / "config.json"
    file.write_text(json.dumps({**CONFIG, **words}))
    return file


def write_model(path: Path, *, arch: str = "llama", left_out: str = "", **shapes: Any) -> Path:
    """Write a GGUF model with the gguf package, of one block."""
    rows = HIDDEN // HEADS * KEYS
    tensors = {
        "token_embd": (VOCABULARY, HIDDEN), "output": (VOCABULARY, HIDDEN),
        "blk.0.attn_q": (HIDDEN, HIDDEN), "blk.0.attn_k": (rows, HIDDEN),
        "blk.0.attn_v": (rows, HIDDEN), "blk.0.attn_output": (HIDDEN, HIDDEN),
        "blk.0.ffn_gate": (FF, HIDDEN), "blk.0.ffn_up": (FF, HIDDEN),
        "blk.0.ffn_down": (HIDDEN, FF),
        **{name.replace("_0_", ".0."): shape for name, shape in shapes.items()},
    }  # fmt: skip
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(1)
    writer.add_embedding_length(HIDDEN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    for name, shape in tensors.items():
        if shape is not None and name not in left_out.split():
            writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(adapter: Adapter, folder: Path, base: Path | None, **words: Any) -> Path:
    """Save an adapter as PEFT does and convert it; returns the GGUF file."""
    save_adapter(adapter, folder / "peft", overwrite=True)
    out = folder / "adapter.gguf"
    loratools.convert_adapter(folder / "peft", out, to="gguf", base=base, overwrite=True, **words)
    return out


def dense(layers: Mapping[str, LayerDelta]) -> dict[str, Tensor]:
    return {path: delta.materialize() for path, delta in layers.items()}  # type: ignore[attr-defined]


def assert_same_change(one: Adapter, other: Adapter) -> None:
    assert list(in_natural_order(one.layers)) == list(in_natural_order(other.layers))
    for path, change in dense(one.layers).items():
        torch.testing.assert_close(dense(other.layers)[path], change, msg=path)
