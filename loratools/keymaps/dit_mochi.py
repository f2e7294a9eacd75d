"""Rows of Mochi 1.

Source: diffusers 0.42.1 ``single_file_utils.py``. The released model has 48 blocks; the last one
has no context stream after its attention, and its context modulation another name in diffusers.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Row
from loratools.keymaps.dit_tables import (
    ADDED_QKV,
    fused,
    of_width,
    same,
    transformer,
    under,
)
from loratools.keymaps.text_encoders import t5

_BLOCK = (
    *of_width((3072,), (fused("attn.qkv_x", "attn1"),)),
    *of_width((1536,), (fused("attn.qkv_y", "attn1", ADDED_QKV),)),
    Row("attn.proj_x", "attn1.to_out.0"),
    Row("attn.proj_y", "attn1.to_add_out"),
    Row("attn.q_norm_x", "attn1.norm_q"),
    Row("attn.k_norm_x", "attn1.norm_k"),
    Row("attn.q_norm_y", "attn1.norm_added_q"),
    Row("attn.k_norm_y", "attn1.norm_added_k"),
    Row("mlp_x.w1", "ff.net.0.proj", "halves_swapped"),
    Row("mlp_x.w2", "ff.net.2"),
    Row("mlp_y.w1", "ff_context.net.0.proj", "halves_swapped"),
    Row("mlp_y.w2", "ff_context.net.2"),
    Row("mod_x", "norm1.linear"),
    Row("mod_y", "norm1_context.linear"),
)
_ROWS = (
    *under("blocks.{i}", "transformer_blocks.{i}", _BLOCK),
    Row("blocks.47.mod_y", "transformer_blocks.47.norm1_context.linear_1"),
    Row("x_embedder.proj", "patch_embed.proj"),
    Row("t_embedder.mlp.0", "time_embed.timestep_embedder.linear_1"),
    Row("t_embedder.mlp.2", "time_embed.timestep_embedder.linear_2"),
    *under("t5_y_embedder", "time_embed.pooler", same("to_kv", "to_q", "to_out")),
    Row("t5_yproj", "time_embed.caption_proj"),
    *same("pos_frequencies"),
    Row("final_layer.mod", "norm_out.linear", "halves_swapped"),
    Row("final_layer.linear", "proj_out"),
)

MOCHI = Architecture(
    id="mochi",
    title="Mochi 1",
    components=(transformer(_ROWS), t5("text_encoder", kohya=("lora_te", "lora_te1"))),
    signature=("blocks.{i}.attn.qkv_x", "t5_yproj"),
)
