"""Mixtures of experts whose blocks are otherwise plain attention, or latent attention."""

from __future__ import annotations

from loratools.keymaps import gguf_layouts as lay
from loratools.keymaps.gguf_model import GGUFModel
from loratools.keymaps.gguf_rows import (
    ATTENTION,
    EXPERTS,
    FUSED_EXPERTS,
    GATED,
    GRANITE_EXPERTS,
    GRANITE_SHARED,
    IN_MEMORY,
    INDEXER,
    LATENT,
    LAYERS,
    MIXTURE,
    PLAIN_MLP,
    ROTARY,
    SHARED_EXPERTS,
    SHARED_MLP,
    SPARSE,
    TOP,
    gated,
    rows,
    top,
)

M = GGUFModel
_DENSE = ATTENTION + GATED + TOP
_DEEPSEEK = LATENT + GATED + MIXTURE + SHARED_EXPERTS + TOP

MIXTURE_MODELS: tuple[GGUFModel, ...] = (
    M("olmoe", ("OlmoeForCausalLM",), ATTENTION + MIXTURE + TOP),
    M("llada-moe", ("LLaDAMoEModel", "LLaDAMoEModelLM"), ATTENTION + MIXTURE + TOP),
    M(
        "glm4moe",
        (
            "Glm4MoeForCausalLM",
            "Glm4vMoeForConditionalGeneration",
            "SolarOpenForCausalLM",
        ),
        _DENSE + MIXTURE + SHARED_EXPERTS,
    ),
    M("ernie4_5-moe", ("Ernie4_5_MoeForCausalLM",), _DENSE + MIXTURE + SHARED_EXPERTS),
    M(
        "hunyuan-moe",
        ("HunYuanMoEV1ForCausalLM",),
        ATTENTION
        + TOP
        + rows(LAYERS, ("mlp.gate.wg", "ffn_gate_inp"))
        + EXPERTS
        + FUSED_EXPERTS
        + SHARED_MLP,
    ),
    M(
        "hy_v3",
        ("HYV3ForCausalLM",),
        _DENSE
        + rows(LAYERS, ("mlp.router.gate", "ffn_gate_inp"))
        + EXPERTS
        + FUSED_EXPERTS
        + SHARED_MLP,
    ),
    M(
        "exaone-moe",
        ("ExaoneMoEForCausalLM", "ExaoneMoeForCausalLM"),
        _DENSE + MIXTURE + SHARED_EXPERTS,
    ),
    M("cohere2moe", ("Cohere2MoeForCausalLM",), _DENSE + MIXTURE + SHARED_EXPERTS),
    M(
        "afmoe",
        ("AfmoeForCausalLM",),
        _DENSE
        + rows(LAYERS, ("self_attn.gate_proj", "attn_gate"), ("mlp.router.gate", "ffn_gate_inp"))
        + EXPERTS
        + FUSED_EXPERTS
        + SHARED_EXPERTS,
    ),
    M(
        "gpt-oss",
        ("GptOssForCausalLM",),
        ATTENTION
        + rows(
            LAYERS,
            ("mlp.router", "ffn_gate_inp"),
            ("mlp.experts.gate_up_proj", "ffn_gate_exps ffn_up_exps", lay.experts_gate_up_woven),
            ("mlp.experts.down_proj", "ffn_down_exps", lay.experts_down_turned),
        )
        + TOP,
    ),
    M(
        "minimax-01",
        ("MiniMaxText01ForCausalLM", "MiniMaxM1ForCausalLM"),
        ATTENTION
        + SPARSE
        + rows(
            LAYERS,
            ("self_attn.qkv_proj", "attn_qkv"),
            ("self_attn.out_proj", "attn_output"),
            ("self_attn.output_gate", "attn_gate"),
        )
        + IN_MEMORY
        + TOP,
    ),
    M("minimax-m2", ("MiniMaxM2ForCausalLM",), ATTENTION + SPARSE + IN_MEMORY + TOP),
    M(
        "minimax-m3",
        (
            "MiniMaxM3SparseForCausalLM",
            "MiniMaxM3SparseForConditionalGeneration",
        ),
        ATTENTION
        + GATED
        + SPARSE
        + IN_MEMORY
        + rows(
            LAYERS,
            *gated("block_sparse_moe.shared_experts.", "_shexp"),
        )
        + TOP,
    ),
    M(
        "mimo2",
        ("MiMoV2FlashForCausalLM", "MiMoV2ForCausalLM"),
        _DENSE
        + MIXTURE
        + rows(
            LAYERS,
            ("self_attn.qkv_proj", "attn_qkv"),
        ),
    ),
    M(
        "grovemoe",
        ("GroveMoeForCausalLM", "modeling_grove_moe.GroveMoeForCausalLM"),
        ATTENTION + TOP + MIXTURE + rows(LAYERS, *gated("mlp.chunk_experts.{e}.", "_chexps")),
    ),
    M(
        "smallthinker",
        ("SmallThinkerForCausalLM",),
        ATTENTION
        + rows(
            LAYERS,
            ("block_sparse_moe.primary_router", "ffn_gate_inp"),
            *gated("block_sparse_moe.experts.{e}.", "_exps", "gate up down"),
        )
        + TOP,
    ),
    M(
        "laguna",
        ("LagunaForCausalLM",),
        _DENSE
        + MIXTURE
        + rows(
            LAYERS,
            ("self_attn.g_proj", "attn_gate"),
            *gated("mlp.shared_expert.", "_shexp"),
        ),
    ),
    M("maple", ("MapleForCausalLM",), ATTENTION + TOP + MIXTURE),
    M("mellum", ("MellumForCausalLM",), ATTENTION + TOP + MIXTURE),
    M(
        "bailingmoe",
        ("BailingMoeForCausalLM",),
        rows(
            LAYERS,
            ("attention.query_key_value", "attn_q attn_k attn_v", lay.qkv_rotary),
            ("attention.dense", "attn_output"),
        )
        + MIXTURE
        + SHARED_EXPERTS
        + top("model.word_embeddings"),
    ),
    M(
        "bailingmoe2",
        (
            "BailingMoeV2ForCausalLM",
            "SarvamMoEForCausalLM",
            "modeling_sarvam_moe.SarvamMoEForCausalLM",
        ),
        rows(
            LAYERS,
            ("attention.query_key_value", "attn_qkv"),
            ("attention.dense", "attn_output"),
        )
        + GATED
        + MIXTURE
        + SHARED_EXPERTS
        + top("model.word_embeddings"),
    ),
    M(
        "granitemoe",
        ("GraniteMoeForCausalLM", "GraniteMoeSharedForCausalLM"),
        ROTARY + GRANITE_EXPERTS + GRANITE_SHARED + TOP,
    ),
    M(
        "granite_swa",
        ("GraniteMoeSWAForCausalLM",),
        ROTARY
        + rows(
            LAYERS,
            ("block_sparse_moe.router.layer", "ffn_gate_inp"),
            ("block_sparse_moe.input_linear", "ffn_gate_up_exps", lay.experts_in),
            ("block_sparse_moe.output_linear", "ffn_down_exps", lay.experts_down),
            ("block_sparse_moe.experts.gate_up_proj", "ffn_gate_up_exps", lay.experts_in),
            ("block_sparse_moe.experts.down_proj", "ffn_down_exps", lay.experts_down),
            ("shared_mlp.input_linear", "ffn_up_shexp"),
            ("shared_mlp.output_linear", "ffn_down_shexp"),
        )
        + TOP,
    ),
    M(
        "step35",
        ("Step3p5ForCausalLM", "Step3p7ForConditionalGeneration"),
        _DENSE
        + rows(
            LAYERS,
            ("self_attn.g_proj", "attn_gate"),
            ("moe.gate", "ffn_gate_inp"),
            ("moe.gate_proj", "ffn_gate_exps", lay.experts_in),
            ("moe.up_proj", "ffn_up_exps", lay.experts_in),
            ("moe.down_proj", "ffn_down_exps", lay.experts_down),
            *gated("share_expert.", "_shexp"),
        ),
    ),
    M(
        "deepseek2",
        (
            "DeepseekV2ForCausalLM",
            "DeepseekV3ForCausalLM",
            "DeepseekOCRForCausalLM",
            "UnlimitedOCRForCausalLM",
            "KimiVLForConditionalGeneration",
            "KimiK25ForConditionalGeneration",
            "YoutuForCausalLM",
            "YoutuVLForConditionalGeneration",
            "Glm4MoeLiteForCausalLM",
        ),
        _DEEPSEEK,
    ),
    M("deepseek32", ("DeepseekV32ForCausalLM",), _DEEPSEEK + INDEXER),
    M("glm-dsa", ("GlmMoeDsaForCausalLM",), _DEEPSEEK + INDEXER),
    M(
        "plm",
        ("PLMForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
            ("self_attn.kv_b_proj", "attn_kv_b"),
            ("self_attn.o_proj", "attn_output"),
        )
        + PLAIN_MLP
        + TOP,
    ),
    M(
        "minicpm3",
        ("MiniCPM3ForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.q_a_proj", "attn_q_a"),
            ("self_attn.q_b_proj", "attn_q_b"),
            ("self_attn.kv_a_proj_with_mqa", "attn_kv_a_mqa"),
            ("self_attn.kv_b_proj", "attn_kv_b"),
            ("self_attn.o_proj", "attn_output"),
        )
        + GATED
        + TOP,
    ),
)
