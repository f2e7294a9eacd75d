"""Rows of Stable Diffusion 3 and 3.5 (MMDiT).

Source: diffusers 0.42.1 ``single_file_utils.py``. The last block's ``context_block`` ends in two
modulation vectors instead of six, and only there are they swapped. diffusers has no LoRA converter
for SD3.

Not mapped: ``pos_embed`` (a buffer).
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Row
from loratools.keymaps.dit_tables import ADDED_QKV, fused, of_width, same, transformer, under
from loratools.keymaps.text_encoders import clip_g, clip_l, t5

_WIDTHS = (1536, 2432)  # 64 x depth: medium, large
_ATTENTION = (
    fused("x_block.attn.qkv", "attn"),
    fused("context_block.attn.qkv", "attn", ADDED_QKV),
    fused("x_block.attn2.qkv", "attn2"),
    Row("x_block.attn.proj", "attn.to_out.0"),
    Row("context_block.attn.proj", "attn.to_add_out"),
    Row("x_block.attn2.proj", "attn2.to_out.0"),
    Row("x_block.mlp.fc1", "ff.net.0.proj"),
    Row("context_block.mlp.fc1", "ff_context.net.0.proj"),
    Row("x_block.adaLN_modulation.1", "norm1.linear"),
    Row("context_block.adaLN_modulation.1", "norm1_context.linear", "halves_swapped_if_two"),
)
_BLOCK = (
    *of_width(_WIDTHS, _ATTENTION),
    Row("x_block.mlp.fc2", "ff.net.2"),
    Row("context_block.mlp.fc2", "ff_context.net.2"),
    Row("x_block.attn.ln_q", "attn.norm_q"),
    Row("x_block.attn.ln_k", "attn.norm_k"),
    Row("context_block.attn.ln_q", "attn.norm_added_q"),
    Row("context_block.attn.ln_k", "attn.norm_added_k"),
    Row("x_block.attn2.ln_q", "attn2.norm_q"),
    Row("x_block.attn2.ln_k", "attn2.norm_k"),
)
_MLP = (Row("mlp.0", "linear_1"), Row("mlp.2", "linear_2"))
_ROWS = (
    *under("joint_blocks.{i}", "transformer_blocks.{i}", _BLOCK),
    *under("t_embedder", "time_text_embed.timestep_embedder", _MLP),
    *under("y_embedder", "time_text_embed.text_embedder", _MLP),
    *same("context_embedder"),
    Row("x_embedder.proj", "pos_embed.proj"),
    Row("final_layer.linear", "proj_out"),
    Row("final_layer.adaLN_modulation.1", "norm_out.linear", "halves_swapped"),
)

SD3 = Architecture(
    id="sd3",
    title="Stable Diffusion 3 / 3.5",
    components=(
        transformer(_ROWS),
        clip_l("text_encoder"),
        clip_g("text_encoder_2"),
        t5("text_encoder_3", kohya=("lora_te3",)),
    ),
    signature=(
        "joint_blocks.{i}.context_block.adaLN_modulation.1",
        "y_embedder.mlp.0",
        "x_embedder.proj",
    ),
    modelspec="stable-diffusion-3",
    base_versions=("sd3",),
)
