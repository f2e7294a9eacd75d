"""Rows of Z-Image and of Lumina Image 2, whose block it shares.

Source: diffusers 0.42.1 ``single_file_utils.py``; ComfyUI ``utils.py`` (``z_image_to_diffusers``).
Z-Image's own names are diffusers'; ComfyUI's base fuses the attention and shortens the names of
the ends. No halves are swapped.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Fused, Row
from loratools.keymaps.dit_tables import fused, of_width, same, transformer, under
from loratools.keymaps.text_encoders import llama_style

# ------------------------------------------------------------------------------------ Z-Image

_WIDTH = (3840,)
_LAYER = (
    *of_width(
        _WIDTH,
        same(
            "attention.to_q",
            "attention.to_k",
            "attention.to_v",
            "attention.to_out.0",
            "feed_forward.w1",
            "feed_forward.w3",
        ),
    ),
    *of_width((10240,), same("feed_forward.w2")),
    *same(
        "attention.norm_q",
        "attention.norm_k",
        "attention_norm1",
        "attention_norm2",
        "ffn_norm1",
        "ffn_norm2",
    ),
)
_COMFY_LAYER = (
    *of_width(_WIDTH, (fused("attention.qkv", "attention"),)),
    Row("attention.out", "attention.to_out.0", inputs=_WIDTH),
    Row("attention.q_norm", "attention.norm_q"),
    Row("attention.k_norm", "attention.norm_k"),
)
_STACKS = ("layers.{i}", "noise_refiner.{i}", "context_refiner.{i}")
_FINAL = same("linear", "adaLN_modulation.1")
_ROWS = (
    *(row for stack in _STACKS for row in under(stack, stack, _LAYER)),
    *same("layers.{i}.adaLN_modulation.0", "noise_refiner.{i}.adaLN_modulation.0"),
    *same("all_x_embedder.2-1", "cap_embedder.0", "cap_embedder.1"),
    *same("t_embedder.mlp.0", "t_embedder.mlp.2", "x_pad_token", "cap_pad_token"),
    *under("all_final_layer.2-1", "all_final_layer.2-1", _FINAL),
)
_COMFY_ROWS = (
    *(row for stack in _STACKS for row in under(stack, stack, _COMFY_LAYER)),
    Row("x_embedder", "all_x_embedder.2-1"),
    *under("final_layer", "all_final_layer.2-1", _FINAL),
)

ZIMAGE = Architecture(
    id="z-image",
    title="Z-Image",
    components=(transformer(_ROWS, comfyui=_COMFY_ROWS), llama_style("text_encoder", "qwen3_4b")),
    signature=("layers.{i}.adaLN_modulation.0", "cap_embedder.1"),
    modelspec="Z-Image",
    base_versions=("z_image",),
)

# ------------------------------------------------------------------------------ Lumina Image 2

_WIDTH2 = (2304,)
_GQA = Fused(
    "attention.qkv",
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    "gqa",
    inputs=_WIDTH2,
    typical=(1, 1 / 3, 1 / 3),
)
_LAYER2 = (
    _GQA,
    Row("attention.out", "attn.to_out.0", inputs=_WIDTH2),
    Row("attention.q_norm", "attn.norm_q"),
    Row("attention.k_norm", "attn.norm_k"),
    Row("feed_forward.w1", "feed_forward.linear_1", inputs=_WIDTH2),
    Row("feed_forward.w2", "feed_forward.linear_2", inputs=(9216,)),
    Row("feed_forward.w3", "feed_forward.linear_3", inputs=_WIDTH2),
    Row("attention_norm2", "norm2"),
    *same("ffn_norm1", "ffn_norm2"),
)
_MODULATED = (
    *_LAYER2,
    Row("adaLN_modulation.1", "norm1.linear"),
    Row("attention_norm1", "norm1.norm"),
)
_ROWS2 = (
    *under("layers.{i}", "layers.{i}", _MODULATED),
    *under("noise_refiner.{i}", "noise_refiner.{i}", _MODULATED),
    *under(
        "context_refiner.{i}", "context_refiner.{i}", (*_LAYER2, Row("attention_norm1", "norm1"))
    ),
    *same("x_embedder"),
    Row("t_embedder.mlp.0", "time_caption_embed.timestep_embedder.linear_1"),
    Row("t_embedder.mlp.2", "time_caption_embed.timestep_embedder.linear_2"),
    Row("cap_embedder.0", "time_caption_embed.caption_embedder.0"),
    Row("cap_embedder.1", "time_caption_embed.caption_embedder.1"),
    Row("final_layer.adaLN_modulation.1", "norm_out.linear_1"),
    Row("final_layer.linear", "norm_out.linear_2"),
)

LUMINA2 = Architecture(
    id="lumina2",
    title="Lumina Image 2",
    components=(transformer(_ROWS2), llama_style("text_encoder", "gemma2_2b")),
    signature=("layers.{i}.adaLN_modulation.1", "cap_embedder.0"),
    modelspec="lumina-2",
    base_versions=("lumina2",),
)
