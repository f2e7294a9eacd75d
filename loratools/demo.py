"""A demonstration on a small model: make, merge, prove.

The proof is a forward pass in float64 written out here; it shares no code with the merge.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.errors import LoratoolsError
from loratools.merge import merge_into_base
from loratools.report import Json, Report
from loratools.tensorfiles.atomic import staged_output

_WIDTH, _INNER, _LAYERS, _VOCABULARY, _RANK, _ALPHA = 64, 160, 3, 256, 4, 8
_TARGETS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def run_demo(output: str | os.PathLike[str] | None = None, *, overwrite: bool = False) -> Report:
    """Make a base and an adapter, merge them, and compare forward passes.

    Args:
        output: a folder to keep ``base``, ``adapter`` and ``merged`` in; else they are temporary.
        overwrite: replace an earlier demo, or another folder of a model.

    Raises:
        LoratoolsError: merged and base + adapter disagree.
        OutputError: the folder exists.
    """
    if output is None:
        with tempfile.TemporaryDirectory() as temporary:
            return _run(Path(temporary), None)
    with staged_output(Path(output), folder=True, overwrite=overwrite) as staged:
        # By its config.json the folder is known as one that --overwrite may replace.
        (staged / "config.json").write_text(json.dumps({"made_by": "loratools demo"}) + "\n")
        return _run(staged, str(output))


def _run(folder: Path, kept: str | None) -> Report:
    base, adapter, merged = folder / "base", folder / "adapter", folder / "merged"
    make_base(base)
    make_adapter(adapter)
    report = merge_into_base(base, adapter, merged)
    tokens = torch.arange(0, _VOCABULARY, 5)
    plain = forward(base, tokens)
    expected = forward(base, tokens, adapter)
    difference = float((forward(merged, tokens) - expected).abs().max())
    effect = float((expected - plain).abs().max())
    if not difference <= 1e-5 * effect:
        raise LoratoolsError(
            f"the merged model differs from base + adapter by {difference:.3g}",
            hint="please report this, with your platform and torch version",
        )
    facts: dict[str, Json] = {
        "base": f"{_LAYERS} layers, {_parameters(base):,} parameters, float32",
        "adapter": f"rank {_RANK}, {_parameters(adapter):,} parameters",
        "tensors_changed": report.facts["tensors_changed"],
        "tensors": report.facts["tensors"],
        "effect_on_logits": effect,
        "merged_minus_adapted": difference,
        "proved": True,
        "kept_in": kept,
    }
    return Report("demo", (), kept, facts, report.items, report.notes)


def _parameters(folder: Path) -> int:
    return sum(t.numel() for file in folder.glob("*.safetensors") for t in load_file(file).values())


def make_base(folder: Path, seed: int = 0) -> None:
    """Write a small Llama-shaped base with random float32 weights."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)

    def weight(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).div_(columns**0.5)

    tensors = {"model.embed_tokens.weight": weight(_VOCABULARY, _WIDTH)}
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            tensors[f"{prefix}self_attn.{name}.weight"] = weight(_WIDTH, _WIDTH)
        for name in ("gate_proj", "up_proj"):
            tensors[f"{prefix}mlp.{name}.weight"] = weight(_INNER, _WIDTH)
        tensors[f"{prefix}mlp.down_proj.weight"] = weight(_WIDTH, _INNER)
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = torch.ones(_WIDTH)
    tensors["model.norm.weight"] = torch.ones(_WIDTH)
    tensors["lm_head.weight"] = weight(_VOCABULARY, _WIDTH)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": 4,
        "vocab_size": _VOCABULARY,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def make_adapter(folder: Path, seed: int = 1) -> None:
    """Write a PEFT adapter for the base of ``make_base``, as if it had been trained."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(_LAYERS):
        for target in _TARGETS:
            inner = _INNER if target.endswith("down_proj") else _WIDTH
            prefix = f"base_model.model.model.layers.{layer}.{target}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(_RANK, inner, generator=generator) / 8
            tensors[f"{prefix}.lora_B.weight"] = torch.randn(_WIDTH, _RANK, generator=generator) / 8
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": _RANK,
        "lora_alpha": _ALPHA,
        "target_modules": sorted(target.rsplit(".", 1)[-1] for target in _TARGETS),
    }
    text = json.dumps(config, indent=2) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")


def forward(base: Path, tokens: Tensor, adapter: Path | None = None) -> Tensor:
    """Return logits in float64 of one Llama-shaped pass, (tokens, vocabulary).

    With ``adapter``, every adapted layer computes W x + (alpha / rank) B (A x), unmerged.
    Attention is single-headed and without positions: enough to carry every weight's effect.
    """
    weights = {n: t.double() for n, t in load_file(base / "model.safetensors").items()}
    lora = load_file(adapter / "adapter_model.safetensors") if adapter else {}

    def linear(name: str, x: Tensor) -> Tensor:
        result = x @ weights[f"{name}.weight"].T
        down = lora.get(f"base_model.model.{name}.lora_A.weight")
        if down is None:
            return result
        up = lora[f"base_model.model.{name}.lora_B.weight"]
        return result + (_ALPHA / _RANK) * (x @ down.double().T) @ up.double().T

    def norm(name: str, x: Tensor) -> Tensor:
        return x * weights[f"{name}.weight"] / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    x = weights["model.embed_tokens.weight"][tokens]
    for layer in range(_LAYERS):
        prefix = f"model.layers.{layer}"
        h = norm(f"{prefix}.input_layernorm", x)
        query, key, value = (linear(f"{prefix}.self_attn.{n}_proj", h) for n in "qkv")
        weighted = torch.softmax(query @ key.T / _WIDTH**0.5, dim=-1) @ value
        x = x + linear(f"{prefix}.self_attn.o_proj", weighted)
        h = norm(f"{prefix}.post_attention_layernorm", x)
        gate, up = (linear(f"{prefix}.mlp.{n}_proj", h) for n in ("gate", "up"))
        x = x + linear(f"{prefix}.mlp.down_proj", gate * torch.sigmoid(gate) * up)
    return linear("lm_head", norm("model.norm", x))
