"""Rows of AuraFlow.

Source: diffusers 0.42.1 ``single_file_utils.py``.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Row
from loratools.keymaps.dit_tables import same, transformer, under
from loratools.keymaps.text_encoders import t5

_FEED_FORWARD = (
    Row("c_fc1", "linear_1"),
    Row("c_fc2", "linear_2"),
    Row("c_proj", "out_projection"),
)
_DOUBLE = (
    Row("attn.w2q", "attn.to_q"),
    Row("attn.w2k", "attn.to_k"),
    Row("attn.w2v", "attn.to_v"),
    Row("attn.w2o", "attn.to_out.0"),
    Row("attn.w1q", "attn.add_q_proj"),
    Row("attn.w1k", "attn.add_k_proj"),
    Row("attn.w1v", "attn.add_v_proj"),
    Row("attn.w1o", "attn.to_add_out"),
    *under("mlpX", "ff", _FEED_FORWARD),
    *under("mlpC", "ff_context", _FEED_FORWARD),
    Row("modX.1", "norm1.linear"),
    Row("modC.1", "norm1_context.linear"),
)
_SINGLE = (
    Row("attn.w1q", "attn.to_q"),
    Row("attn.w1k", "attn.to_k"),
    Row("attn.w1v", "attn.to_v"),
    Row("attn.w1o", "attn.to_out.0"),
    *under("mlp", "ff", _FEED_FORWARD),
    Row("modCX.1", "norm1.linear"),
)
_ROWS = (
    *under("double_layers.{i}", "joint_transformer_blocks.{i}", _DOUBLE),
    *under("single_layers.{i}", "single_transformer_blocks.{i}", _SINGLE),
    Row("t_embedder.mlp.0", "time_step_proj.linear_1"),
    Row("t_embedder.mlp.2", "time_step_proj.linear_2"),
    Row("cond_seq_linear", "context_embedder"),
    Row("init_x_linear", "pos_embed.proj"),
    Row("positional_encoding", "pos_embed.pos_embed"),
    *same("register_tokens"),
    Row("final_linear", "proj_out"),
    Row("modF.1", "norm_out.linear", "halves_swapped"),
)

AURAFLOW = Architecture(
    id="auraflow",
    title="AuraFlow",
    components=(
        transformer(_ROWS),
        t5("text_encoder", kohya=("lora_te", "lora_te1"), original="pile_t5xl"),
    ),
    signature=("double_layers.{i}.attn.w1q",),
)
