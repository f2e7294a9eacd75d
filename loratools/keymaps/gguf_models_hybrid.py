"""Model families of several kinds of blocks: attention, linear attention, state spaces."""

from __future__ import annotations

from loratools.keymaps import gguf_layouts as lay
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_rows import (
    ATTENTION,
    GATED,
    GRANITE_DENSE,
    GRANITE_EXPERTS,
    GRANITE_SHARED,
    LAYERS,
    LINEAR,
    MIXTURE,
    ROTARY,
    SHARED_EXPERT,
    TOP,
    alone,
    gated,
    mamba,
    mamba2,
    rows,
    top,
)

M = GGUFModel

_MAMBA_TOP = top("backbone.embeddings")
_GRANITE_CLASS = ("GraniteMoeHybridForCausalLM",)
_GRANITE = ROTARY + mamba2("model.layers.{i}.mamba.") + TOP
_NEMOTRON = (
    mamba2()
    + rows(
        "backbone.layers.{i}.mixer.",
        # Permuted although the model has no rotary embedding, which changes nothing.
        ("q_proj", "attn_q", lay.rotary_q),
        ("k_proj", "attn_k", lay.rotary_k),
        ("v_proj", "attn_v"),
        ("o_proj", "attn_output"),
        ("up_proj", "ffn_up"),
        ("down_proj", "ffn_down"),
    )
    + _MAMBA_TOP
)

HYBRID_MODELS: tuple[GGUFModel, ...] = (
    M(
        "qwen3next",
        ("Qwen3NextForCausalLM",),
        ATTENTION
        + rows(
            LAYERS,
            ("linear_attn.in_proj_qkvz", "attn_qkv attn_gate", lay.qkvz),
            ("linear_attn.in_proj_ba", "ssm_ba"),
            ("linear_attn.out_proj", "ssm_out"),
        )
        + MIXTURE
        + SHARED_EXPERT
        + TOP,
    ),
    M(
        "qwen35",
        (
            "Qwen3_5ForCausalLM",
            "Qwen3_5ForConditionalGeneration",
            "MiniCPMV4_6ForConditionalGeneration",
        ),
        ATTENTION + LINEAR + GATED + TOP,
    ),
    M(
        "qwen35moe",
        ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeForConditionalGeneration"),
        ATTENTION + LINEAR + MIXTURE + SHARED_EXPERT + TOP,
    ),
    M(
        "qwen4exp",
        ("Qwen4ExpForCausalLM", "Qwen4ExpForConditionalGeneration"),
        ATTENTION
        + LINEAR
        + rows(
            LAYERS,
            (
                "self_attn.indexer.index_qk_proj",
                "indexer.q_proj indexer.k_proj",
                lay.indexer_qk,
            ),
        )
        + MIXTURE
        + SHARED_EXPERT
        + TOP,
    ),
    M(
        "mamba",
        ("MambaForCausalLM", "MambaLMHeadModel", "FalconMambaForCausalLM"),
        mamba() + _MAMBA_TOP,
    ),
    M("mamba2", ("Mamba2ForCausalLM",), mamba2() + _MAMBA_TOP),
    M(
        "jamba",
        ("JambaForCausalLM",),
        ATTENTION
        + mamba("model.layers.{i}.mamba.")
        + rows(
            LAYERS,
            *gated("feed_forward."),
            ("feed_forward.router", "ffn_gate_inp"),
            *gated("feed_forward.experts.{e}.", "_exps"),
            ("feed_forward.experts.gate_up_proj", "ffn_gate_exps ffn_up_exps", lay.experts_gate_up),
            ("feed_forward.experts.down_proj", "ffn_down_exps", lay.experts_down),
        )
        + TOP,
    ),
    M(
        "falcon-h1",
        ("FalconH1ForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.q_proj", "attn_q", lay.multiplied("attention_in_multiplier")),
            (
                "self_attn.k_proj",
                "attn_k",
                lay.multiplied("key_multiplier", "attention_in_multiplier"),
            ),
            ("self_attn.v_proj", "attn_v", lay.multiplied("attention_in_multiplier")),
            ("self_attn.o_proj", "attn_output", lay.multiplied("attention_out_multiplier")),
            ("mamba.in_proj", "ssm_in", lay.falcon_h1_in),
            ("mamba.out_proj", "ssm_out", lay.multiplied("ssm_out_multiplier")),
            ("feed_forward.gate_proj", "ffn_gate", lay.multiplied("mlp_multipliers", place=0)),
            ("feed_forward.up_proj", "ffn_up"),
            ("feed_forward.down_proj", "ffn_down", lay.multiplied("mlp_multipliers", place=1)),
        )
        + alone(
            Step(("model.embed_tokens",), ("token_embd",), lay.multiplied("embedding_multiplier")),
            Step(("lm_head",), ("output",), lay.multiplied("lm_head_multiplier")),
        ),
    ),
    M(
        "granitehybrid",
        _GRANITE_CLASS,
        _GRANITE + GRANITE_EXPERTS + GRANITE_SHARED,
        needs={"num_experts": True, "mamba_layers": True},
    ),
    M(
        "granitehybrid",
        _GRANITE_CLASS,
        _GRANITE + GRANITE_DENSE,
        needs={"num_experts": False, "mamba_layers": True},
    ),
    M(
        "granitemoe",
        _GRANITE_CLASS,
        ROTARY + GRANITE_EXPERTS + GRANITE_SHARED + TOP,
        needs={"num_experts": True, "mamba_layers": False},
    ),
    M(
        "granite",
        _GRANITE_CLASS,
        ROTARY + GRANITE_DENSE + TOP,
        needs={"num_experts": False, "mamba_layers": False},
    ),
    M("granitehybrid", ("BambaForCausalLM",), _GRANITE + rows(LAYERS, *gated("feed_forward."))),
    M("nemotron_h", ("NemotronHForCausalLM",), _NEMOTRON, needs={"num_experts_per_tok": False}),
    M(
        "nemotron_h_moe",
        ("NemotronHForCausalLM", "NemotronHPuzzleForCausalLM"),
        _NEMOTRON
        + rows(
            "backbone.layers.{i}.mixer.",
            ("gate", "ffn_gate_inp"),
            ("experts.{e}.up_proj", "ffn_up_exps"),
            ("experts.{e}.down_proj", "ffn_down_exps"),
            ("shared_experts.up_proj", "ffn_up_shexp"),
            ("shared_experts.down_proj", "ffn_down_shexp"),
            ("fc1_latent_proj", "ffn_latent_down"),
            ("fc2_latent_proj", "ffn_latent_up"),
        ),
        needs={"num_experts_per_tok": True},
    ),
    M(
        "plamo2",
        ("Plamo2ForCausalLM", "PLaMo2ForCausalLM"),
        rows(
            "model.layers.layers.{i}.",
            ("mixer.in_proj", "ssm_in"),
            ("mixer.bcdt_proj", "ssm_x"),
            ("mixer.dt_proj", "ssm_dt"),
            ("mixer.out_proj", "ssm_out"),
            ("mixer.qkv_proj", "attn_qkv"),
            ("mixer.o_proj", "attn_output"),
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        )
        + TOP,
    ),
    M(
        "lfm2",
        ("Lfm2ForCausalLM", "LFM2ForCausalLM"),
        (
            _LFM2 := rows(
                LAYERS,
                ("self_attn.q_proj", "attn_q"),
                ("self_attn.k_proj", "attn_k"),
                ("self_attn.v_proj", "attn_v"),
                ("self_attn.out_proj", "attn_output"),
                ("conv.in_proj", "shortconv.in_proj"),
                ("conv.out_proj", "shortconv.out_proj"),
                *gated("feed_forward.", names="w1 w3 w2"),
            )
            + TOP
        ),
    ),
    M(
        "lfm2moe",
        ("Lfm2MoeForCausalLM",),
        _LFM2[:-1]
        + rows(
            LAYERS,
            ("feed_forward.gate", "ffn_gate_inp"),
            *gated("feed_forward.experts.{e}.", "_exps", "w1 w3 w2"),
            ("feed_forward.experts.gate_up_proj", "ffn_gate_exps ffn_up_exps", lay.experts_gate_up),
            ("feed_forward.experts.down_proj", "ffn_down_exps", lay.experts_down),
        ),
    ),
)
