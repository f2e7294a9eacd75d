"""Make the golden GGUF adapters: tiny PEFT adapters, and what llama.cpp's converter makes of them.

    python tests/golden/make_gguf.py LLAMA_CPP

LLAMA_CPP is llama.cpp's source folder. Versions stand in ``gguf/versions.json``. The sources lie
in ``gguf/sources``: ``config.json`` of the base beside the adapter, factors by hand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent / "gguf"
HIDDEN, FF, EXPERTS = 32, 16, 2
CONFIG = {
    "hidden_size": HIDDEN, "intermediate_size": FF, "num_hidden_layers": 1, "vocab_size": 20,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 16,
    "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
LLAMA = {
    "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
    "model.layers.0.self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "model.layers.0.mlp.down_proj": (HIDDEN, FF),
    "lm_head": (20, HIDDEN),
}
MOE = {
    f"model.layers.0.mlp.experts.{e}.{name}_proj": (HIDDEN, FF) if name == "down" else (FF, HIDDEN)
    for e in range(EXPERTS)
    for name in ("gate", "up", "down")
}
CASES: dict[str, tuple[dict, dict, int, str]] = {
    "llama": ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, LLAMA, 3, "f32"),
    "llama-q8_0": (
        {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, LLAMA, 32, "q8_0",
    ),
    "qwen3moe-bf16": (
        {
            "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe",
            "num_experts": EXPERTS, "num_experts_per_tok": 1, "moe_intermediate_size": FF,
            "head_dim": 8,
        },
        MOE, 2, "bf16",
    ),
}  # fmt: skip


def make(name: str, llama_cpp: Path) -> None:
    extra, shapes, rank, kind = CASES[name]
    folder = HERE / "sources" / name
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **extra}, indent=1) + "\n")
    generator = torch.Generator().manual_seed(len(name))
    tensors = {}
    for path, (out, inner) in shapes.items():
        for word, shape in (("A", (rank, inner)), ("B", (out, rank))):
            factor = torch.randn(*shape, generator=generator).to(torch.bfloat16).to(torch.float32)
            tensors[f"base_model.model.{path}.lora_{word}.weight"] = factor
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "tiny/base", "target_modules": sorted(shapes),
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
    script = llama_cpp / "convert_lora_to_gguf.py"
    words = ["--base", folder, "--outtype", kind, "--outfile", HERE / f"{name}.gguf", folder]
    subprocess.run([sys.executable, script, *words], check=True)


def main(llama_cpp: str) -> None:
    shutil.rmtree(HERE, ignore_errors=True)
    for name in CASES:
        make(name, Path(llama_cpp))
    versions = {"llama.cpp": "as vendored in llama-cpp-python 0.3.36", "torch": torch.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
