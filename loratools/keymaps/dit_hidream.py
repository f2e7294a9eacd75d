"""Rows of HiDream-I1: one name in every ecosystem.

Source: diffusers 0.42.1 ``transformer_hidream_image.py``, ``single_file_utils.py``. No halves are
swapped.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture
from loratools.keymaps.dit_tables import of_width, same, transformer, under
from loratools.keymaps.text_encoders import clip_g, clip_l, llama_style, t5

_SINGLE = (
    *of_width((2560,), same("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out")),
    *same("attn1.q_rms_norm", "attn1.k_rms_norm", "adaLN_modulation.1", "ff_i.gate"),
    *under("ff_i.shared_experts", "ff_i.shared_experts", same("w1", "w2", "w3")),
    *under("ff_i.experts.{j}", "ff_i.experts.{j}", same("w1", "w2", "w3")),
)
_DOUBLE = (
    *_SINGLE,
    *of_width((2560,), same("attn1.to_q_t", "attn1.to_k_t", "attn1.to_v_t", "attn1.to_out_t")),
    *same("attn1.q_rms_norm_t", "attn1.k_rms_norm_t", "ff_t.w1", "ff_t.w2", "ff_t.w3"),
)
_LINEARS = same("linear_1", "linear_2")
_ROWS = (
    *under("double_stream_blocks.{i}.block", "double_stream_blocks.{i}.block", _DOUBLE),
    *under("single_stream_blocks.{i}.block", "single_stream_blocks.{i}.block", _SINGLE),
    *under("t_embedder.timestep_embedder", "t_embedder.timestep_embedder", _LINEARS),
    *under("p_embedder.pooled_embedder", "p_embedder.pooled_embedder", _LINEARS),
    *same("x_embedder.proj", "caption_projection.{i}.linear"),
    *same("final_layer.linear", "final_layer.adaLN_modulation.1"),
)

HIDREAM = Architecture(
    id="hidream",
    title="HiDream-I1",
    components=(
        transformer(_ROWS),
        clip_l("text_encoder"),
        clip_g("text_encoder_2"),
        t5("text_encoder_3", kohya=("lora_te3",)),
        llama_style("text_encoder_4", "llama", kohya=("lora_te4",)),
    ),
    signature=("double_stream_blocks.{i}.block.adaLN_modulation.1",),
)
