"""Every model family that llama.cpp converts and whose adapters have a place in GGUF.

Sources: llama.cpp ``conversion/*.py`` (classes, layouts) and ``gguf-py/gguf/tensor_mapping.py``
(names), October 2026. A slow test compares every row with them.
"""

from __future__ import annotations

from loratools.keymaps import gguf_layouts as lay
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_models_hybrid import HYBRID_MODELS
from loratools.keymaps.gguf_models_latent import LATENT_MODELS
from loratools.keymaps.gguf_models_mixture import MIXTURE_MODELS
from loratools.keymaps.gguf_models_old import OLD_MODELS
from loratools.keymaps.gguf_rows import (
    ATTENTION,
    C_MLP,
    FC_MLP,
    FUSED_GATED,
    FUSED_QKV,
    GATED,
    IN_MEMORY,
    LATENT,
    LAYERS,
    MIXTURE,
    PLAIN_MLP,
    ROTARY,
    SHARED_EXPERT,
    SHARED_EXPERTS,
    SPARSE,
    TOP,
    gated,
    rows,
    top,
)

M = GGUFModel
_DENSE = ATTENTION + GATED + TOP
_HEADLESS = ATTENTION + GATED + TOP[:1]
"""Models whose head is the embedding, whatever their config says."""
_ROTARY = ROTARY + GATED + TOP
_DEEPSEEK = LATENT + GATED + MIXTURE + SHARED_EXPERTS + TOP

LLAMA_MODELS: tuple[GGUFModel, ...] = (
    M(
        "llama",
        (
            "LlamaForCausalLM",
            "LLaMAForCausalLM",
            "MistralForCausalLM",
            "MixtralForCausalLM",
            "LlamaModel",
            "VLlama3ForCausalLM",
            "LlavaForConditionalGeneration",
            "VoxtralForConditionalGeneration",
            "IQuestCoderForCausalLM",
            "InternLM3ForCausalLM",
        ),
        _ROTARY + SPARSE + IN_MEMORY,
    ),
    M("arcee", ("ArceeForCausalLM",), ROTARY + PLAIN_MLP + TOP),
    M("smollm3", ("SmolLM3ForCausalLM",), _ROTARY),
    M("llama-embed", ("LlamaBidirectionalModel",), _ROTARY),
    M("nanbeige", ("NanbeigeForCausalLM",), _ROTARY),
    M(
        "mistral3",
        ("Mistral3ForConditionalGeneration", "Ministral3ForCausalLM"),
        _ROTARY,
        needs={"kv_lora_rank": False},
    ),
    M(
        "mistral4",
        ("Mistral3ForConditionalGeneration",),
        LATENT
        + GATED
        + rows(
            LAYERS,
            ("mlp.gate", "ffn_gate_inp"),
            ("mlp.experts.gate_up_proj", "ffn_gate_up_exps", lay.experts_in),
            ("mlp.experts.down_proj", "ffn_down_exps", lay.experts_down),
        )
        + SHARED_EXPERTS
        + TOP,
        needs={"kv_lora_rank": True},
    ),
    M(
        "deci",
        ("DeciLMForCausalLM",),
        _ROTARY + rows(LAYERS, ("self_attn.linear_attn", "attn_output")),
    ),
    M("granite", ("GraniteForCausalLM", "GraniteSpeechForConditionalGeneration"), _ROTARY),
    M("granite_swa", ("GraniteSWAForCausalLM",), _ROTARY),
    M("minicpm", ("MiniCPMForCausalLM",), _ROTARY),
    M("olmo", ("OlmoForCausalLM", "OLMoForCausalLM"), _ROTARY),
    M("chameleon", ("ChameleonForCausalLM", "ChameleonForConditionalGeneration"), _ROTARY),
    M(
        "xverse",
        ("XverseForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.q_proj", "attn_q", lay.rotary_q),
            ("self_attn.k_proj", "attn_k", lay.rotary_k_divided),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
        )
        + GATED
        + TOP,
    ),
    M("muse-glimmer", ("MuseGlimmerForConditionalGeneration",), _ROTARY),
    M("deepseek", ("DeepseekForCausalLM",), _ROTARY + MIXTURE + SHARED_EXPERTS),
    M(
        "arctic",
        ("ArcticForCausalLM",),
        ROTARY
        + SPARSE
        + rows(
            LAYERS,
            *gated("residual_mlp.", names="w1 w3 w2"),
        )
        + TOP,
    ),
    M(
        "llama4",
        ("Llama4ForCausalLM", "Llama4ForConditionalGeneration"),
        ATTENTION
        + rows(
            LAYERS,
            *gated("feed_forward."),
            ("feed_forward.router", "ffn_gate_inp"),
            (
                "feed_forward.experts.gate_up_proj",
                "ffn_gate_exps ffn_up_exps",
                lay.experts_gate_up_turned,
            ),
            ("feed_forward.experts.down_proj", "ffn_down_exps", lay.experts_down_turned),
            *gated("feed_forward.shared_expert.", "_shexp"),
        )
        + TOP,
    ),
    M("apertus", ("ApertusForCausalLM",), ATTENTION + PLAIN_MLP + TOP),
    M(
        "llada",
        ("LLaDAModelLM",),
        rows(
            "model.transformer.blocks.{i}.",
            ("q_proj", "attn_q", lay.rotary_q),
            ("k_proj", "attn_k", lay.rotary_k),
            ("v_proj", "attn_v"),
            ("attn_out", "attn_output"),
            ("ff_proj", "ffn_gate"),
            ("up_proj", "ffn_up"),
            ("ff_out", "ffn_down"),
        )
        + top("model.transformer.wte", "model.transformer.ff_out"),
    ),
    M(
        "cogvlm",
        ("CogVLMForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.language_expert_query_key_value", "attn_qkv"),
            ("self_attn.language_expert_dense", "attn_output"),
            *gated("mlp.language_mlp."),
        )
        + TOP,
    ),
)
"""Llama and what is built like it."""

QWEN_MODELS: tuple[GGUFModel, ...] = (
    M(
        "qwen2",
        (
            "Qwen2ForCausalLM",
            "Qwen2Model",
            "Qwen2AudioForConditionalGeneration",
            "KORMoForCausalLM",
            "AudioFlamingo3ForConditionalGeneration",
            "DotsOCRForCausalLM",
        ),
        _DENSE,
    ),
    M("qwen2moe", ("Qwen2MoeForCausalLM",), ATTENTION + TOP + MIXTURE + SHARED_EXPERT),
    M(
        "qwen2vl",
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2VLModel",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen2_5OmniModel",
        ),
        _DENSE,
    ),
    M("qwen3", ("Qwen3ForCausalLM", "Qwen3Model", "StepVLForConditionalGeneration"), _DENSE),
    M("qwen3moe", ("Qwen3MoeForCausalLM",), ATTENTION + TOP + MIXTURE),
    M(
        "qwen3vl",
        (
            "Qwen3VLForConditionalGeneration",
            "Qwen3ASRForConditionalGeneration",
        ),
        _DENSE,
    ),
    M(
        "qwen3vlmoe",
        (
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3OmniMoeForConditionalGeneration",
        ),
        ATTENTION + TOP + MIXTURE,
    ),
    M("rnd1", ("RND1",), ATTENTION + TOP + MIXTURE),
    M("dots1", ("Dots1ForCausalLM",), _DENSE + MIXTURE + SHARED_EXPERTS),
    M("dream", ("DreamModel",), _DENSE),
)

DENSE_MODELS: tuple[GGUFModel, ...] = (
    M("gemma", ("GemmaForCausalLM",), _HEADLESS),
    M("gemma2", ("Gemma2ForCausalLM",), _HEADLESS),
    M("gemma3", ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"), _DENSE),
    M("gemma-embedding", ("Gemma3TextModel",), _DENSE),
    M(
        "gemma3n",
        ("Gemma3nForCausalLM", "Gemma3nForConditionalGeneration"),
        _DENSE
        + rows(
            LAYERS,
            ("per_layer_input_gate", "inp_gate"),
            ("per_layer_projection", "proj"),
            ("laurel.linear_left", "laurel_l"),
            ("laurel.linear_right", "laurel_r"),
            ("altup.modality_router", "altup_router"),
            ("altup.correction_coefs", "altup_correct_coef"),
            ("altup.prediction_coefs", "altup_predict_coef"),
        )
        + (Step(("model.per_layer_model_projection",), ("per_layer_model_proj",)),),
    ),
    M(
        "gemma4",
        (
            "Gemma4ForCausalLM",
            "Gemma4ForConditionalGeneration",
            "Gemma4UnifiedForConditionalGeneration",
        ),
        _DENSE
        + rows(
            LAYERS,
            ("per_layer_input_gate", "inp_gate"),
            ("per_layer_projection", "proj"),
            ("router.proj", "ffn_gate_inp"),
            ("experts.gate_up_proj", "ffn_gate_up_exps", lay.experts_in),
            ("experts.down_proj", "ffn_down_exps", lay.experts_down),
        )
        + (Step(("model.per_layer_model_projection",), ("per_layer_model_proj",)),),
    ),
    M(
        "phi2",
        ("PhiForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.q_proj", "attn_q"),
            ("self_attn.k_proj", "attn_k"),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.dense", "attn_output"),
        )
        + FC_MLP
        + TOP,
    ),
    M("phi3", ("Phi3ForCausalLM", "Phi4ForCausalLMV"), FUSED_QKV + FUSED_GATED + TOP),
    M("phimoe", ("PhiMoEForCausalLM",), ATTENTION + SPARSE + IN_MEMORY + TOP),
    M(
        "glm4",
        (
            "Glm4ForCausalLM",
            "Glm4vForConditionalGeneration",
            "GlmOcrForConditionalGeneration",
        ),
        rows(
            LAYERS,
            ("self_attn.q_proj", "attn_q", lay.mrope_q),
            ("self_attn.k_proj", "attn_k", lay.mrope_k),
            ("self_attn.v_proj", "attn_v"),
            ("self_attn.o_proj", "attn_output"),
        )
        + FUSED_GATED
        + TOP,
    ),
    M("command-r", ("CohereForCausalLM",), _HEADLESS),
    M("cohere2", ("Cohere2ForCausalLM",), _HEADLESS),
    M("olmo2", ("Olmo2ForCausalLM", "Olmo3ForCausalLM"), _DENSE),
    M("seed_oss", ("SeedOssForCausalLM",), _DENSE),
    M("starcoder2", ("Starcoder2ForCausalLM",), ATTENTION + C_MLP + TOP),
    M(
        "stablelm",
        (
            "StableLmForCausalLM",
            "StableLMEpochForCausalLM",
            "LlavaStableLMEpochForCausalLM",
        ),
        _DENSE,
    ),
    M("exaone4", ("Exaone4ForCausalLM", "Exaone4_5_ForConditionalGeneration"), _DENSE),
    M(
        "ernie4_5",
        ("Ernie4_5ForCausalLM", "Ernie4_5_ForCausalLM"),
        _DENSE
        + rows(
            LAYERS,
            ("self_attn.qkv_proj", "attn_q attn_k attn_v", lay.qkv),
            ("mlp.up_gate_proj", "ffn_gate ffn_up", lay.halves),
        ),
    ),
    M("paddleocr", ("PaddleOCRVLForConditionalGeneration",), _DENSE),
    M("hunyuan-dense", ("HunYuanDenseV1ForCausalLM",), _DENSE),
    M("hunyuan_vl", ("HunYuanVLForConditionalGeneration",), _DENSE),
    M("maincoder", ("MaincoderForCausalLM",), _DENSE),
    M("pangu-embedded", ("PanguEmbeddedForCausalLM",), _DENSE),
    M("orion", ("OrionForCausalLM",), _DENSE),
    M("nemotron", ("NemotronForCausalLM",), ATTENTION + PLAIN_MLP + TOP),
    M("jais2", ("Jais2ForCausalLM",), ATTENTION + PLAIN_MLP + TOP),
    M(
        "spark2_5",
        ("Spark2_5ForCausalLM",),
        rows(
            LAYERS,
            ("self_attn.q_k_v_proj", "attn_qkv"),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.g_proj", "attn_gate"),
        )
        + GATED
        + TOP,
    ),
)

REFUSED_MODELS: tuple[GGUFModel, ...] = (
    M(
        "bitnet",
        ("BitnetForCausalLM", "BitNetForCausalLM"),
        (),
        "its weights are rounded to three values after training, which no LoRA survives",
    ),
    M(
        "qwen3tts",
        ("Qwen3TTSForConditionalGeneration",),
        (),
        "its embedding is folded through a network",
    ),
    M("graniteswitch", ("GraniteSwitchForCausalLM",), (), "its GGUF file holds its own adapters"),
)

MODELS: tuple[GGUFModel, ...] = (
    *LLAMA_MODELS,
    *QWEN_MODELS,
    *DENSE_MODELS,
    *MIXTURE_MODELS,
    *HYBRID_MODELS,
    *LATENT_MODELS,
    *OLD_MODELS,
    *REFUSED_MODELS,
)
"""Relatives stand together; of several with one architecture, the first that fits is taken."""
