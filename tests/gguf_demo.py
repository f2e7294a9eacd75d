"""The demo's base as a GGUF file, laid out one row at a time."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools.codecs.ggml import GGML_TYPES
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_tensors import block_entry
from loratools.tensorfiles.gguf_types import ValueType
from loratools.tensorfiles.gguf_writing import save_gguf

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
TOP = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def write_demo_gguf(base: Path, path: Path, kind: str = "F16") -> Path:
    """Write the base of ``loratools demo`` with its matrices in one type."""
    config = json.loads((base / "config.json").read_text())
    entries = []
    for name, loaded in load_file(base / "model.safetensors").items():
        target = TOP.get(name) or gguf_name(name)
        turns = "attn_q" in target or "attn_k" in target
        weight = turned(loaded, config["num_attention_heads"]) if turns else loaded
        own = kind if weight.dim() > 1 else "F32"
        raw = GGML_TYPES[own].codec.encode(weight)
        entries.append(block_entry(target, own, tuple(weight.shape), raw))
    numbers = {
        "llama.block_count": config["num_hidden_layers"],
        "llama.embedding_length": config["hidden_size"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.context_length": 128,
        "llama.vocab_size": config["vocab_size"],
    }
    words = {
        "general.architecture": Value(ValueType.STRING, "llama"),
        "general.name": Value(ValueType.STRING, "Demo"),
        **{key: Value(ValueType.UINT32, number) for key, number in numbers.items()},
    }
    save_gguf(path, words, entries)
    return path


def gguf_name(name: str) -> str:
    _, _, block, rest = name.split(".", 3)
    return f"blk.{block}.{NAMES[rest.removesuffix('.weight')]}.weight"


def turned(weight: Tensor, heads: int) -> Tensor:
    """Half-split rows of every head as adjacent pairs."""
    rows, size = torch.empty_like(weight), len(weight) // heads
    for head in range(heads):
        for place in range(size // 2):
            for half in range(2):
                rows[head * size + 2 * place + half] = weight[
                    head * size + half * size // 2 + place
                ]
    return rows
