"""Rows of HunyuanVideo, HunyuanVideo 1.5, HunyuanImage 2.1 and FramePack.

Source: diffusers 0.42.1 ``single_file_utils.py``; 1.5 and HunyuanImage: diffusers'
``scripts/convert_hunyuan_video1_5_to_diffusers.py`` and ``convert_hunyuan_image_to_diffusers.py``;
ComfyUI's names: ``supported_models.py``. Tencent's 1.5 holds query, key and value of the double
blocks apart, ComfyUI's file of it together. Tencent's file of HunyuanImage holds them apart, the
repackaged one that sd-scripts trains on together. The token refiner's two gates are not swapped.
FramePack's kohya names are made of diffusers' names.
"""

from __future__ import annotations

from dataclasses import replace

from loratools.keymaps.architecture import Architecture, Fused, Row
from loratools.keymaps.dit_tables import (
    ADDED_QKV,
    QKV,
    Rows,
    fused,
    of_width,
    same,
    transformer,
    under,
)
from loratools.keymaps.text_encoders import clip_l, llama_style, t5

_DOUBLE_PLACE = ("double_blocks.{i}", "transformer_blocks.{i}")
_SINGLE_PLACE = ("single_blocks.{i}", "single_transformer_blocks.{i}")
_REFINER_PLACE = (
    "txt_in.individual_token_refiner.blocks.{i}",
    "context_embedder.token_refiner.refiner_blocks.{i}",
)
_MLP = (Row("mlp.0", "linear_1"), Row("mlp.2", "linear_2"))
_IN_OUT = (Row("in_layer", "linear_1"), Row("out_layer", "linear_2"))
_FC = (Row("fc1", "net.0.proj"), Row("fc2", "net.2"))
_SEQUENTIAL = (Row("0", "net.0.proj"), Row("2", "net.2"))

# ------------------------------------------------------------------------- what they all have

_FUSED_ATTENTION = (
    fused("img_attn_qkv", "attn"),
    fused("txt_attn_qkv", "attn", ADDED_QKV),
)
_SPLIT_ATTENTION = tuple(
    Row(f"{stream}_attn_{letter}", f"attn.{part}")
    for stream, parts in (("img", QKV), ("txt", ADDED_QKV))
    for letter, part in zip("qkv", parts, strict=True)
)
_DOUBLE = (
    Row("img_attn_proj", "attn.to_out.0"),
    Row("txt_attn_proj", "attn.to_add_out"),
    *under("img_mlp", "ff", _FC),
    *under("txt_mlp", "ff_context", _FC),
    Row("img_mod.linear", "norm1.linear"),
    Row("txt_mod.linear", "norm1_context.linear"),
    Row("img_attn_q_norm", "attn.norm_q"),
    Row("img_attn_k_norm", "attn.norm_k"),
    Row("txt_attn_q_norm", "attn.norm_added_q"),
    Row("txt_attn_k_norm", "attn.norm_added_k"),
)
_REFINER = (
    fused("self_attn_qkv", "attn"),
    Row("self_attn_proj", "attn.to_out.0"),
    *under("mlp", "ff", _FC),
    Row("adaLN_modulation.1", "norm_out.linear"),
    *same("norm1", "norm2"),
)
_COMMON = (
    *under(*_DOUBLE_PLACE, _DOUBLE),
    *under(*_REFINER_PLACE, _REFINER),
    Row("txt_in.input_embedder", "context_embedder.proj_in"),
    *under("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", _MLP),
    *under(
        "txt_in.c_embedder",
        "context_embedder.time_text_embed.text_embedder",
        same("linear_1", "linear_2"),
    ),
    Row("img_in.proj", "x_embedder.proj"),
    Row("final_layer.linear", "proj_out"),
    Row("final_layer.adaLN_modulation.1", "norm_out.linear", "halves_swapped"),
)
_COMFY_DOUBLE = (
    fused("img_attn.qkv", "attn"),
    fused("txt_attn.qkv", "attn", ADDED_QKV),
    Row("img_attn.proj", "attn.to_out.0"),
    Row("txt_attn.proj", "attn.to_add_out"),
    *under("img_mlp", "ff", _SEQUENTIAL),
    *under("txt_mlp", "ff_context", _SEQUENTIAL),
    Row("img_mod.lin", "norm1.linear"),
    Row("txt_mod.lin", "norm1_context.linear"),
    Row("img_attn.norm.query_norm", "attn.norm_q"),
    Row("img_attn.norm.key_norm", "attn.norm_k"),
    Row("txt_attn.norm.query_norm", "attn.norm_added_q"),
    Row("txt_attn.norm.key_norm", "attn.norm_added_k"),
)
_COMFY_REFINER = (
    fused("self_attn.qkv", "attn"),
    Row("self_attn.proj", "attn.to_out.0"),
    *under("mlp", "ff", _SEQUENTIAL),
)
_COMFY = (
    *under(*_DOUBLE_PLACE, _COMFY_DOUBLE),
    *under(*_REFINER_PLACE, _COMFY_REFINER),
    *under("txt_in.t_embedder", "context_embedder.time_text_embed.timestep_embedder", _IN_OUT),
    *under("txt_in.c_embedder", "context_embedder.time_text_embed.text_embedder", _IN_OUT),
)

# ------------------------------------------------------------------------------ single blocks


def _single(width: int) -> Rows:
    return (
        Fused(
            "linear1",
            ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "inner",
            inputs=(width,),
            typical=(1, 1, 1, 4),
        ),
        Row("linear2", "proj_out", inputs=(5 * width,)),
        Row("modulation.linear", "norm.linear"),
        Row("q_norm", "attn.norm_q"),
        Row("k_norm", "attn.norm_k"),
    )


_COMFY_SINGLE = (
    Row("modulation.lin", "norm.linear"),
    Row("norm.query_norm", "attn.norm_q"),
    Row("norm.key_norm", "attn.norm_k"),
)


def _conditions(embedder: str) -> Rows:
    return (
        *under("time_in", f"{embedder}.timestep_embedder", _MLP),
        *under("guidance_in", f"{embedder}.guidance_embedder", _MLP),
    )


def _comfy_conditions(embedder: str) -> Rows:
    return (
        *under("time_in", f"{embedder}.timestep_embedder", _IN_OUT),
        *under("guidance_in", f"{embedder}.guidance_embedder", _IN_OUT),
    )


# ---------------------------------------------------------------- HunyuanVideo and FramePack

_VIDEO_ROWS = (
    *under(*_DOUBLE_PLACE, of_width((3072,), _FUSED_ATTENTION)),
    *under(*_SINGLE_PLACE, _single(3072)),
    *_COMMON,
    *_conditions("time_text_embed"),
    *under("vector_in", "time_text_embed.text_embedder", _IN_OUT),
)
_VIDEO_COMFY = (
    *_COMFY,
    *under(*_SINGLE_PLACE, _COMFY_SINGLE),
    *_comfy_conditions("time_text_embed"),
)
_ENCODERS = (
    llama_style("text_encoder", "llama", kohya=("lora_te1", "lora_te")),
    # OneTrainer's number; ComfyUI calls any CLIP-L the first.
    clip_l("text_encoder_2", kohya=("lora_te2", "lora_te1", "lora_te")),
)
_QWEN_AND_BYT5 = (
    llama_style("text_encoder", "qwen25_7b"),
    t5("text_encoder_2", kohya=("lora_te2",), original="byt5_small"),
)
_FRAMEPACK_ROWS = same(
    "clean_x_embedder.proj",
    "clean_x_embedder.proj_2x",
    "clean_x_embedder.proj_4x",
    "image_projection.up",
    "image_projection.down",
)

HUNYUAN_VIDEO = Architecture(
    id="hunyuan-video",
    title="HunyuanVideo",
    components=(transformer(_VIDEO_ROWS, comfyui=_VIDEO_COMFY), *_ENCODERS),
    signature=(
        "txt_in.individual_token_refiner.blocks.{i}.adaLN_modulation.1",
        "vector_in.in_layer",
    ),
    modelspec="hunyuan-video",
    blocks=(("transformer_blocks", 20), ("single_transformer_blocks", 40)),
    base_versions=("hunyuan_video",),
)

FRAMEPACK = Architecture(
    id="framepack",
    title="FramePack",
    components=(
        replace(
            transformer((*_VIDEO_ROWS, *_FRAMEPACK_ROWS), comfyui=_VIDEO_COMFY),
            flattens="diffusers",
        ),
        *_ENCODERS,
    ),
    signature=("clean_x_embedder.proj", "image_projection.up"),
    modelspec="framepack",
    blocks=(("transformer_blocks", 20), ("single_transformer_blocks", 40)),
    base_versions=("framepack",),
)

# -------------------------------------------------------------------------- HunyuanVideo 1.5

_GLYPHS = (
    Row("layernorm", "norm"),
    Row("fc1", "linear_1"),
    Row("fc2", "linear_2"),
    Row("fc3", "linear_3"),
)
_VISION = (
    Row("proj.0", "norm_in"),
    Row("proj.1", "linear_1"),
    Row("proj.3", "linear_2"),
    Row("proj.4", "norm_out"),
)
_VIDEO15_ROWS = (
    *under(*_DOUBLE_PLACE, of_width((2048,), _SPLIT_ATTENTION)),
    *_COMMON,
    *under("time_in", "time_embed.timestep_embedder", _MLP),
    *under("time_r_in", "time_embed.timestep_embedder_r", _MLP),
    *under("byt5_in", "context_embedder_2", _GLYPHS),
    *under("vision_in", "image_embedder", _VISION),
    Row("cond_type_embedding", "cond_type_embed"),
)
_VIDEO15_COMFY = (
    *_COMFY,
    *under("time_in", "time_embed.timestep_embedder", _IN_OUT),
    *under("time_r_in", "time_embed.timestep_embedder_r", _IN_OUT),
)

HUNYUAN_VIDEO_15 = Architecture(
    id="hunyuan-video-1.5",
    title="HunyuanVideo 1.5",
    components=(
        transformer(
            _VIDEO15_ROWS,
            comfyui=_VIDEO15_COMFY,
            checkpoint_rows=under(*_DOUBLE_PLACE, _FUSED_ATTENTION),
        ),
        *_QWEN_AND_BYT5,
    ),
    signature=("cond_type_embedding", "vision_in.proj.1"),
    modelspec="hunyuan-video-1.5",
    base_versions=("hunyuan_video_1_5",),
)

# -------------------------------------------------------------------------- HunyuanImage 2.1

_IMAGE_ROWS = (
    *under(*_DOUBLE_PLACE, of_width((3584,), _FUSED_ATTENTION)),
    *under(*_SINGLE_PLACE, _single(3584)),
    *_COMMON,
    *_conditions("time_guidance_embed"),
    *under("time_r_in", "time_guidance_embed.timestep_embedder_r", _MLP),
    *under("byt5_in", "context_embedder_2", _GLYPHS),
)
_IMAGE_COMFY = (
    *_COMFY,
    *under(*_SINGLE_PLACE, _COMFY_SINGLE),
    *_comfy_conditions("time_guidance_embed"),
    *under("time_r_in", "time_guidance_embed.timestep_embedder_r", _IN_OUT),
)
_IMAGE_SPLIT = (
    *under(*_DOUBLE_PLACE, _SPLIT_ATTENTION),
    *under(
        *_SINGLE_PLACE,
        (
            Row("linear1_q", "attn.to_q"),
            Row("linear1_k", "attn.to_k"),
            Row("linear1_v", "attn.to_v"),
            Row("linear1_mlp", "proj_mlp"),
            Row("linear2.fc", "proj_out"),
        ),
    ),
)

HUNYUAN_IMAGE = Architecture(
    id="hunyuan-image-2.1",
    title="HunyuanImage 2.1",
    components=(
        transformer(_IMAGE_ROWS, comfyui=_IMAGE_COMFY, checkpoint_rows=_IMAGE_SPLIT),
        *_QWEN_AND_BYT5,
    ),
    signature=("byt5_in.fc1", "single_blocks.{i}.modulation.linear"),
    modelspec="hunyuan-image-2.1",
    base_versions=("hunyuan-image-2.1",),
)
