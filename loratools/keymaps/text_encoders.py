"""Rows of the text encoders that pipelines share: CLIP, OpenCLIP, T5 and llama-style models.

Canonical names are transformers'. Source: transformers' CLIPTextModel, T5EncoderModel, LlamaModel
and their relatives; open_clip's ``TextTransformer``.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Component, Fused, Row

_CLIP_ROOT = "text_model."
_CLIP_LAYER = _CLIP_ROOT + "encoder.layers.{i}."
_OPEN_CLIP_LAYER = "transformer.resblocks.{i}."
# ComfyUI knows T5 and language models without the encoder's own name too.
_ANY_ENCODER = "text_encoders.transformer."


def clip_l(
    name: str = "text_encoder",
    *,
    kohya: tuple[str, ...] = ("lora_te1",),
    checkpoint: tuple[str, ...] = (),
) -> Component:
    """Return OpenAI's CLIP-L; ``checkpoint``: its prefixes beside ComfyUI's, longest first."""
    own = "text_encoders.clip_l.transformer"
    rows = _clip_rows(768)
    return Component(name, own, (*checkpoint, own + "."), kohya, rows, levels=(_CLIP_ROOT,))


def open_clip(
    name: str,
    width: int,
    *,
    original: str,
    kohya: tuple[str, ...],
    checkpoint: tuple[str, ...] = (),
) -> Component:
    """Return an OpenCLIP text model: G (width 1280) or H (1024).

    Checkpoints under one of the prefixes ``checkpoint`` have OpenCLIP's own names, with one matrix
    for q, k and v; ComfyUI's ``original`` ones have transformers'.
    """
    return Component(
        name,
        original,
        (*checkpoint, original + "."),
        kohya,
        _clip_rows(width),
        checkpoint_rows=_OPEN_CLIP_ROWS,
        levels=(_CLIP_ROOT,),
    )


def clip_g(
    name: str = "text_encoder_2",
    *,
    kohya: tuple[str, ...] = ("lora_te2",),
    checkpoint: tuple[str, ...] = (),
) -> Component:
    """Return OpenCLIP's bigG."""
    own = "text_encoders.clip_g.transformer"
    return open_clip(name, 1280, original=own, kohya=kohya, checkpoint=checkpoint)


def clip_h(
    name: str = "text_encoder",
    *,
    kohya: tuple[str, ...] = ("lora_te",),
    checkpoint: tuple[str, ...] = (),
) -> Component:
    """Return OpenCLIP's H."""
    own = "text_encoders.clip_h.transformer"
    return open_clip(name, 1024, original=own, kohya=kohya, checkpoint=checkpoint)


def t5(
    name: str, *, kohya: tuple[str, ...] = ("lora_te3", "lora_te2"), original: str = "t5xxl"
) -> Component:
    """Return T5's encoder.

    sd-scripts calls it te3 and OneTrainer te2 (te1 where it is alone); its modules' names tell it
    from CLIP.
    """
    own = f"text_encoders.{original}.transformer"
    return Component(name, own, (own + ".", _ANY_ENCODER), kohya, _same(_T5_NAMES))


def llama_style(
    name: str, original: str, *, kohya: tuple[str, ...] = ("lora_te", "lora_te1")
) -> Component:
    """Return a decoder used as text encoder: Llama, Qwen, Gemma.

    ``original``: ComfyUI's word for it (``qwen3_06b``; ``comfy/text_encoders`` has all). Trainers
    flatten the names of the model without its head: ``lora_te_layers_0_self_attn_q_proj``.
    """
    own = f"text_encoders.{original}.transformer"
    rows = tuple(Row("model." + module, module) for module in _LLAMA_NAMES)
    levels = ("model.language_model.", "language_model.", "model.")
    checkpoint = (own + ".", _ANY_ENCODER)
    return Component(name, own, checkpoint, kohya, rows, flattens="diffusers", levels=levels)


def _same(names: tuple[str, ...]) -> tuple[Row, ...]:
    return tuple(Row(module, module) for module in names)


def _clip_rows(width: int) -> tuple[Row, ...]:
    layers = tuple(
        Row(name, name, inputs=(width * factor,) if factor else ())
        for leaf, factor in _CLIP_LEAVES
        for name in (_CLIP_LAYER + leaf,)
    )
    return layers + _same(_CLIP_OTHERS)


_CLIP_LEAVES: tuple[tuple[str, int], ...] = (
    # leaf, inputs in widths (0: a norm)
    ("self_attn.q_proj", 1),
    ("self_attn.k_proj", 1),
    ("self_attn.v_proj", 1),
    ("self_attn.out_proj", 1),
    ("mlp.fc1", 1),
    ("mlp.fc2", 4),
    ("layer_norm1", 0),
    ("layer_norm2", 0),
)

_CLIP_OTHERS: tuple[str, ...] = (
    _CLIP_ROOT + "embeddings.token_embedding",
    _CLIP_ROOT + "embeddings.position_embedding",
    _CLIP_ROOT + "final_layer_norm",
    "text_projection",
)

_OPEN_CLIP_ROWS: tuple[Row | Fused, ...] = (
    Fused(
        _OPEN_CLIP_LAYER + "attn.in_proj_weight",
        tuple(f"{_CLIP_LAYER}self_attn.{part}_proj" for part in "qkv"),
    ),
    Row(_OPEN_CLIP_LAYER + "attn.out_proj", _CLIP_LAYER + "self_attn.out_proj"),
    Row(_OPEN_CLIP_LAYER + "mlp.c_fc", _CLIP_LAYER + "mlp.fc1"),
    Row(_OPEN_CLIP_LAYER + "mlp.c_proj", _CLIP_LAYER + "mlp.fc2"),
    Row(_OPEN_CLIP_LAYER + "ln_1", _CLIP_LAYER + "layer_norm1"),
    Row(_OPEN_CLIP_LAYER + "ln_2", _CLIP_LAYER + "layer_norm2"),
    Row("token_embedding", _CLIP_ROOT + "embeddings.token_embedding"),
    Row("positional_embedding", _CLIP_ROOT + "embeddings.position_embedding"),
    Row("ln_final", _CLIP_ROOT + "final_layer_norm"),
    Row("text_projection", "text_projection", transposed=True),
)

_T5_NAMES: tuple[str, ...] = (
    *(f"encoder.block.{{i}}.layer.0.SelfAttention.{leaf}" for leaf in "qkvo"),
    "encoder.block.{i}.layer.0.SelfAttention.relative_attention_bias",
    "encoder.block.{i}.layer.0.layer_norm",
    *(f"encoder.block.{{i}}.layer.1.DenseReluDense.{leaf}" for leaf in ("wi_0", "wi_1", "wo")),
    "encoder.block.{i}.layer.1.layer_norm",
    "encoder.final_layer_norm",
    "shared",
)

_LLAMA_NAMES: tuple[str, ...] = (
    *(f"layers.{{i}}.self_attn.{leaf}_proj" for leaf in "qkvo"),
    *(f"layers.{{i}}.mlp.{leaf}_proj" for leaf in ("gate", "up", "down")),
    "layers.{i}.self_attn.q_norm",
    "layers.{i}.self_attn.k_norm",
    "layers.{i}.input_layernorm",
    "layers.{i}.post_attention_layernorm",
    "layers.{i}.pre_feedforward_layernorm",
    "layers.{i}.post_feedforward_layernorm",
    "embed_tokens",
    "norm",
)
