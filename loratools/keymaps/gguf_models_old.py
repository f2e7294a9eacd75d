"""Model families from before Llama's names became common, and recurrent ones."""

from __future__ import annotations

from loratools.keymaps import gguf_layouts as lay
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_rows import (
    ATTENTION,
    GATED,
    LAYERS,
    PLAIN_MLP,
    TOP,
    alone,
    gated,
    rows,
    top,
)

M = GGUFModel
H = "transformer.h.{i}."
_GPT2 = rows(
    H,
    ("attn.c_attn", "attn_qkv"),
    ("attn.c_proj", "attn_output"),
    ("mlp.c_fc", "ffn_up"),
    ("mlp.c_proj", "ffn_down"),
)
_GLM = rows(
    "encoder.layers.{i}.",
    ("self_attention.query_key_value", "attn_qkv"),
    ("self_attention.dense", "attn_output"),
    ("mlp.dense_h_to_4h", "ffn_up"),
    ("mlp.dense_4h_to_h", "ffn_down"),
)

OLD_MODELS: tuple[GGUFModel, ...] = (
    M("gpt2", ("GPT2LMHeadModel",), _GPT2 + top("transformer.wte")),
    M(
        "gpt2",
        ("RuGPT3XLForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.q_proj self_attn.k_proj self_attn.v_proj", "attn_qkv", lay.qkv_fusing),
            ("self_attn.o_proj", "attn_output"),
        )
        + PLAIN_MLP
        + TOP,
    ),
    M(
        "jais",
        ("JAISLMHeadModel",),
        rows(
            H,
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            ("mlp.c_fc", "ffn_up"),
            ("mlp.c_fc2", "ffn_gate"),
            ("mlp.c_proj", "ffn_down"),
        )
        + alone(
            Step(("transformer.wte",), ("token_embd",), lay.jais_embedding),
            Step(("lm_head",), ("output",), lay.jais_output),
        ),
    ),
    M("starcoder", ("GPTBigCodeForCausalLM",), _GPT2 + top("transformer.wte")),
    M("codeshell", ("CodeShellForCausalLM",), _GPT2 + top("transformer.wte")),
    M(
        "refact",
        ("GPTRefactForCausalLM",),
        rows(
            H,
            ("attn.q", "attn_q"),
            ("attn.kv", "attn_k attn_v", lay.halves),
            ("attn.c_proj", "attn_output"),
            ("mlp.gate_up_proj", "ffn_gate ffn_up", lay.halves),
            ("mlp.c_proj", "ffn_down"),
        )
        + top("transformer.wte"),
    ),
    M(
        "bloom",
        ("BloomForCausalLM", "BloomModel"),
        rows(
            H,
            ("self_attention.query_key_value", "attn_qkv", lay.heads_of_three),
            ("self_attention.dense", "attn_output"),
            ("mlp.dense_h_to_4h", "ffn_up"),
            ("mlp.dense_4h_to_h", "ffn_down"),
        )
        + top("transformer.word_embeddings"),
    ),
    M(
        "falcon",
        ("FalconForCausalLM", "RWForCausalLM"),
        rows(
            H,
            ("self_attention.query_key_value", "attn_qkv", lay.falcon_groups),
            ("self_attention.dense", "attn_output"),
            ("mlp.dense_h_to_4h", "ffn_up"),
            ("mlp.dense_4h_to_h", "ffn_down"),
        )
        + top("transformer.word_embeddings"),
    ),
    M(
        "gptneox",
        ("GPTNeoXForCausalLM",),
        rows(
            "gpt_neox.layers.{i}.",
            ("attention.query_key_value", "attn_qkv", lay.heads_of_three),
            ("attention.dense", "attn_output"),
            ("mlp.dense_h_to_4h", "ffn_up"),
            ("mlp.dense_4h_to_h", "ffn_down"),
        )
        + top("gpt_neox.embed_in", "embed_out"),
    ),
    M(
        "mpt",
        ("MPTForCausalLM",),
        rows(
            "transformer.blocks.{i}.",
            ("attn.Wqkv", "attn_qkv"),
            ("attn.out_proj", "attn_output"),
            ("ffn.up_proj", "ffn_up"),
            ("ffn.down_proj", "ffn_down"),
        )
        + top("transformer.wte"),
    ),
    M(
        "dbrx",
        ("DbrxForCausalLM",),
        rows(
            "transformer.blocks.{i}.",
            ("norm_attn_norm.attn.Wqkv", "attn_qkv"),
            ("norm_attn_norm.attn.out_proj", "attn_output"),
            ("ffn.router.layer", "ffn_gate_inp"),
            ("ffn.experts.mlp.w1", "ffn_gate_exps", lay.expert_rows),
            ("ffn.experts.mlp.v1", "ffn_up_exps", lay.expert_rows),
            ("ffn.experts.mlp.w2", "ffn_down_exps", lay.expert_rows_turned),
        )
        + top("transformer.wte"),
    ),
    M(
        "chatglm",
        ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
        tuple(
            Step(tuple(f"transformer.{name}" for name in step.sources), step.targets)
            for step in _GLM
        )
        + top("transformer.embedding.word_embeddings", "transformer.output_layer"),
    ),
    M(
        "chatglm",
        ("GlmForCausalLM",),
        ATTENTION
        + rows(
            LAYERS,
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        )
        + TOP,
    ),
    M(
        "qwen",
        ("QWenLMHeadModel",),
        rows(
            H,
            ("attn.c_attn", "attn_qkv"),
            ("attn.c_proj", "attn_output"),
            *gated("mlp.", names="w2 w1 c_proj"),
        )
        + top("transformer.wte"),
    ),
    M(
        "baichuan",
        ("BaichuanForCausalLM", "BaiChuanForCausalLM"),
        rows(
            LAYERS,
            ("self_attn.W_pack", "attn_q attn_k attn_v", lay.thirds),
            ("self_attn.o_proj", "attn_output"),
        )
        + GATED
        + TOP,
    ),
    M(
        "internlm2",
        ("InternLM2ForCausalLM",),
        rows(
            LAYERS,
            ("attention.wqkv", "attn_q attn_k attn_v", lay.qkv_grouped),
            ("attention.wo", "attn_output"),
            *gated("feed_forward.", names="w1 w3 w2"),
        )
        + top("model.tok_embeddings", "output"),
    ),
    M(
        "exaone",
        ("ExaoneForCausalLM",),
        rows(
            H,
            ("attn.attention.q_proj", "attn_q"),
            ("attn.attention.k_proj", "attn_k"),
            ("attn.attention.v_proj", "attn_v"),
            ("attn.attention.out_proj", "attn_output"),
            *gated("mlp.", names="c_fc_0 c_fc_1 c_proj"),
        )
        + top("transformer.wte"),
    ),
    M(
        "openelm",
        ("OpenELMForCausalLM",),
        rows(
            "transformer.layers.{i}.",
            ("attn.qkv_proj", "attn_qkv"),
            ("attn.out_proj", "attn_output"),
            ("ffn.proj_1", "ffn_gate ffn_up", lay.halves),
            ("ffn.proj_2", "ffn_down"),
        )
        + top("transformer.token_embeddings")[:1],
    ),
    M(
        "plamo",
        ("PlamoForCausalLM",),
        rows(
            "model.layers.layers.{i}.",
            ("self_attn.q_proj", "attn_q", lay.plamo_q),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output", lay.plamo_o),
            *gated("mlp."),
        )
        + TOP,
    ),
    M(
        "plamo3",
        ("Plamo3ForCausalLM", "PLaMo3ForCausalLM"),
        rows(
            "model.layers.layers.{i}.",
            ("mixer.qkv_proj", "attn_qkv"),
            ("mixer.o_proj", "attn_output"),
            ("mlp.gate_up_proj", "ffn_up"),
            ("mlp.down_proj", "ffn_down"),
        )
        + TOP,
    ),
    M(
        "grok",
        ("GrokForCausalLM", "Grok1ForCausalLM"),
        rows(
            "model.layers.{i}.",
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
            ("block_sparse_moe.gate", "ffn_gate_inp"),
            *gated("block_sparse_moe.experts.{e}.", "_exps", "w1 w3 w2"),
            *gated("mlp."),
        )
        + rows(
            "transformer.decoder_layer.{i}.",
            ("multi_head_attention.query", "attn_q"),
            ("multi_head_attention.key", "attn_k"),
            ("multi_head_attention.value", "attn_v"),
            ("multi_head_attention.linear", "attn_output"),
            ("router", "ffn_gate_inp"),
            *gated("moe.{e}.", "_exps", "linear linear_v linear_1"),
        )
        + TOP,
    ),
    M(
        "hrm_text",
        ("HrmTextForCausalLM",),
        rows(
            "model.L_module.layers.{i}.",
            *(
                _HRM := (
                    ("attn.gqkv_proj", "attn_gate attn_q attn_k attn_v", lay.quarters),
                    ("attn.o_proj", "attn_output"),
                    ("mlp.gate_up_proj", "ffn_gate ffn_up", lay.halves),
                    ("mlp.down_proj", "ffn_down"),
                )
            ),
        )
        + rows("model.H_module.layers.{i}.", *_HRM, out="blk.{j}.")
        + TOP,
    ),
    M(
        "talkie",
        ("TalkieForCausalLM",),
        rows(
            "model.blocks.{i}.",
            ("attn.attn_query", "attn_q", lay.negated_halves),
            ("attn.attn_key", "attn_k", lay.negated_halves),
            ("attn.attn_value", "attn_v"),
            ("attn.attn_resid", "attn_output"),
            *gated("mlp.", names="mlp_gate mlp_linear mlp_resid"),
        )
        + top("model.embed", "lm_head"),
    ),
    M(
        "rwkv6",
        ("Rwkv6ForCausalLM",),
        rows(
            "rwkv.blocks.{i}.",
            ("attention.receptance", "time_mix_receptance"),
            ("attention.key", "time_mix_key"),
            ("attention.value", "time_mix_value"),
            ("attention.gate", "time_mix_gate"),
            ("attention.output", "time_mix_output", lay.rescaled),
            ("feed_forward.key", "channel_mix_key"),
            ("feed_forward.value", "channel_mix_value", lay.rescaled),
            ("feed_forward.receptance", "channel_mix_receptance"),
            ("attention.time_maa_w1", "time_mix_w1", lay.turned),
            ("attention.time_decay_w1", "time_mix_decay_w1", lay.turned),
            ("attention.time_decay_w2", "time_mix_decay_w2", lay.turned),
        )
        + top("rwkv.embeddings", "head"),
    ),
    M(
        "rwkv6qwen2",
        ("RWKV6Qwen2ForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.q_proj", "time_mix_receptance"),
            ("self_attn.k_proj", "time_mix_key"),
            ("self_attn.v_proj", "time_mix_value"),
            ("self_attn.gate", "time_mix_gate"),
            ("self_attn.o_proj", "time_mix_output", lay.rescaled),
        )
        + GATED
        + TOP,
    ),
    M(
        "rwkv7",
        ("Rwkv7ForCausalLM", "RWKV7ForCausalLM"),
        rows(
            LAYERS,
            ("attn.r_proj", "time_mix_receptance"),
            ("attn.k_proj", "time_mix_key"),
            ("attn.v_proj", "time_mix_value"),
            ("attn.o_proj", "time_mix_output"),
            ("ffn.key", "channel_mix_key"),
            ("ffn.value", "channel_mix_value"),
            *(
                (f"attn.{w}_lora.lora.{n}", f"time_mix_{w}{m}")
                for w in "wavg"
                for n, m in ((0, 1), (2, 2))
            ),
        )
        + top("model.embeddings"),
    ),
    M(
        "arwkv7",
        ("RwkvHybridForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.receptance", "time_mix_receptance"),
            ("self_attn.key", "time_mix_key"),
            ("self_attn.value", "time_mix_value"),
            ("self_attn.output", "time_mix_output"),
        )
        + GATED
        + TOP,
    ),
)
