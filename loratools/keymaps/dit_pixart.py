"""Rows of PixArt (alpha, sigma) and of Sana, which grew from it.

Source: PixArt: ComfyUI ``utils.py`` (``pixart_to_diffusers``) and diffusers'
``scripts/convert_pixart_alpha_to_diffusers.py``; Sana: diffusers 0.42.1 ``single_file_utils.py``.
Sana's feed-forward is made of convolutions, one of them depthwise.

Sana Sprint: diffusers' ``scripts/convert_sana_to_diffusers.py``.

Not mapped: ``y_embedder.y_embedding`` (a buffer).
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Fused, Row
from loratools.keymaps.dit_tables import fused, of_width, same, transformer, under
from loratools.keymaps.text_encoders import llama_style, t5

_ATTENTION = (
    fused("attn.qkv", "attn1"),
    Row("attn.proj", "attn1.to_out.0"),
    Row("cross_attn.q_linear", "attn2.to_q"),
    Fused("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v")),
    Row("cross_attn.proj", "attn2.to_out.0"),
)
_MLP = (Row("mlp.0", "linear_1"), Row("mlp.2", "linear_2"))
_CAPTION = (Row("fc1", "linear_1"), Row("fc2", "linear_2"))
_ENDS = (
    Row("final_layer.linear", "proj_out"),
    Row("final_layer.scale_shift_table", "scale_shift_table"),
    *under("y_embedder.y_proj", "caption_projection", _CAPTION),
)

# ------------------------------------------------------------------------------------ PixArt

_PIXART_BLOCK = (
    *of_width((1152,), _ATTENTION),
    Row("mlp.fc1", "ff.net.0.proj"),
    Row("mlp.fc2", "ff.net.2"),
    *same("scale_shift_table"),
)
_PIXART_ROWS = (
    *under("blocks.{i}", "transformer_blocks.{i}", _PIXART_BLOCK),
    *_ENDS,
    Row("x_embedder.proj", "pos_embed.proj"),
    *under("t_embedder", "adaln_single.emb.timestep_embedder", _MLP),
    *under("csize_embedder", "adaln_single.emb.resolution_embedder", _MLP),
    *under("ar_embedder", "adaln_single.emb.aspect_ratio_embedder", _MLP),
    Row("t_block.1", "adaln_single.linear"),
)

PIXART = Architecture(
    id="pixart",
    title="PixArt alpha / sigma",
    components=(transformer(_PIXART_ROWS), t5("text_encoder", kohya=("lora_te1", "lora_te"))),
    signature=("blocks.{i}.cross_attn.kv_linear", "blocks.{i}.mlp.fc1", "t_block.1"),
)

# -------------------------------------------------------------------------------------- Sana

_QK_NORMS = (Row("q_norm", "norm_q"), Row("k_norm", "norm_k"))
_SANA_BLOCK = (
    *of_width((2240, 1152), _ATTENTION),
    Row("mlp.inverted_conv.conv", "ff.conv_inverted"),
    Row("mlp.depth_conv.conv", "ff.conv_depth"),
    Row("mlp.point_conv.conv", "ff.conv_point"),
    # of Sana 1.5 and Sprint
    *under("attn", "attn1", _QK_NORMS),
    *under("cross_attn", "attn2", _QK_NORMS),
    *same("scale_shift_table"),
)
_SANA_COMMON = (
    *under("blocks.{i}", "transformer_blocks.{i}", _SANA_BLOCK),
    *_ENDS,
    Row("x_embedder.proj", "patch_embed.proj"),
    Row("t_block.1", "time_embed.linear"),
    Row("attention_y_norm", "caption_norm"),
)
_SANA_ROWS = (*_SANA_COMMON, *under("t_embedder", "time_embed.emb.timestep_embedder", _MLP))
_SPRINT_ROWS = (
    *_SANA_COMMON,
    *under("t_embedder", "time_embed.timestep_embedder", _MLP),
    *under("cfg_embedder", "time_embed.guidance_embedder", _MLP),
)
_SANA_BLOCKS = (("transformer_blocks", 20),)

SANA = Architecture(
    id="sana",
    title="Sana",
    components=(transformer(_SANA_ROWS), llama_style("text_encoder", "gemma2_2b")),
    signature=("blocks.{i}.cross_attn.kv_linear", "blocks.{i}.mlp.inverted_conv.conv"),
    blocks=_SANA_BLOCKS,
)

SANA_SPRINT = Architecture(
    id="sana-sprint",
    title="Sana Sprint",
    components=(transformer(_SPRINT_ROWS), llama_style("text_encoder", "gemma2_2b")),
    signature=("cfg_embedder.mlp.0",),
    blocks=_SANA_BLOCKS,
)
