"""Rows of Wan 2.1 and 2.2 with VACE, Animate, FLF2V and SkyReels-V2, which are supersets of T2V.

Source: diffusers 0.42.1 ``single_file_utils.py``; FLF2V's ``emb_pos`` and SkyReels' ``fps_*``:
diffusers' ``scripts/convert_wan_to_diffusers.py`` and ``convert_skyreelsv2_to_diffusers.py``. The
norms of a block change numbers: Wan counts the one before cross-attention third, diffusers second.
The two experts of 2.2-A14B are two files in every ecosystem but diffusers.

Not mapped: the activations' biases of Animate's motion encoder (stored (1, C, 1, 1) in the
original), and Wan-Animate 2, whose diffusers model keeps most original names.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Fused, Row
from loratools.keymaps.dit_tables import of_width, same, transformer, under
from loratools.keymaps.text_encoders import t5

_WIDTHS = (5120, 1536, 3072, 2048)  # 14B, 1.3B, 2.2 TI2V 5B, SkyReels in diffusers
_BLOCK = (
    *of_width(
        _WIDTHS,
        (
            Row("self_attn.q", "attn1.to_q"),
            Row("self_attn.k", "attn1.to_k"),
            Row("self_attn.v", "attn1.to_v"),
            Row("self_attn.o", "attn1.to_out.0"),
            Row("cross_attn.q", "attn2.to_q"),
            Row("cross_attn.k", "attn2.to_k"),
            Row("cross_attn.v", "attn2.to_v"),
            Row("cross_attn.o", "attn2.to_out.0"),
            Row("cross_attn.k_img", "attn2.add_k_proj"),
            Row("cross_attn.v_img", "attn2.add_v_proj"),
            Row("ffn.0", "ffn.net.0.proj"),
        ),
    ),
    Row("ffn.2", "ffn.net.2"),
    Row("self_attn.norm_q", "attn1.norm_q"),
    Row("self_attn.norm_k", "attn1.norm_k"),
    Row("cross_attn.norm_q", "attn2.norm_q"),
    Row("cross_attn.norm_k", "attn2.norm_k"),
    Row("cross_attn.norm_k_img", "attn2.norm_added_k"),
    Row("norm3", "norm2"),
    Row("modulation", "scale_shift_table"),
)
_LINEARS = (Row("0", "linear_1"), Row("2", "linear_2"))
_IMAGE = (
    Row("proj.0", "norm1"),
    Row("proj.1", "ff.net.0.proj"),
    Row("proj.3", "ff.net.2"),
    Row("proj.4", "norm2"),
    Row("emb_pos", "pos_embed"),
)
_VACE = (
    *under("vace_blocks.{i}", "vace_blocks.{i}", _BLOCK),
    Row("vace_blocks.{i}.before_proj", "vace_blocks.{i}.proj_in"),
    Row("vace_blocks.{i}.after_proj", "vace_blocks.{i}.proj_out"),
    *same("vace_patch_embedding"),
)
_FACE = (
    Row("linear1_q", "to_q"),
    Fused("linear1_kv", ("to_k", "to_v")),
    Row("linear2", "to_out"),
    Row("q_norm", "norm_q"),
    Row("k_norm", "norm_k"),
)
_RESIDUAL = (
    Row("conv1.0", "conv1"),
    Row("conv2.1", "conv2"),
    Row("skip.1", "conv_skip"),
)
_ENCODER = "motion_encoder.enc.net_app.convs"
_ANIMATE = (
    *under("face_adapter.fuser_blocks.{i}", "face_adapter.{i}", _FACE),
    *same("pose_patch_embedding", "face_encoder.out_proj", "face_encoder.padding_tokens"),
    Row("face_encoder.conv1_local.conv", "face_encoder.conv1_local"),
    Row("face_encoder.conv2.conv", "face_encoder.conv2"),
    Row("face_encoder.conv3.conv", "face_encoder.conv3"),
    Row(f"{_ENCODER}.0.0", "motion_encoder.conv_in"),
    *(
        row
        for i in range(7)
        for row in under(f"{_ENCODER}.{i + 1}", f"motion_encoder.res_blocks.{i}", _RESIDUAL)
    ),
    Row(f"{_ENCODER}.8", "motion_encoder.conv_out"),
    Row("motion_encoder.enc.fc.{i}", "motion_encoder.motion_network.{i}"),
    Row("motion_encoder.dec.direction", "motion_encoder.motion_synthesis_weight"),
)
_SKYREELS = (
    *same("fps_embedding"),
    Row("fps_projection.0", "fps_projection.net.0.proj"),
    Row("fps_projection.2", "fps_projection.net.2"),
)
_ROWS = (
    *under("blocks.{i}", "blocks.{i}", _BLOCK),
    *same("patch_embedding"),
    *under("time_embedding", "condition_embedder.time_embedder", _LINEARS),
    *under("text_embedding", "condition_embedder.text_embedder", _LINEARS),
    Row("time_projection.1", "condition_embedder.time_proj"),
    *under("img_emb", "condition_embedder.image_embedder", _IMAGE),
    Row("head.head", "proj_out"),
    Row("head.modulation", "scale_shift_table"),
    *_VACE,
    *_ANIMATE,
    *_SKYREELS,
)

WAN = Architecture(
    id="wan",
    title="Wan 2.1 / 2.2",
    components=(
        transformer(_ROWS),
        t5("text_encoder", kohya=("lora_te", "lora_te1"), original="umt5xxl"),
    ),
    signature=("blocks.{i}.self_attn.q", "head.modulation"),
    modelspec="wan2.1",
    base_versions=("wan",),
)
