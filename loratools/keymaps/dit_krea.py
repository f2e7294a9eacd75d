"""Rows of Krea 2.

Source: diffusers 0.42.1 ``single_file_utils.py``. A block's modulation is six vectors end to end,
which diffusers holds as a (6, D) table.
"""

from __future__ import annotations

from loratools.keymaps.architecture import Architecture, Row
from loratools.keymaps.dit_tables import of_width, scales, transformer, under
from loratools.keymaps.text_encoders import llama_style

_LINEARS = (
    Row("attn.wq", "attn.to_q"),
    Row("attn.wk", "attn.to_k"),
    Row("attn.wv", "attn.to_v"),
    Row("attn.wo", "attn.to_out.0"),
    Row("attn.gate", "attn.to_gate"),
    Row("mlp.gate", "ff.gate"),
    Row("mlp.up", "ff.up"),
)
_DOWN = (Row("mlp.down", "ff.down"),)
_BLOCK_NORMS = (
    Row("attn.qknorm.qnorm", "attn.norm_q"),
    Row("attn.qknorm.knorm", "attn.norm_k"),
    Row("prenorm", "norm1"),
    Row("postnorm", "norm2"),
)
_PLACES = (
    ("blocks.{i}", "transformer_blocks.{i}", 6144),
    ("txtfusion.layerwise_blocks.{i}", "text_fusion.layerwise_blocks.{i}", 2560),
    ("txtfusion.refiner_blocks.{i}", "text_fusion.refiner_blocks.{i}", 2560),
)
_NORMS = (
    *(row for original, ours, _ in _PLACES for row in under(original, ours, _BLOCK_NORMS)),
    Row("txtmlp.0", "txt_in.norm"),
    Row("last.norm", "final_layer.norm"),
)
_ROWS = (
    *(
        row
        for original, ours, width in _PLACES
        for row in under(original, ours, (*of_width((width,), _LINEARS), *_DOWN))
    ),
    *_NORMS,
    Row("blocks.{i}.mod.lin", "transformer_blocks.{i}.scale_shift_table", vectors=6),
    Row("txtfusion.projector", "text_fusion.projector"),
    Row("first", "img_in"),
    Row("tmlp.0", "time_embed.linear_1"),
    Row("tmlp.2", "time_embed.linear_2"),
    Row("tproj.1", "time_mod_proj"),
    Row("txtmlp.1", "txt_in.linear_1"),
    Row("txtmlp.3", "txt_in.linear_2"),
    Row("last.linear", "final_layer.linear"),
    Row("last.modulation.lin", "final_layer.scale_shift_table"),
)

KREA2 = Architecture(
    id="krea2",
    title="Krea 2",
    components=(
        transformer(_ROWS, checkpoint_rows=scales(_NORMS)),
        llama_style("text_encoder", "qwen3vl_4b"),
    ),
    signature=("txtfusion.projector",),
    modelspec="Krea-2",
    base_versions=("krea2",),
)
