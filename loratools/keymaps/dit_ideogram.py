"""Rows of Ideogram 4 and ERNIE-Image, whose names hardly differ between ecosystems.

Source: diffusers 0.42.1 ``transformer_ideogram4.py``, ``transformer_ernie_image.py``; Ideogram's
own names: ComfyUI ``ldm/ideogram4/model.py``. No halves are swapped.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Row
from loratools.keymaps.dit_tables import fused, of_width, same, transformer, under
from loratools.keymaps.text_encoders import llama_style

_WIDTH = (4608,)
_LAYER = (
    *of_width(_WIDTH, (fused("attention.qkv", "attention"),)),
    Row("attention.o", "attention.to_out.0", inputs=_WIDTH),
    *of_width(_WIDTH, same("feed_forward.w1", "feed_forward.w3")),
    *of_width((12288,), same("feed_forward.w2")),
    *same("attention.norm_q", "attention.norm_k", "adaln_modulation"),
    *same("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"),
)
_ROWS = (
    *under("layers.{i}", "layers.{i}", _LAYER),
    *same("input_proj", "llm_cond_norm", "llm_cond_proj", "adaln_proj", "embed_image_indicator"),
    *same("t_embedding.mlp_in", "t_embedding.mlp_out"),
    *same("final_layer.linear", "final_layer.adaln_modulation"),
)

IDEOGRAM4 = Architecture(
    id="ideogram4",
    title="Ideogram 4",
    components=(transformer(_ROWS), llama_style("text_encoder", "qwen3vl_8b")),
    signature=("llm_cond_proj", "layers.{i}.attention.qkv"),
    modelspec="Ideogram-4",
    base_versions=("ideogram4",),
)

_ERNIE_LAYER = same(
    "self_attention.to_q",
    "self_attention.to_k",
    "self_attention.to_v",
    "self_attention.to_out.0",
    "self_attention.norm_q",
    "self_attention.norm_k",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.linear_fc2",
    "adaLN_sa_ln",
    "adaLN_mlp_ln",
)
_ERNIE_ROWS = (
    *under("layers.{i}", "layers.{i}", _ERNIE_LAYER),
    *same("x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2"),
    *same("adaLN_modulation.1", "final_norm.linear", "final_linear"),
)

ERNIE_IMAGE = Architecture(
    id="ernie-image",
    title="ERNIE-Image",
    components=(transformer(_ERNIE_ROWS), llama_style("text_encoder", "ministral3_3b")),
    signature=("layers.{i}.self_attention.to_q", "layers.{i}.mlp.linear_fc2"),
    base_versions=("ernie_image",),
)
