"""Rows about mlx-lm's models: what they call modules otherwise than transformers does.

Source: mlx-lm 0.32 ``models/*.py`` (attribute names, ``sanitize``) and ``utils.py``
(``MODEL_REMAPPING``). A type without a row has transformers' names, its experts in ``switch_mlp``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""An expert's matrices: those of its input side as they are fused, and its output."""


@dataclass(frozen=True, slots=True)
class MLXRow:
    """How one type of model differs.

    Attributes:
        prefixes: (transformers' beginning of a name, mlx-lm's); the first that fits is taken.
        inner: (transformers' part of a name, mlx-lm's), each once where it occurs.
        stack: what stands in mlx-lm's names for ``experts``.
        owner: (parent of ``experts`` in transformers' memory, mlx-lm's), where they differ.
        disk: checkpoint's names of an expert's gate, up and down.
        stacked: mlx-lm's names of the three.
        fused: whether checkpoints have all experts in one tensor, gates and ups together.
        woven: whether gates and ups take turns there.
        absent: ends of modules' names that are no linear layer in mlx-lm.
        other_values: whether mlx-lm changes the numbers of norms and heads as it loads.
    """

    prefixes: tuple[tuple[str, str], ...] = ()
    inner: tuple[tuple[str, str], ...] = ()
    stack: str = "switch_mlp"
    owner: tuple[str, str] | None = None
    disk: tuple[str, str, str] = PROJECTIONS
    stacked: tuple[str, str, str] = PROJECTIONS
    fused: bool = False
    woven: bool = False
    absent: tuple[str, ...] = ()
    other_values: bool = False


NESTED: tuple[tuple[str, str], ...] = (
    ("model.language_model.", "language_model.model."),
    ("language_model.", "language_model."),
    ("model.", "language_model.model."),
    ("lm_head", "language_model.lm_head"),
)
"""A language model inside one for images, of which mlx-lm keeps the shell."""

_W = ("w1", "w3", "w2")
_SPARSE = ("mlp", "block_sparse_moe")
_LATENT = ("kv_b_proj",)
_nested = MLXRow(NESTED)
_mixtral = MLXRow(inner=((".mlp.gate", ".block_sparse_moe.gate"),), owner=_SPARSE, disk=_W)
_latent = MLXRow(absent=_LATENT)
_in_experts = MLXRow(stack="experts")
_granite = MLXRow(
    inner=(
        (".block_sparse_moe.input_linear", ".block_sparse_moe.experts.gate_up_proj"),
        (".block_sparse_moe.output_linear", ".block_sparse_moe.experts.down_proj"),
    ),
    fused=True,
)

ROWS: Mapping[str, MLXRow] = {
    "gpt2": MLXRow((("transformer.", "model."),)),
    "gptj": MLXRow((("transformer.", "model."),)),
    "gpt_neox": MLXRow(
        (
            ("gpt_neox.layers.", "model.h."),
            ("gpt_neox.", "model."),
            ("lm_head", "model.embed_out"),
            ("embed_out", "model.embed_out"),
        )
    ),
    **dict.fromkeys(
        (
            "gemma3", "gemma4", "gemma4_unified", "mistral3", "pixtral", "llava", "qwen2_vl",
            "qwen2_5_vl", "qwen3_vl", "qwen3_5", "lfm2-vl", "lfm2_vl",
        ),
        _nested,
    ),
    "kimi_vl": _nested,
    "kimi_k25": MLXRow(NESTED, absent=_LATENT),
    "qwen3_vl_moe": MLXRow(NESTED, fused=True),
    "qwen3_5_moe": MLXRow(NESTED, fused=True),
    "llama4": MLXRow(NESTED, stack="experts", fused=True),
    "gpt_oss": MLXRow(stack="experts", fused=True, woven=True),
    **dict.fromkeys(("dots1", "afmoe", "Klear"), _in_experts),
    **dict.fromkeys(("mixtral", "phimoe", "minimax", "minimax_m2"), _mixtral),
    **dict.fromkeys(
        (
            "deepseek_v3", "deepseek_v32", "kimi_k2", "joyai_llm_flash", "glm4_moe_lite",
            "glm_moe_dsa", "longcat_flash", "bailing_hybrid", "mistral4",
        ),
        _latent,
    ),
    **dict.fromkeys(("granitemoe", "granitemoehybrid"), _granite),
    "lfm2_moe": MLXRow(
        inner=(
            (".feed_forward.w1", ".feed_forward.gate_proj"),
            (".feed_forward.w2", ".feed_forward.down_proj"),
            (".feed_forward.w3", ".feed_forward.up_proj"),
        ),
        disk=_W,
    ),
    "nemotron_h": MLXRow(stacked=("", "fc1", "fc2")),
    "qwen3_next": MLXRow(other_values=True),
    **dict.fromkeys(("step3p5", "baichuan_m1"), MLXRow(other_values=True)),
    **dict.fromkeys(
        ("bailing_moe", "bailing_moe_linear"),
        MLXRow(inner=((".mlp.gate", ".mlp.gate.gate_proj"),), other_values=True),
    ),
}  # fmt: skip
"""``model_type`` → how it differs."""

FUSED_IN_MEMORY: frozenset[str] = frozenset(
    {
        "afmoe", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "dots1",
        "ernie4_5_moe", "exaone_moe", "glm4_moe", "glm4_moe_lite", "glm_moe_dsa", "jamba",
        "lfm2_moe", "longcat_flash", "mellum", "minimax", "minimax_m2", "mixtral", "olmoe",
        "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_next",
    }
)  # fmt: skip
"""Types whose experts transformers 5 has in one parameter, which their checkpoints have apart."""

EXPERT_COUNTS = (
    "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts",
)  # fmt: skip
"""Words of a config for the number of experts."""

OWNER_DISK: Mapping[str, tuple[str, str, str]] = {"block_sparse_moe": _W}
"""Parent of the experts → checkpoint's names of their matrices, where the type is not known."""

NEOX_LEAVES = (".attention.query_key_value", ".attention.dense", ".mlp.dense_h_to_4h",
               ".mlp.dense_4h_to_h")  # fmt: skip
"""Ends of names that tell GPT-NeoX's blocks from GPT-2's."""
