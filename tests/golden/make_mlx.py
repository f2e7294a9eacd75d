"""Make the golden adapters of mlx-lm: its own layers, its own files, and what it fuses them to.

    python tests/golden/make_mlx.py

Needs mlx-lm (requirements/mlx.txt). Versions stand in ``mlx/versions.json``. For each case
``mlx/sources/<case>`` holds the base as a checkpoint, and the fused weights in mlx-lm's names.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config
from safetensors.numpy import save_file

HERE = Path(__file__).parent / "mlx"
COMMON = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 20,
    "num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "head_dim": 8,
    "rope_theta": 10000.0, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **COMMON}
MIXTURE = {
    "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], **COMMON,
    "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 8,
    "decoder_sparse_step": 1, "mlp_only_layers": [], "norm_topk_prob": True,
}  # fmt: skip
CASES: dict[str, tuple[dict, str, int, dict]] = {
    # config, fine_tune_type, num_layers, lora_parameters
    "lora": (LLAMA, "lora", 1, {"rank": 3, "scale": 20.0, "dropout": 0.0}),
    "lora-keys": (
        LLAMA, "lora", -1,
        {
            "rank": 2, "scale": 0.1, "dropout": 0.05,
            "keys": ["self_attn.q_proj", "mlp.down_proj", "lm_head", "model.embed_tokens"],
        },
    ),
    "dora": (
        LLAMA, "dora", 2,
        {
            "rank": 2, "scale": 4.0, "dropout": 0.0,
            "keys": ["self_attn.v_proj", "mlp.up_proj", "model.embed_tokens"],
        },
    ),
    "mixture": (MIXTURE, "lora", 2, {"rank": 2, "scale": 10.0, "dropout": 0.0}),
    "full": (LLAMA, "full", 1, {"rank": 8, "scale": 20.0, "dropout": 0.0}),
}  # fmt: skip


def as_numpy(items: list[tuple[str, mx.array]]) -> dict[str, np.ndarray]:
    return {name: np.array(value.astype(mx.float32)) for name, value in items}


def on_disk(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the base as a checkpoint has it: one matrix an expert."""
    found = {}
    for name, value in tensors.items():
        if ".switch_mlp." not in name:
            found[name] = value
            continue
        for number, matrix in enumerate(value):
            found[name.replace("switch_mlp", f"experts.{number}")] = np.ascontiguousarray(matrix)
    return found


def make(name: str) -> None:
    config, kind, layers, parameters = CASES[name]
    family = llama if config["model_type"] == "llama" else qwen3_moe
    mx.random.seed(len(name))
    model = family.Model(family.ModelArgs.from_dict(config))
    model.set_dtype(mx.float32)
    source, folder = HERE / "sources" / name, HERE / name
    for made in (source, folder):
        made.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    base = as_numpy(tree_flatten(model.parameters()))
    save_file(on_disk(base), source / "model.safetensors", {"format": "pt"})
    model.freeze()
    if kind == "full":
        for layer in model.layers[-layers:]:
            layer.unfreeze()
    else:
        linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    trained = [
        (path, value + 0.1 * mx.random.normal(value.shape))
        for path, value in tree_flatten(model.trainable_parameters())
    ]
    model.load_weights(trained, strict=False)
    mx.save_safetensors(str(folder / "adapters.safetensors"), dict(trained))
    words = {
        "model": "example/tiny", "train": True, "fine_tune_type": kind, "num_layers": layers,
        "batch_size": 4, "iters": 100, "seed": 0, "lora_parameters": parameters,
    }  # fmt: skip
    save_config(words, folder / "adapter_config.json")
    fused = [(n, m.fuse()) for n, m in model.named_modules() if hasattr(m, "fuse")]
    model.update_modules(tree_unflatten(fused))
    after = as_numpy(tree_flatten(model.parameters()))
    changed = {n: v for n, v in after.items() if not np.array_equal(v, base[n])}
    save_file(changed, source / "expected.safetensors")


if __name__ == "__main__":
    shutil.rmtree(HERE, ignore_errors=True)
    mx.set_default_device(mx.cpu)
    for case in CASES:
        make(case)
    versions = {"mlx": mx.__version__, "mlx-lm": mlx_lm.__version__}
    (HERE / "versions.json").write_text(json.dumps(versions, indent=1) + "\n")
