"""Rows of LTX-Video and LTX-2 / 2.3.

Source: diffusers 0.42.1 ``single_file_utils.py``, ``lora_conversion_utils.py`` (2.3's prompt
modulation) and ``scripts/convert_ltx2_to_diffusers.py`` (the connectors, which stand partly inside
the transformer's tree and partly beside it). No halves are swapped.
"""

from __future__ import annotations

from dataclasses import replace

from loratools.keymaps.architecture import Architecture, Component, Row
from loratools.keymaps.dit_tables import of_width, same, transformer, under
from loratools.keymaps.text_encoders import llama_style, t5

_MODULATION = same("emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2", "linear")
_NORMS = (Row("q_norm", "norm_q"), Row("k_norm", "norm_k"))
_PROJECTIONS = same("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = same("net.0.proj", "net.2")
_CAPTION = same("linear_1", "linear_2")

# --------------------------------------------------------------------------------- LTX-Video

_BLOCK = (
    *under("attn1", "attn1", (*of_width((2048,), _PROJECTIONS), *_NORMS)),
    *under("attn2", "attn2", (*of_width((2048,), _PROJECTIONS), *_NORMS)),
    *under("ff", "ff", (*of_width((2048,), same("net.0.proj")), *same("net.2"))),
    *same("scale_shift_table"),
)
_ENDS = (
    Row("patchify_proj", "proj_in"),
    *under("adaln_single", "time_embed", _MODULATION),
    *under("caption_projection", "caption_projection", _CAPTION),
    *same("proj_out", "scale_shift_table"),
)

LTX = Architecture(
    id="ltx",
    title="LTX-Video",
    components=(
        transformer((*under("transformer_blocks.{i}", "transformer_blocks.{i}", _BLOCK), *_ENDS)),
        t5("text_encoder", kohya=("lora_te", "lora_te1")),
    ),
    signature=("patchify_proj", "adaln_single.linear"),
)

# ------------------------------------------------------------------------------------- LTX-2

_ATTENTION2 = (*_PROJECTIONS, *_NORMS, *same("to_gate_logits"))
_SELF2 = (*of_width((4096,), _PROJECTIONS), *_NORMS, *same("to_gate_logits"))
_BLOCK2 = (
    *under("attn1", "attn1", _SELF2),
    *under("attn2", "attn2", _SELF2),
    *(
        row
        for name in ("audio_attn1", "audio_attn2", "audio_to_video_attn", "video_to_audio_attn")
        for row in under(name, name, _ATTENTION2)
    ),
    *under("ff", "ff", (*of_width((4096,), same("net.0.proj")), *same("net.2"))),
    *under("audio_ff", "audio_ff", _FEED_FORWARD),
    *same("scale_shift_table", "audio_scale_shift_table"),
    *same("prompt_scale_shift_table", "audio_prompt_scale_shift_table"),
    Row("scale_shift_table_a2v_ca_video", "video_a2v_cross_attn_scale_shift_table"),
    Row("scale_shift_table_a2v_ca_audio", "audio_a2v_cross_attn_scale_shift_table"),
)
_MODULATIONS2 = (
    ("audio_adaln_single", "audio_time_embed"),
    ("av_ca_video_scale_shift_adaln_single", "av_cross_attn_video_scale_shift"),
    ("av_ca_audio_scale_shift_adaln_single", "av_cross_attn_audio_scale_shift"),
    ("av_ca_a2v_gate_adaln_single", "av_cross_attn_video_a2v_gate"),
    ("av_ca_v2a_gate_adaln_single", "av_cross_attn_audio_v2a_gate"),
    ("prompt_adaln_single", "prompt_adaln"),
    ("audio_prompt_adaln_single", "audio_prompt_adaln"),
)
_ROWS2 = (
    *under("transformer_blocks.{i}", "transformer_blocks.{i}", _BLOCK2),
    *_ENDS,
    Row("audio_patchify_proj", "audio_proj_in"),
    *under("audio_caption_projection", "audio_caption_projection", _CAPTION),
    *same("audio_proj_out", "audio_scale_shift_table", "keyframes_abs_pos_embedding"),
    *(row for place in _MODULATIONS2 for row in under(*place, _MODULATION)),
)
_CONNECTOR_BLOCK = (
    *under("attn1", "attn1", _ATTENTION2),
    *under("ff", "ff", _FEED_FORWARD),
)
_CONNECTOR_ROWS = tuple(
    row
    for stream in ("video", "audio")
    for place in ((f"{stream}_embeddings_connector", f"{stream}_connector"),)
    for row in (
        *under(
            f"{place[0]}.transformer_1d_blocks.{{i}}",
            f"{place[1]}.transformer_blocks.{{i}}",
            _CONNECTOR_BLOCK,
        ),
        *under(*place, same("learnable_registers")),
    )
)
_PROJECTION_ROWS = (
    Row("aggregate_embed", "text_proj_in"),
    Row("video_aggregate_embed", "video_text_proj_in"),
    Row("audio_aggregate_embed", "audio_text_proj_in"),
)

LTX2 = Architecture(
    id="ltx2",
    title="LTX-2 / 2.3",
    components=(
        transformer(_ROWS2),
        replace(transformer(_CONNECTOR_ROWS), name="connectors"),
        Component(
            name="connectors",
            original="text_embedding_projection",
            checkpoint=("text_embedding_projection.",),
            kohya=("lora_te_text_embedding_projection",),
            rows=_PROJECTION_ROWS,
        ),
        llama_style("text_encoder", "gemma3_12b"),
    ),
    signature=("av_ca_a2v_gate_adaln_single.linear", "audio_patchify_proj"),
)
