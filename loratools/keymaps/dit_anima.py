"""Rows of Anima: the transformer of Cosmos-Predict2 and an adapter of the text encoder's output.

Source: diffusers 0.42.1 ``single_file_utils.py`` (Cosmos 2.0) and ``condition_embedder_anima.py``.
The adapter stands inside the transformer's file and is a component of its own in diffusers.
"""

from __future__ import annotations

from dataclasses import replace

from loratools.keymaps.architecture import Architecture, Component, Row
from loratools.keymaps.dit_tables import of_width, same, transformer, under
from loratools.keymaps.text_encoders import llama_style

_WIDTH = (2048,)
_OUTER = (
    Row("q_proj", "to_q", inputs=_WIDTH),
    Row("output_proj", "to_out.0", inputs=_WIDTH),
    Row("q_norm", "norm_q"),
    Row("k_norm", "norm_k"),
)
_KEY_VALUE = (Row("k_proj", "to_k"), Row("v_proj", "to_v"))
_BLOCK = (
    *under("self_attn", "attn1", (*_OUTER, *of_width(_WIDTH, _KEY_VALUE))),
    *under("cross_attn", "attn2", (*_OUTER, *of_width((1024,), _KEY_VALUE))),
    Row("mlp.layer1", "ff.net.0.proj", inputs=_WIDTH),
    Row("mlp.layer2", "ff.net.2"),
    *under("adaln_modulation_self_attn", "norm1", (Row("1", "linear_1"), Row("2", "linear_2"))),
    *under("adaln_modulation_cross_attn", "norm2", (Row("1", "linear_1"), Row("2", "linear_2"))),
    *under("adaln_modulation_mlp", "norm3", (Row("1", "linear_1"), Row("2", "linear_2"))),
)
_ROWS = (
    *under("blocks.{i}", "transformer_blocks.{i}", _BLOCK),
    Row("x_embedder.proj.1", "patch_embed.proj"),
    *under("t_embedder.1", "time_embed.t_embedder", same("linear_1", "linear_2")),
    Row("t_embedding_norm", "time_embed.norm"),
    Row("final_layer.adaln_modulation.1", "norm_out.linear_1"),
    Row("final_layer.adaln_modulation.2", "norm_out.linear_2"),
    Row("final_layer.linear", "proj_out"),
)
_PROJECTIONS = same("q_proj", "k_proj", "v_proj", "o_proj")
_ADAPTER_ATTENTION = (*of_width((1024,), _PROJECTIONS), *same("q_norm", "k_norm"))
_ADAPTER_ROWS = (
    *under("blocks.{i}.self_attn", "blocks.{i}.self_attn", _ADAPTER_ATTENTION),
    *under("blocks.{i}.cross_attn", "blocks.{i}.cross_attn", _ADAPTER_ATTENTION),
    *under(
        "blocks.{i}",
        "blocks.{i}",
        same("mlp.0", "mlp.2", "norm_self_attn", "norm_cross_attn", "norm_mlp"),
    ),
    *same("embed", "out_proj", "norm"),
)
_CHECKPOINT = ("model.diffusion_model.", "diffusion_model.", "net.", "")

ANIMA = Architecture(
    id="anima",
    title="Anima",
    components=(
        replace(transformer(_ROWS), checkpoint=_CHECKPOINT),
        Component(
            name="text_conditioner",
            original="diffusion_model.llm_adapter",
            checkpoint=tuple(f"{prefix}llm_adapter." for prefix in _CHECKPOINT),
            kohya=("lora_unet_llm_adapter",),
            rows=_ADAPTER_ROWS,
        ),
        llama_style("text_encoder", "qwen3_06b"),
    ),
    signature=("blocks.{i}.self_attn.q_proj", "blocks.{i}.adaln_modulation_self_attn.1"),
    modelspec="anima-preview",
    base_versions=("anima",),
)
