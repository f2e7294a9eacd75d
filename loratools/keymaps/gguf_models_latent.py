"""Model families with latent attention whose llama.cpp graphs apply few of an adapter's tensors.

See ``gguf_runtime`` for which; the rows say where every tensor would be.
"""

from __future__ import annotations

from loratools.keymaps import gguf_layouts as lay
from loratools.keymaps.gguf_model import GGUFModel
from loratools.keymaps.gguf_rows import (
    GATED,
    INDEXER,
    LAYERS,
    MIXTURE,
    SHARED_EXPERTS,
    SPARSE,
    TOP,
    Line,
    gated,
    rows,
    top,
)

M = GGUFModel

_QUERIES: tuple[Line, ...] = (
    ("self_attn.q_a_proj", "attn_q_a"),
    ("self_attn.q_b_proj", "attn_q_b"),
    ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
    ("self_attn.o_proj", "attn_output"),
)
_OWN: tuple[Line, ...] = (
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.f_a_proj", "ssm_f_a"),
    ("self_attn.f_b_proj", "ssm_f_b"),
    ("self_attn.b_proj", "ssm_beta"),
)
_SPARSE_SHARED = rows(LAYERS, *gated("block_sparse_moe.shared_experts.", "_shexp"))

LATENT_MODELS: tuple[GGUFModel, ...] = (
    M(
        "kimi-linear",
        ("KimiLinearForCausalLM", "KimiLinearModel"),
        rows(
            LAYERS,
            *_QUERIES,
            *_OWN,
            ("self_attn.g_a_proj", "ssm_g_a"),
            ("self_attn.g_b_proj", "ssm_g_b"),
            ("self_attn.kv_b_proj", "attn_k_b attn_v_b", lay.latent_kv),
        )
        + GATED
        + SPARSE
        + _SPARSE_SHARED
        + TOP,
    ),
    M(
        "kimi-k3",
        ("KimiK3ForConditionalGeneration",),
        rows(
            LAYERS,
            *_QUERIES,
            *_OWN,
            ("self_attn.kv_b_proj", "attn_k_b attn_v_b", lay.latent_kv),
        )
        + GATED
        + SPARSE
        + _SPARSE_SHARED
        + TOP,
    ),
    M(
        "hy_v4",
        ("HYV4ForCausalLM",),
        rows(
            LAYERS,
            *_QUERIES,
            ("self_attn.kv_b_proj", "attn_k_b attn_v_b", lay.latent_kv),
            ("self_attn.g_proj", "attn_gate"),
            ("mlp.experts.gate_up_proj", "ffn_gate_exps ffn_up_exps", lay.experts_gate_up),
            ("mlp.experts.down_proj", "ffn_down_exps", lay.experts_down),
            ("mlp.gate", "ffn_gate_inp"),
        )
        + INDEXER
        + GATED
        + SHARED_EXPERTS
        + TOP,
    ),
    M(
        "glm5-next",
        ("Glm5NextForConditionalGeneration",),
        rows(
            LAYERS,
            *_QUERIES,
            ("self_attn.kv_b_proj", "attn_k_b attn_v_b", lay.latent_heads),
        )
        + INDEXER
        + GATED
        + MIXTURE
        + SHARED_EXPERTS
        + TOP,
    ),
    M(
        "dots3note",
        (
            "Dots3NoteForCausalLM",
            "Dots3NoteForConditionalGeneration",
            "Dots3NoteTextForCausalLM",
        ),
        rows(LAYERS, *_QUERIES, ("self_attn.g_proj", "attn_gate"))
        + INDEXER
        + GATED
        + MIXTURE
        + SHARED_EXPERTS
        + TOP,
    ),
    M(
        "bailingmoe3",
        ("BailingMoeV3ForCausalLM",),
        rows(
            LAYERS,
            ("attention.q_a_proj", "attn_q_a"),
            ("attention.q_b_proj", "attn_q_b"),
            ("attention.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
            ("attention.dense", "attn_output"),
            ("attention.kv_b_proj", "attn_k_b attn_v_b", lay.latent_heads),
        )
        + GATED
        + MIXTURE
        + SHARED_EXPERTS
        + top("model.word_embeddings"),
    ),
    M(
        "deepseek4",
        ("DeepseekV4ForCausalLM",),
        rows(
            "layers.{i}.",
            ("attn.wq_a", "attn_q_a"),
            ("attn.wq_b", "attn_q_b"),
            ("attn.wkv", "attn_kv"),
            ("attn.wo_a", "attn_output_a"),
            ("attn.wo_b", "attn_output_b"),
            ("attn.indexer.wq_b", "indexer.attn_q_b"),
            ("attn.indexer.weights_proj", "indexer.proj"),
            ("ffn.gate", "ffn_gate_inp"),
            *gated("ffn.shared_experts.", "_shexp", "w1 w3 w2"),
        )
        + top("embed", "head"),
    ),
)
