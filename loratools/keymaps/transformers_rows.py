"""Rows about transformers' models: prefixes, tied tensors, transposed layers.

Source: transformers 5.23 ``conversion_mapping.py``, ``_tied_weights_keys`` of the modelling
files, and the users of ``pytorch_utils.Conv1D``.
"""

from __future__ import annotations

from collections.abc import Mapping

PREFIXES: tuple[tuple[str, str], ...] = (
    # module names in memory (transformers >= 4.52), names on disk
    ("model.language_model.", "language_model.model."),
    ("model.language_model.", "model."),
    ("model.vision_tower.", "vision_tower."),
    ("model.vision_model.", "vision_model."),
    ("model.visual.", "visual."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("model.audio_tower.", "audio_tower."),
    ("lm_head.", "language_model.lm_head."),
    ("lm_head.", "embed_out."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
)
"""Pairs of prefixes under which the same module goes, in either direction."""

_VIT = (
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
)
_VIT_MLP = ((".mlp.fc1.", ".intermediate.dense."), (".mlp.fc2.", ".output.dense."))
REWRITES: tuple[tuple[tuple[str, str], ...], ...] = (
    # ViT, DeiT, BEiT, AST, ViViT, ViT-MSN, I-JEPA; then DINOv2
    ((".layers.", ".encoder.layer."), *_VIT, *_VIT_MLP),
    (("layers.", "encoder.layer."), *_VIT, *_VIT_MLP),
    _VIT,
)
"""Sets of inner parts in memory (transformers 5) and on disk, each applied as a whole."""

TIED: tuple[tuple[str, str], ...] = (
    # output module, input module
    ("lm_head", "model.embed_tokens"),
    ("lm_head", "model.language_model.embed_tokens"),
    ("language_model.lm_head", "language_model.model.embed_tokens"),
    ("lm_head", "transformer.wte"),
    ("lm_head", "model.decoder.embed_tokens"),
    ("proj_out", "model.decoder.embed_tokens"),
    ("lm_head", "model.text_model.embed_tokens"),
    ("lm_head", "backbone.embeddings"),
    ("pred_layer.proj", "transformer.embeddings"),
    ("lm_head", "transformer.word_embeddings"),
    ("lm_head", "transformer.tokens_embed"),
    ("lm_head", "gpt_neox.embed_in"),
    ("embed_out", "gpt_neox.embed_in"),
    ("lm_head", "model.shared"),
    ("lm_head", "shared"),
    ("decoder", "model.embeddings.tok_embeddings"),
    ("cls.predictions.decoder", "bert.embeddings.word_embeddings"),
    ("lm_head.decoder", "roberta.embeddings.word_embeddings"),
    ("lm_head.decoder", "esm.embeddings.word_embeddings"),
    ("vocab_projector", "distilbert.embeddings.word_embeddings"),
    ("generator_lm_head", "electra.embeddings.word_embeddings"),
    ("head", "rwkv.embeddings"),
    ("lm_head", "led.shared"),
    ("lm_head", "prophetnet.word_embeddings"),
    ("lm_head", "funnel.embeddings.word_embeddings"),
    ("lm_head", "transformer.w"),
    ("lm_loss", "transformer.word_embedding"),
    ("output_projection", "biogpt.embed_tokens"),
    ("output", "git.embeddings.word_embeddings"),
    ("predictions.decoder", "albert.embeddings.word_embeddings"),
    ("generator_lm_head", "convbert.embeddings.word_embeddings"),
    ("embed_out", "gpt_neox_japanese.embed_in"),
    ("text_model.lm_head", "text_model.model.embed_tokens"),
    ("lm_head", "model.language_model.shared"),
    ("lm_head", "model.text_model.embeddings.tok_embeddings"),
    ("lm_head.decoder", "bert.embeddings.word_embeddings"),
    *(
        ("cls.predictions.decoder", f"{name}.embeddings.word_embeddings")
        for name in (
            "deberta",
            "ernie",
            "fnet",
            "layoutlm",
            "lxmert",
            "mobilebert",
            "mra",
            "nomic_bert",
            "nystromformer",
            "roc_bert",
            "roformer",
            "tapas",
            "visual_bert",
            "yoso",
            "transformer",
        )
    ),
    *(
        ("lm_head.decoder", f"{name}.embeddings.word_embeddings")
        for name in (
            "data2vec_text",
            "gte",
            "ibert",
            "longformer",
            "mpnet",
            "roberta_prelayernorm",
        )
    ),
)
"""Pairs (output head, input embedding) that share one tensor when the config says so."""

TIED_BIASES: tuple[tuple[str, str], ...] = (
    # the head's bias, the stored bias that it shares
    ("cls.predictions.decoder.bias", "cls.predictions.bias"),
    ("lm_head.decoder.bias", "lm_head.bias"),
    ("predictions.decoder.bias", "predictions.bias"),
)
"""Biases that are tied along with a head, and so are untied along with it."""

HEAD_OF_TYPE: Mapping[str, str] = {
    **dict.fromkeys(
        ("whisper", "moonshine", "moonshine_streaming", "canary", "cohere_asr"), "proj_out"
    ),
    "trocr": "output_projection",
    "bert-generation": "lm_head.decoder",
}
"""Model types whose input table other rows of ``TIED`` also name, and their own head."""

TIED_TABLES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("shared", ("encoder.embed_tokens", "decoder.embed_tokens")),
    ("model.shared", ("model.encoder.embed_tokens", "model.decoder.embed_tokens")),
    ("led.shared", ("led.encoder.embed_tokens", "led.decoder.embed_tokens")),
    (
        "prophetnet.word_embeddings",
        ("prophetnet.encoder.word_embeddings", "prophetnet.decoder.word_embeddings"),
    ),
)
"""(shared table, the input tables that are tied to it as long as the head is)."""

HEADS: tuple[str, ...] = (
    "ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration", "ForPreTraining",
    "DoubleHeadsModel", "WithLMHeadModel", "EncoderDecoderModel",
)  # fmt: skip
"""Endings of the architectures that have an output head over the vocabulary."""

UNTYING_CHANGES_FORWARD: frozenset[str] = frozenset(
    {"t5", "mt5", "umt5", "longt5", "switch_transformers", "pix2struct_text_model", "udop"}
)
"""Model types whose forward pass scales the decoder's output when (and only when) tied."""

CONV1D_TYPES: frozenset[str] = frozenset(
    {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp"}
)
CONV1D_LEAVES: frozenset[str] = frozenset({"c_attn", "c_proj", "c_fc", "q_attn"})
"""Layers that store (in, out): transformers' Conv1D."""

TRANSPOSED_PARAMETERS: frozenset[str] = frozenset({"text_projection"})
"""Parameters that stand alone and store (in, out): OpenCLIP's projection."""
