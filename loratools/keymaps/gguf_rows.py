"""Sets of rows that many models share: names in checkpoints, names in GGUF.

A line of a table is a checkpoint's name, the GGUF names that it becomes, and the layout.
"""

from __future__ import annotations

from loratools.keymaps import gguf_layouts as lay
from loratools.keymaps.gguf_model import Layout, Step

Line = tuple[str, str] | tuple[str, str, Layout]

TOP = (Step(("model.embed_tokens",), ("token_embd",)), Step(("lm_head",), ("output",)))


def rows(prefix: str, *lines: Line, out: str = "blk.{i}.") -> tuple[Step, ...]:
    """Return steps for lines whose names, separated by spaces, follow the prefixes."""
    return tuple(
        Step(
            tuple(prefix + name for name in line[0].split()),
            tuple(out + name for name in line[1].split()),
            line[2] if len(line) == 3 else None,
        )
        for line in lines
    )


def top(embedding: str, head: str = "lm_head") -> tuple[Step, ...]:
    """Return the steps outside the blocks."""
    return (Step((embedding,), ("token_embd",)), Step((head,), ("output",)))


def alone(*steps: Step) -> tuple[Step, ...]:
    """Return steps that follow no prefix."""
    return steps


def gated(prefix: str, out: str = "", names: str = "gate_proj up_proj down_proj") -> list[Line]:
    """Return the lines of a gated feed-forward network; ``out`` ends its GGUF names."""
    kinds = ("ffn_gate", "ffn_up", "ffn_down")
    return [(prefix + name, kind + out) for name, kind in zip(names.split(), kinds, strict=True)]


LAYERS = "model.layers.{i}."
_QKV: tuple[Line, ...] = (
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
)
_OUT: tuple[Line, ...] = (("self_attn.o_proj", "attn_output"),)
_TURNING: tuple[Line, ...] = (
    ("self_attn.q_proj", "attn_q", lay.rotary_q),
    ("self_attn.k_proj", "attn_k", lay.rotary_k),
    ("self_attn.v_proj", "attn_v"),
)

ATTENTION = rows(LAYERS, *_QKV, *_OUT)
ROTARY = rows(LAYERS, *_TURNING, *_OUT)
"""Attention whose queries and keys stand in halves where llama.cpp wants pairs."""
FUSED_QKV = rows(LAYERS, ("self_attn.qkv_proj", "attn_qkv"), *_OUT)
GATED = rows(LAYERS, *gated("mlp."))
FUSED_GATED = rows(LAYERS, ("mlp.gate_up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"))
PLAIN_MLP = rows(LAYERS, ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down"))
FC_MLP = rows(LAYERS, ("mlp.fc1", "ffn_up"), ("mlp.fc2", "ffn_down"))
C_MLP = rows(LAYERS, ("mlp.c_fc", "ffn_up"), ("mlp.c_proj", "ffn_down"))

ROUTER = rows(LAYERS, ("mlp.gate", "ffn_gate_inp"))
EXPERTS = rows(LAYERS, *gated("mlp.experts.{e}.", "_exps"))
FUSED_EXPERTS = rows(
    LAYERS,
    ("mlp.experts.gate_up_proj", "ffn_gate_exps ffn_up_exps", lay.experts_gate_up),
    ("mlp.experts.down_proj", "ffn_down_exps", lay.experts_down),
)
"""As transformers 5 keeps experts in memory, whatever the checkpoint does."""
SHARED_EXPERT = rows(
    LAYERS, *gated("mlp.shared_expert.", "_shexp"), ("mlp.shared_expert_gate", "ffn_gate_inp_shexp")
)
SHARED_EXPERTS = rows(LAYERS, *gated("mlp.shared_experts.", "_shexp"))
SHARED_MLP = rows(LAYERS, *gated("mlp.shared_mlp.", "_shexp"))

_W = "w1 w3 w2"
SPARSE = rows(
    LAYERS,
    ("block_sparse_moe.gate", "ffn_gate_inp"),
    *gated("block_sparse_moe.experts.{e}.", "_exps", _W),
)
"""Mixtral's names, and those of its relatives."""
IN_MEMORY = ROUTER + FUSED_EXPERTS
MIXTURE = ROUTER + EXPERTS + FUSED_EXPERTS
LATENT = rows(
    LAYERS,
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.kv_b_proj", "attn_k_b attn_v_b", lay.latent_kv),
    *_OUT,
)
INDEXER = rows(
    LAYERS,
    ("self_attn.indexer.wk", "indexer.attn_k"),
    ("self_attn.indexer.wq_b", "indexer.attn_q_b"),
    ("self_attn.indexer.weights_proj", "indexer.proj"),
)
GRANITE_EXPERTS = rows(
    LAYERS,
    ("block_sparse_moe.router.layer", "ffn_gate_inp"),
    ("block_sparse_moe.input_linear", "ffn_gate_exps ffn_up_exps", lay.experts_gate_up),
    ("block_sparse_moe.output_linear", "ffn_down_exps", lay.experts_down),
    ("block_sparse_moe.experts.gate_up_proj", "ffn_gate_exps ffn_up_exps", lay.experts_gate_up),
    ("block_sparse_moe.experts.down_proj", "ffn_down_exps", lay.experts_down),
)
GRANITE_SHARED = rows(
    LAYERS,
    ("shared_mlp.input_linear", "ffn_gate_shexp ffn_up_shexp", lay.halves),
    ("shared_mlp.output_linear", "ffn_down_shexp"),
)
GRANITE_DENSE = rows(
    LAYERS,
    ("shared_mlp.input_linear", "ffn_gate ffn_up", lay.halves),
    ("shared_mlp.output_linear", "ffn_down"),
)
"""The shared network of a model without experts is all that it has."""
LINEAR = rows(
    LAYERS,
    ("linear_attn.in_proj_qkv", "attn_qkv", lay.value_heads_after_keys),
    ("linear_attn.in_proj_z", "attn_gate", lay.value_heads),
    ("linear_attn.in_proj_a", "ssm_alpha", lay.value_heads),
    ("linear_attn.in_proj_b", "ssm_beta", lay.value_heads),
    ("linear_attn.out_proj", "ssm_out", lay.value_heads_in),
)
"""Qwen3.5's linear attention."""


def mamba(prefix: str = "backbone.layers.{i}.mixer.") -> tuple[Step, ...]:
    """Return the rows of a state-space block."""
    return mamba2(prefix) + rows(prefix, ("x_proj", "ssm_x"), ("dt_proj", "ssm_dt"))


def mamba2(prefix: str = "backbone.layers.{i}.mixer.") -> tuple[Step, ...]:
    """Return the rows of a state-space block of the second kind."""
    return rows(prefix, ("in_proj", "ssm_in"), ("out_proj", "ssm_out"))
