"""Rows of Qwen-Image (Edit, Layered) and Qwen-Image 2.1.

Source: diffusers 0.42.1 (``transformer_qwenimage.py``, ``transformer_qwenimage21.py`` and
``single_file_utils.py``). The names are the same in every ecosystem, but ComfyUI's base of 2.1
holds gate and projection of the feed-forward in one tensor. No halves are swapped.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Fused
from loratools.keymaps.dit_tables import of_width, same, transformer, under
from loratools.keymaps.text_encoders import llama_style

_STREAMS = same(
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
    "img_mod.1",
    "txt_mod.1",
    "img_mlp.net.0.proj",
    "txt_mlp.net.0.proj",
)
_BLOCK = (
    *of_width((3072,), _STREAMS),
    *of_width((12288,), same("img_mlp.net.2", "txt_mlp.net.2")),
    *same("attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k"),
)
_ROWS = (
    *under("transformer_blocks.{i}", "transformer_blocks.{i}", _BLOCK),
    *same("img_in", "txt_in", "txt_norm", "norm_out.linear", "proj_out"),
    *same(
        "time_text_embed.timestep_embedder.linear_1",
        "time_text_embed.timestep_embedder.linear_2",
        "time_text_embed.addition_t_embedding",
    ),
)

QWEN_IMAGE = Architecture(
    id="qwen-image",
    title="Qwen-Image",
    components=(transformer(_ROWS), llama_style("text_encoder", "qwen25_7b")),
    signature=("transformer_blocks.{i}.img_mod.1", "txt_norm"),
    modelspec="Qwen-Image",
    base_versions=("qwen_image", "qwen_image_edit", "qwen_image_layered"),
)

_BLOCK21 = (
    *of_width((4096,), same("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")),
    *of_width((4096,), same("img_mlp.proj", "img_mlp.gate_layer")),
    *of_width((12288,), same("img_mlp.out")),
    *same("attn.norm_q", "attn.norm_k"),
)
_ROWS21 = (
    *under("transformer_blocks.{i}", "transformer_blocks.{i}", _BLOCK21),
    *same("img_in", "txt_in.text_norm", "txt_in.in_layer", "txt_in.out_layer", "modulation.1"),
    *same("time_text_embed.timestep_embedder.linear_1"),
    *same("time_text_embed.timestep_embedder.linear_2", "norm_out.linear", "proj_out"),
)
_GATE_UP = Fused("img_mlp.gate_up", ("img_mlp.gate_layer", "img_mlp.proj"), inputs=(4096,))

QWEN_IMAGE_21 = Architecture(
    id="qwen-image-2.1",
    title="Qwen-Image 2.1",
    components=(
        transformer(
            _ROWS21, comfyui=under("transformer_blocks.{i}", "transformer_blocks.{i}", (_GATE_UP,))
        ),
        llama_style("text_encoder", "qwen3vl_8b"),
    ),
    signature=("txt_in.text_norm", "modulation.1"),
)
