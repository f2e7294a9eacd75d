"""Rows of Black Forest Labs' transformers and of Chroma.

Source: diffusers 0.42.1 ``single_file_utils.py`` (FLUX.1, Chroma, FLUX.2, FLUX.3). FLUX.2's single
blocks keep query, key, value and the gated feed-forward in one projection in both trees.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Fused, Row
from loratools.keymaps.dit_tables import (
    ADDED_QKV,
    fused,
    of_width,
    same,
    scales,
    transformer,
    under,
)
from loratools.keymaps.text_encoders import clip_l, t5

_EMBEDDER = (Row("in_layer", "linear_1"), Row("out_layer", "linear_2"))

_ATTENTION = (
    fused("img_attn.qkv", "attn"),
    fused("txt_attn.qkv", "attn", ADDED_QKV),
    Row("img_attn.proj", "attn.to_out.0"),
    Row("txt_attn.proj", "attn.to_add_out"),
)
_DOUBLE_NORMS = (
    Row("img_attn.norm.query_norm", "attn.norm_q"),
    Row("img_attn.norm.key_norm", "attn.norm_k"),
    Row("txt_attn.norm.query_norm", "attn.norm_added_q"),
    Row("txt_attn.norm.key_norm", "attn.norm_added_k"),
)
_SINGLE_NORMS = (Row("norm.query_norm", "attn.norm_q"), Row("norm.key_norm", "attn.norm_k"))
_NORMS = (
    *under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE_NORMS),
    *under("single_blocks.{i}", "single_transformer_blocks.{i}", _SINGLE_NORMS),
)
_ENDS = (
    Row("img_in", "x_embedder"),
    Row("txt_in", "context_embedder"),
    Row("final_layer.linear", "proj_out"),
)
_FINAL_MODULATION = Row("final_layer.adaLN_modulation.1", "norm_out.linear", "halves_swapped")

# ------------------------------------------------------------------------- FLUX.1 and Chroma

_WIDTH = (3072,)
_DOUBLE = (
    *of_width(_WIDTH, _ATTENTION),
    Row("img_mlp.0", "ff.net.0.proj", inputs=_WIDTH),
    Row("txt_mlp.0", "ff_context.net.0.proj", inputs=_WIDTH),
    Row("img_mlp.2", "ff.net.2", inputs=(12288,)),
    Row("txt_mlp.2", "ff_context.net.2", inputs=(12288,)),
)
_LINEAR1 = Fused(
    "linear1",
    ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
    "inner",
    inputs=_WIDTH,
    typical=(1, 1, 1, 4),
)
_SINGLE = (_LINEAR1, Row("linear2", "proj_out", inputs=(15360,)))
_BLOCKS = (
    *under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE),
    *under("single_blocks.{i}", "single_transformer_blocks.{i}", _SINGLE),
    *_NORMS,
    *_ENDS,
)
_MODULATION = (
    Row("double_blocks.{i}.img_mod.lin", "transformer_blocks.{i}.norm1.linear"),
    Row("double_blocks.{i}.txt_mod.lin", "transformer_blocks.{i}.norm1_context.linear"),
    Row("single_blocks.{i}.modulation.lin", "single_transformer_blocks.{i}.norm.linear"),
    *under("time_in", "time_text_embed.timestep_embedder", _EMBEDDER),
    *under("vector_in", "time_text_embed.text_embedder", _EMBEDDER),
    *under("guidance_in", "time_text_embed.guidance_embedder", _EMBEDDER),
    _FINAL_MODULATION,
)
_APPROXIMATOR = (
    *same("distilled_guidance_layer.in_proj", "distilled_guidance_layer.out_proj"),
    *under("distilled_guidance_layer.layers.{i}", "distilled_guidance_layer.layers.{i}", _EMBEDDER),
)
_APPROXIMATOR_NORMS = same("distilled_guidance_layer.norms.{i}")

FLUX1 = Architecture(
    id="flux1",
    title="FLUX.1",
    components=(
        transformer((*_BLOCKS, *_MODULATION), checkpoint_rows=scales(_NORMS)),
        clip_l("text_encoder"),
        t5("text_encoder_2"),
    ),
    signature=("double_blocks.{i}.img_mod.lin", "vector_in.in_layer"),
    modelspec="flux-1-dev",
    blocks=(("transformer_blocks", 19), ("single_transformer_blocks", 38)),
    base_versions=("flux1", "flux_kontext"),
)

CHROMA = Architecture(
    id="chroma",
    title="Chroma",
    components=(
        transformer(
            (*_BLOCKS, *_APPROXIMATOR, *_APPROXIMATOR_NORMS),
            checkpoint_rows=scales((*_NORMS, *_APPROXIMATOR_NORMS)),
        ),
        t5("text_encoder", kohya=("lora_te3", "lora_te1", "lora_te2")),
    ),
    signature=("distilled_guidance_layer.in_proj",),
    modelspec="chroma",
    blocks=(("transformer_blocks", 19), ("single_transformer_blocks", 38)),
    base_versions=("chroma",),
)

# ------------------------------------------------------------------------------------ FLUX.2

_WIDTHS2 = (6144, 3072, 4096)  # dev, klein 4B, klein 9B
_DOUBLE2 = (
    *of_width(_WIDTHS2, _ATTENTION),
    Row("img_mlp.0", "ff.linear_in", inputs=_WIDTHS2),
    Row("txt_mlp.0", "ff_context.linear_in", inputs=_WIDTHS2),
    Row("img_mlp.2", "ff.linear_out", inputs=(18432, 9216, 12288)),
    Row("txt_mlp.2", "ff_context.linear_out", inputs=(18432, 9216, 12288)),
)
_SINGLE2 = (
    Row("linear1", "attn.to_qkv_mlp_proj", inputs=_WIDTHS2),
    Row("linear2", "attn.to_out", inputs=(24576, 12288, 16384)),
)
_ROWS2 = (
    *under("double_blocks.{i}", "transformer_blocks.{i}", _DOUBLE2),
    *under("single_blocks.{i}", "single_transformer_blocks.{i}", _SINGLE2),
    *_NORMS,
    *_ENDS,
    Row("double_stream_modulation_img.lin", "double_stream_modulation_img.linear"),
    Row("double_stream_modulation_txt.lin", "double_stream_modulation_txt.linear"),
    Row("single_stream_modulation.lin", "single_stream_modulation.linear"),
    *under("time_in", "time_guidance_embed.timestep_embedder", _EMBEDDER),
    *under("guidance_in", "time_guidance_embed.guidance_embedder", _EMBEDDER),
    _FINAL_MODULATION,
)

FLUX2 = Architecture(
    id="flux2",
    title="FLUX.2",
    components=(transformer(_ROWS2, checkpoint_rows=scales(_NORMS)),),
    signature=("single_stream_modulation.lin",),
    modelspec="Flux.2-dev",
    base_versions=("flux_2_dev", "flux_2_klein_4b", "flux_2_klein_9b"),
)

# ------------------------------------------------------------------------------------ FLUX.3

_BLOCK3 = (
    Row("q_proj", "attn.to_q"),
    Row("k_proj", "attn.to_k"),
    Row("v_proj", "attn.to_v"),
    Row("attn_out", "attn.to_out.0"),
    Row("mlp_in", "ff.linear_in"),
    Row("mlp_out", "ff.linear_out"),
)
_PLACES3 = (
    ("content_mode_blocks.image.{i}", "mode_blocks.image.{i}"),
    ("content_mode_blocks.image_cond.{i}", "mode_blocks.image_cond.{i}"),
    ("txt_mode_blocks.{i}", "txt_mode_blocks.{i}"),
    ("single_blocks.{i}", "single_transformer_blocks.{i}"),
)
_MODES3 = ("image", "image_cond", "txt")
_NORMS3 = tuple(row for place in _PLACES3 for row in under(*place, _SINGLE_NORMS))
_ROWS3 = (
    *(row for place in _PLACES3 for row in under(*place, _BLOCK3)),
    *_NORMS3,
    *(
        Row(f"{stage}_stream_modulations.{mode}.lin", f"{stage}_stream_modulations.{mode}.linear")
        for stage in ("early", "single")
        for mode in _MODES3
    ),
    Row("emb_in.image", "x_embedders.image"),
    Row("emb_in.image_cond", "x_embedders.image_cond"),
    Row("txt_in", "context_embedder"),
    *under("time_in", "timestep_embedder", _EMBEDDER),
    *under("ref_time_in", "target_timestep_embedder", _EMBEDDER),
    Row("final_layer.image.linear", "proj_out"),
    Row("final_layer.image.adaLN_modulation.1", "norm_out.linear", "halves_swapped"),
)

FLUX3 = Architecture(
    id="flux3",
    title="FLUX.3",
    components=(transformer(_ROWS3, checkpoint_rows=scales(_NORMS3)),),
    signature=("early_stream_modulations.image.lin",),
)
