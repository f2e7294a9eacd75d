"""Tiny bases for every row of ``keymaps/gguf_models``: configs, and deltas of the right shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from loratools.adapter import Adapter, in_natural_order
from loratools.deltas import ExpertLoRA, LayerDelta, LoRA
from loratools.keymaps.gguf_base import GGUFBase
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_names import spell
from loratools.keymaps.gguf_to import experts_of

HIDDEN, HEADS, KEYS, SIZE, EXPERTS, BLOCKS, FF = 32, 4, 2, 8, 3, 2, 12
VOCABULARY = 40

CONFIG: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KEYS,
    "num_hidden_layers": BLOCKS,
    "intermediate_size": FF,
    "moe_intermediate_size": FF,
    "num_experts": EXPERTS,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
    "linear_key_head_dim": 4,
    "linear_value_head_dim": 3,
    # latent attention
    "qk_nope_head_dim": 5,
    "qk_rope_head_dim": 4,
    "v_head_dim": 3,
    "kv_lora_rank": HIDDEN,
    "q_lora_rank": HIDDEN,
    # indexers
    "indexer_n_heads": 2,
    "indexer_head_dim": 4,
    # state spaces
    "mamba_d_ssm": 6,
    "mamba_n_groups": 2,
    "mamba_d_state": 3,
    "ssm_multipliers": [0.5, 2.0, 3.0, 0.25, 5.0],
    "ssm_in_multiplier": 1.5,
    "ssm_out_multiplier": 0.75,
    "attention_in_multiplier": 1.25,
    "attention_out_multiplier": 0.6,
    "key_multiplier": 0.3,
    "mlp_multipliers": [0.7, 1.9],
    "embedding_multiplier": 5.5,
    "lm_head_multiplier": 0.04,
    "rescale_every": 1,
    "mup_embeddings_scale": 9.0,
    "mup_output_alpha": 2.0,
    "mup_width_scale": 0.125,
    "head_dim": SIZE,
    "ffn_config": {"moe_num_experts": EXPERTS, "ffn_hidden_size": FF},
}
"""One config with the words of every family; a test takes those that a row asks for."""

SPECIAL: dict[str, dict[str, Any]] = {
    "Glm4ForCausalLM": {
        "rope_parameters": {"mrope_section": [1, 1, 0], "partial_rotary_factor": 0.5}
    },
    "BaichuanForCausalLM": {"num_key_value_heads": HEADS},
    "XverseForCausalLM": {"num_key_value_heads": HEADS},
    "BloomForCausalLM": {"num_key_value_heads": HEADS},
    "PlamoForCausalLM": {"num_attention_heads": 40},
    "RuGPT3XLForCausalLM": {"num_key_value_heads": HEADS},
    "GroveMoeForCausalLM": {"num_experts": 2 * EXPERTS},
    "HrmTextForCausalLM": {"num_layers_per_stack": BLOCKS},
    "LagunaForCausalLM": {"num_attention_heads_per_layer": [HEADS] * BLOCKS},
}
"""First class of a row → what its config says otherwise."""

CONVERTER: dict[str, Any] = {
    "rope_theta": 10000.0,
    "rope_parameters": {},
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "layer_norm_epsilon": 1e-5,
    "layer_norm_rms_epsilon": 1e-5,
    "hidden_act": "silu",
    "n_layer": BLOCKS,
    "num_transformer_layers": BLOCKS,
    "num_local_experts": EXPERTS,
    "n_routed_experts": EXPERTS,
    "moe_num_experts": EXPERTS,
    "moe_num_primary_experts": EXPERTS,
    "num_experts_per_tok": 1,
    "expert_layer_offset": 0,
    "expert_layer_period": 1,
    "shared_intermediate_size": FF,
    "intermediate_size_mlp": FF,
    "layer_types": ["mamba", "attention"],
    "layers_block_type": ["mamba", "attention"],
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "mamba_d_head": 4,
    "mamba_n_heads": 4,
    "mamba_num_heads": 2,
    "mamba_head_dim": 4,
    "n_groups": 2,
    "ssm_state_size": 4,
    "num_layers_per_stack": BLOCKS,
    "L_cycles": 1,
    "H_cycles": 1,
    "full_attention_interval": 4,
    "attn_layer_indices": [1],
    "attn_type_list": [0, 1],
    "n_group": 1,
    "first_k_dense_replace": 0,
    "position_embedding_type": "alibi",
    "activation_function": "swiglu",
    "num_query_heads": [HEADS] * BLOCKS,
    "ffn_multipliers": [1.0] * BLOCKS,
    "ffn_dim_divisor": 1,
    "model_dim": HIDDEN,
    "index_n_heads": 2,
    "index_head_dim": 4,
    "indexer_types": ["full"] * BLOCKS,
    "hybrid_layer_pattern": [0] * BLOCKS,
    "moe_layer_freq": [1] * BLOCKS,
    "conv_L_cache": 3,
    "altup_num_inputs": 4,
    "activation_sparsity_pattern": [0.0] * BLOCKS,
    "qk_scale_factor": 1.0,
    "gating": "per-head",
    "ple_config": {},
    "linear_attn_config": {
        "full_attn_layers": [2],
        "kda_layers": [1],
        "short_conv_kernel_size": 4,
        "head_dim": SIZE,
        "num_heads": HEADS,
    },
    "num_hash_layers": 0,
    "topk_method": "noaux_tc",
    "swa_qk_nope_head_dim": 5,
    "swa_qk_rope_head_dim": 4,
    "swa_v_head_dim": 3,
    "swa_head_dim": 9,
    "swa_kv_lora_rank": HIDDEN,
    "swa_num_attention_heads": HEADS,
    "scoring_func": "sigmoid",
    "layer_group_size": 2,
}
"""What constructors of llama.cpp's converters also ask for."""

PLAMO = 80
"""Rows and columns of PLaMo's attention: any multiple of its 40 heads."""
PLAMO_OF_THE_CONVERTER = {"plamo_q": 5120, "plamo_o": 5120}

_QKV = (HEADS + 2 * KEYS) * SIZE
_ROWS: dict[str, int] = {
    "rotary_q": HEADS * SIZE,
    "rotary_k": KEYS * SIZE,
    "rotary_k_divided": HEADS * SIZE,
    "mrope_q": HEADS * SIZE,
    "mrope_k": KEYS * SIZE,
    "thirds": 3 * HEADS * SIZE,
    "heads_of_three": 3 * HEADS * SIZE,
    "quarters": 4 * HIDDEN,
    "halves": 2 * FF,
    "qkv": _QKV,
    "qkv_rotary": _QKV,
    "qkv_grouped": _QKV,
    "falcon_groups": _QKV,
    "qkv_fusing": HIDDEN,
    "indexer_qk": 3 * 4,
    "qkvz": 2 * (2 * 4 + 2 * 3 * 3),
    "value_heads_after_keys": 2 * 2 * 4 + 6 * 3,
    "latent_kv": KEYS * (5 + 3),
    "latent_heads": HEADS * (5 + 3),
    "expert_rows": EXPERTS * FF,
    "expert_rows_turned": EXPERTS * FF,
    "negated_halves": HEADS * SIZE,
    "falcon_h1_in": 2 * 6 + 2 * 6 + 4,
    "plamo_q": PLAMO,
    "plamo_o": PLAMO,
}
"""Layout → output rows of a weight that it fits; 12 for all others."""

_COLUMNS: dict[str, int] = {"plamo_q": PLAMO, "plamo_o": PLAMO, "value_heads_in": 6 * 3}
_STACKS: dict[str, tuple[int, int]] = {
    "experts_gate_up": (2 * FF, HIDDEN),
    "experts_in": (FF, HIDDEN),
    "experts_down": (HIDDEN, FF),
    "experts_gate_up_turned": (HIDDEN, 2 * FF),
    "experts_gate_up_woven": (HIDDEN, 2 * FF),
    "experts_down_turned": (FF, HIDDEN),
}
"""Layout of parameters that hold all experts → shape of one as stored."""


_BY_NAME: dict[str, int] = {
    "input_linear": 2 * FF,
    "transformer.h.{i}.mlp.gate_up_proj": 512,
    "transformer.layers.{i}.ffn.proj_1": 2 * HIDDEN,
    "in_proj_z": 6 * 3,
    "in_proj_a": 6,
    "in_proj_b": 6,
    "kv": 2 * SIZE,
    "g_proj": HEADS,
}
"""Last part of a module's name → output rows, where the layout does not tell."""


def config_of(model: GGUFModel) -> dict[str, Any]:
    """Return a tiny config.json for the first class of a row, as the row needs it."""
    name = model.classes[0]
    config = {**CONFIG, "architectures": [name], **SPECIAL.get(name, {})}
    for word, is_set in model.needs.items():
        config[word] = config.get(word) or 1 if is_set else None
    if "mamba_layers" in model.needs:
        config["layer_types"] = ["mamba" if config["mamba_layers"] else "attention", "attention"]
    if model.arch == "mistral4":
        config["model_type"] = "mistral4"
    return config


def converter_config(model: GGUFModel) -> dict[str, Any]:
    """Return the same with everything that llama.cpp's constructors read."""
    config = config_of(model)
    full = {**CONVERTER, **config}
    full |= {
        "n_head": config["num_attention_heads"],
        "n_embd": config["hidden_size"],
        "d_model": config["hidden_size"],
        "num_kv_heads": config["num_key_value_heads"],
    }
    if not config["num_experts"]:
        full |= dict.fromkeys(("n_routed_experts", "moe_num_experts", "num_experts_per_tok"))
        full["num_local_experts"] = 0
    elif config["num_experts"] != EXPERTS:
        del full["num_local_experts"]
    if config.get("mamba_layers") is None and "mamba_layers" in model.needs:
        full["attn_layer_indices"] = list(range(BLOCKS))
    if model.arch == "openelm":
        full["num_kv_heads"] = [KEYS] * BLOCKS
    return {word: value for word, value in full.items() if value is not None}


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def delta_for(
    step: Step, place: int, seed: int, rank: int = 2, alpha: float = 4.0, experts: int = EXPERTS
) -> LayerDelta:
    """Return a LoRA for a source of a row, in the shape that the checkpoint stores."""
    layout = getattr(step.layout, "__name__", "")
    name = step.sources[place]
    special = _BY_NAME.get(name) or _BY_NAME.get(name.rpartition(".")[2])
    if layout in _STACKS:
        out, inner = _STACKS[layout]
        out *= 2 if layout == "experts_in" and step.targets[0].endswith("gate_up_exps") else 1
        return ExpertLoRA(
            random(seed, experts, rank, inner), random(seed + 1, experts, out, rank), alpha
        )
    rows, columns = special or _ROWS.get(layout, FF), _COLUMNS.get(layout, HIDDEN)
    role = "embedding" if step.targets == ("token_embd",) else "linear"
    if role == "embedding":
        return LoRA(
            random(seed, rank, VOCABULARY), random(seed + 1, HIDDEN, rank), alpha, role=role
        )
    return LoRA(random(seed, rank, columns), random(seed + 1, rows, rank), alpha)


def paths_of(step: Step, block: int, count: int = EXPERTS) -> Iterator[tuple[str, int]]:
    """Yield the module paths of a row in a block, with the place of each."""
    for place, name in enumerate(step.sources):
        experts = range(count) if "{e}" in name else (None,)
        for expert in experts:
            yield spell(name, block, expert, 0), place


def adapter_for(steps: tuple[Step, ...], base: GGUFBase, block: int = 1, **words: Any) -> Adapter:
    """Return an adapter of some rows of a model, in one block."""
    layers: dict[str, LayerDelta] = {}
    experts = base.config.get("num_experts") or EXPERTS
    for step in steps:
        count = experts_of(step, base, block) if step.stacks else 0
        for path, place in paths_of(step, block, count):
            seed = len(layers) * 2 + 7
            layers[path] = delta_for(step, place, seed, experts=experts, **words)
    return Adapter(in_natural_order(layers))


def use_sizes_of_the_converter() -> None:
    """Take the sizes that llama.cpp's converter has built in."""
    _ROWS.update(PLAMO_OF_THE_CONVERTER)
    _COLUMNS.update(PLAMO_OF_THE_CONVERTER)


def step_sets(model: GGUFModel) -> list[tuple[Step, ...]]:
    """Return the rows of a model that are converted together: experts' projections, or one row."""
    sets: dict[str, list[Step]] = {}
    for step in sorted(model.steps, key=lambda step: not step.stacks):
        key = step.sources[0].split("{e}")[0] if step.stacks else repr(step)
        sets.setdefault(key, []).append(step)
    return [tuple(found) for found in sets.values()]
