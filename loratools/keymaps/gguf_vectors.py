"""What a model has beside the modules that adapters change: norms, positions. Rows only.

Sources: llama.cpp ``gguf-py/gguf/tensor_mapping.py`` (names) and ``conversion/*.py`` (what is added
to norms), October 2026.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType

from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_rows import LAYERS, rows

_TOP = (Step(("model.norm",), ("output_norm",)),)
_HEADS = rows(LAYERS, ("self_attn.q_norm", "attn_q_norm"), ("self_attn.k_norm", "attn_k_norm"))
_PRE = (
    _TOP
    + _HEADS
    + rows(LAYERS, ("input_layernorm", "attn_norm"), ("post_attention_layernorm", "ffn_norm"))
)
"""A norm before each of the two parts of a block."""
_POST = (
    _TOP
    + _HEADS
    + rows(
        LAYERS,
        ("post_attention_layernorm", "post_attention_norm"),
        ("post_feedforward_layernorm", "post_ffw_norm"),
    )
)
"""A norm after each."""
_BOTH = _POST + rows(
    LAYERS, ("input_layernorm", "attn_norm"), ("pre_feedforward_layernorm", "ffn_norm")
)
_ONE = _TOP + _HEADS + rows(LAYERS, ("input_layernorm", "attn_norm"))
"""One norm, before two parts side by side."""


def _named(
    prefix: str, attention: str, ffn: str | None, last: str, *more: tuple[str, str]
) -> tuple[Step, ...]:
    """Return the rows of older models, which name their norms otherwise."""
    lines = [(attention, "attn_norm"), *([(ffn, "ffn_norm")] if ffn else [])]
    outside = tuple(Step((source,), (target,)) for source, target in more)
    return (Step((last,), ("output_norm",)), *outside, *rows(prefix, *lines))


_GPT2 = _named(
    "transformer.h.{i}.", "ln_1", "ln_2", "transformer.ln_f",
    ("transformer.wpe", "position_embd"),
)  # fmt: skip

VECTORS: Mapping[str, tuple[Step, ...]] = MappingProxyType(
    {
        **dict.fromkeys(
            (
                "llama", "smollm3", "mistral3", "granite", "granitemoe", "qwen2", "qwen2moe",
                "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe", "phi3", "phimoe",
                "ernie4_5", "ernie4_5-moe", "dots1", "stablelm", "starcoder2", "olmoe",
                "xverse", "orion", "baichuan", "deepseek", "minimax-m2", "arcee", "gemma",
                "nemotron", "bailingmoe", "minicpm",
            ),
            _PRE,
        ),
        **dict.fromkeys(("gemma2", "gemma3"), _BOTH),
        **dict.fromkeys(("olmo2", "exaone4"), _POST),
        **dict.fromkeys(("command-r", "cohere2"), _ONE),
        "olmo": (),
        **dict.fromkeys(
            ("seed_oss", "glm4moe"),
            _ONE + rows(LAYERS, ("post_attention_layernorm", "post_attention_norm")),
        ),
        "phi2": _named(LAYERS, "input_layernorm", None, "model.final_layernorm"),
        "glm4": _PRE + rows(
            LAYERS,
            ("post_self_attn_layernorm", "post_attention_norm"),
            ("post_mlp_layernorm", "post_ffw_norm"),
        ),
        "gpt2": _GPT2,
        "starcoder": _GPT2,
        "bloom": _named(
            "transformer.h.{i}.", "input_layernorm", "post_attention_layernorm",
            "transformer.ln_f", ("transformer.word_embeddings_layernorm", "token_embd_norm"),
        ),
        "falcon": _named("transformer.h.{i}.", "input_layernorm", None, "transformer.ln_f")
        + rows("transformer.h.{i}.", ("ln_mlp", "attn_norm"), ("ln_attn", "attn_norm_2")),
        "gptneox": _named(
            "gpt_neox.layers.{i}.", "input_layernorm", "post_attention_layernorm",
            "gpt_neox.final_layer_norm",
        ),
        "internlm2": _named(LAYERS, "attention_norm", "ffn_norm", "model.norm"),
    }
)  # fmt: skip
"""``general.architecture`` → its rows; an architecture that is not here has none that are known."""

SHIFTS: Mapping[str, float] = MappingProxyType(
    dict.fromkeys(("gemma", "gemma2", "gemma3", "nemotron"), 1.0)
)
"""What llama.cpp's converter adds to the weight of every norm."""

FROM_CONFIG = frozenset(
    {"rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"}
)
"""Tensors of a GGUF file that its converter computes of ``config.json``."""

EXCLUDED_BY: Mapping[str, str] = MappingProxyType(
    {"transformer.h.{i}.input_layernorm": "blk.{i}.attn_norm_2.weight"}
)
"""A checkpoint's name → the GGUF tensor beside which it stands for nothing: Falcon's two norms."""

BUFFERS = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias",
           ".attention.masked_bias")  # fmt: skip
"""Ends of names of checkpoint tensors that are no weights."""

_TURNED = frozenset({"GPT2LMHeadModel", "JAISLMHeadModel"})


def whole_model(model: GGUFModel) -> GGUFModel | None:
    """Return the rows of everything that a model has, or ``None`` where norms are not known."""
    vectors = VECTORS.get(model.arch)
    return None if vectors is None else replace(model, steps=model.steps + vectors)


def shift_of(arch: str, target: str) -> float:
    """Return what is added to a GGUF tensor on the way from a checkpoint."""
    return SHIFTS.get(arch, 0.0) if target.endswith("norm.weight") else 0.0


def is_stored_turned(model: GGUFModel, path: str) -> bool:
    """Return whether a checkpoint stores a module's weight as (in, out): GPT-2's Conv1D."""
    return bool(_TURNED & set(model.classes)) and path.rpartition(".")[2].startswith("c_")
