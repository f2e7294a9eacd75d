"""Rows of MiniMax-H3.

Source: diffusers 0.42.1 ``single_file_utils.py``; the fused projection is [q; k; v], as in every
published single file.

Not mapped: ``adaln_t_table`` of pruned checkpoints; the authors' own shards, which interleave
query, key and value head by head under the same names (``formats.peft_dump`` puts DiffSynth's
adapters of those in order).
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Row
from loratools.keymaps.dit_tables import fused, of_width, same, transformer, under
from loratools.keymaps.text_encoders import llama_style

_BLOCK = (
    *of_width((5376,), (fused("attn.qkv_proj", "attn"),)),
    Row("attn.out_proj", "attn.to_out.0"),
    Row("attn.q_norm", "attn.norm_q"),
    Row("attn.k_norm", "attn.norm_k"),
    Row("mlp.fc1", "ff.net.0.proj", "halves_swapped"),
    Row("mlp.fc2", "ff.net.2"),
    *same("norm1", "norm2"),
)
_ROWS = (
    *under("blocks.{i}", "transformer_blocks.{i}", (*_BLOCK, *same("adaln_proj.linear"))),
    *under("token_refiner.blocks.{i}", "token_refiner.refiner_blocks.{i}", _BLOCK),
    *same("token_refiner.final_norm"),
    Row("time_embedder.proj_in", "time_embedder.linear_1"),
    Row("time_embedder.proj_out", "time_embedder.linear_2"),
    Row("video_patch_proj", "proj_in"),
    Row("audio_patch_proj", "audio_proj_in"),
    Row("condition_proj", "context_embedder"),
    Row("final_layer.norm", "norm_out.norm"),
    Row("final_layer.adaln_proj.linear", "norm_out.linear"),
    Row("final_layer.video_out", "proj_out"),
    Row("final_layer.audio_out", "audio_proj_out"),
)

MINIMAX_H3 = Architecture(
    id="minimax-h3",
    title="MiniMax-H3",
    components=(transformer(_ROWS), llama_style("text_encoder", "qwen3vl_32b")),
    signature=("token_refiner.blocks.{i}.attn.qkv_proj", "video_patch_proj"),
)
