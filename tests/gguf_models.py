"""Small GGUF models of the Llama architecture, tensors of chosen types, and adapters for them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from loratools.codecs.ggml import GGML_TYPES
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_tensors import block_entry
from loratools.tensorfiles.gguf_types import ValueType
from loratools.tensorfiles.gguf_writing import save_gguf

HIDDEN, HEADS, KEYS, FF, BLOCKS, VOCABULARY = 256, 4, 2, 512, 2, 64
PER_HEAD = HIDDEN // HEADS

SHAPES = {
    "attn_q": (HIDDEN, HIDDEN),
    "attn_k": (KEYS * PER_HEAD, HIDDEN),
    "attn_v": (KEYS * PER_HEAD, HIDDEN),
    "attn_output": (HIDDEN, HIDDEN),
    "ffn_gate": (FF, HIDDEN),
    "ffn_up": (FF, HIDDEN),
    "ffn_down": (HIDDEN, FF),
}
HUGGING_FACE = {
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip


def words(**more: Value) -> dict[str, Value]:
    def number(value: int) -> Value:
        return Value(ValueType.UINT32, value)

    tokens = tuple(f"token {i}" for i in range(VOCABULARY))
    return {
        "general.architecture": Value(ValueType.STRING, "llama"),
        "general.name": Value(ValueType.STRING, "Tiny"),
        "llama.block_count": number(BLOCKS),
        "llama.embedding_length": number(HIDDEN),
        "llama.feed_forward_length": number(FF),
        "llama.attention.head_count": number(HEADS),
        "llama.attention.head_count_kv": number(KEYS),
        "llama.vocab_size": number(VOCABULARY),
        "llama.context_length": number(128),
        "tokenizer.ggml.tokens": Value(ValueType.ARRAY, tokens, ValueType.STRING),
        **more,
    }


def weights(*, head: bool = True) -> dict[str, Tensor]:
    """Random weights in GGUF's own names and layout, in float32."""
    made = {"token_embd.weight": 0.02 * torch.randn(VOCABULARY, HIDDEN)}
    for block in range(BLOCKS):
        for name, shape in SHAPES.items():
            made[f"blk.{block}.{name}.weight"] = 0.02 * torch.randn(shape)
        made[f"blk.{block}.attn_norm.weight"] = torch.rand(HIDDEN)
    if head:
        made["output.weight"] = 0.02 * torch.randn(VOCABULARY, HIDDEN)
    return made


def type_of(name: str, types: Mapping[str, str]) -> str:
    """The type of the longest key that the name contains, else F32 for vectors and F16."""
    found = [key for key in types if key in name]
    if "norm" in name:
        return "F32"
    return types[max(found, key=len)] if found else "F16"


def write_model(
    path: Path,
    types: Mapping[str, str],
    *,
    head: bool = True,
    parts: int = 1,
    **more: Value,
) -> Path:
    """Write a model, in several files if ``parts`` says so; returns the (first) file."""
    entries = []
    for name, weight in weights(head=head).items():
        kind = type_of(name, types)
        raw = GGML_TYPES[kind].codec.encode(weight)
        entries.append(block_entry(name, kind, tuple(weight.shape), raw))
    if parts == 1:
        save_gguf(path, words(**more), entries)
        return path
    step = -(-len(entries) // parts)
    files = []
    for part in range(parts):
        split = {
            "split.no": Value(ValueType.UINT16, part),
            "split.count": Value(ValueType.UINT16, parts),
            "split.tensors.count": Value(ValueType.INT32, len(entries)),
        }
        file = path.with_name(f"{path.stem}-{part + 1:05d}-of-{parts:05d}.gguf")
        own = words(**more) if part == 0 else more
        save_gguf(file, {**own, **split}, entries[part * step : (part + 1) * step])
        files.append(file)
    return files[0]


def write_adapter(
    folder: Path, *, size: float = 0.02, modules: Mapping[str, tuple[int, ...]] | None = None
) -> Path:
    """Write a PEFT adapter of rank 4, alpha 8, for all blocks or for the named modules."""
    folder.mkdir()
    shapes = modules or {
        f"model.layers.{block}.{HUGGING_FACE[name]}": shape
        for block in range(BLOCKS)
        for name, shape in SHAPES.items()
    }
    tensors = {}
    for module, (out, ins) in shapes.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(4, ins)
        tensors[f"base_model.model.{module}.lora_B.weight"] = size * torch.randn(out, 4)
    save_file(tensors, folder / "adapter_model.safetensors")
    leaves = sorted({module.rpartition(".")[2] for module in shapes})
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": leaves}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder
