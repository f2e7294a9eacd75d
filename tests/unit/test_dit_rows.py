"""Rows of the diffusion transformers: closed, unambiguous, and as the tables of their authors say.

The tables here are the oracle where diffusers has no converter of a base: HunyuanVideo 1.5 and
HunyuanImage 2.1 (diffusers' scripts of these names), PixArt and Ideogram 4 (ComfyUI's models),
ComfyUI's own names of HunyuanVideo.
"""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas import LoRA
from loratools.keymaps.architecture import Architecture, Component, Fused, Row
from loratools.keymaps.registry import ARCHITECTURES
from loratools.keymaps.target import Naming
from loratools.keymaps.translate import translate

DITS = [a for a in ARCHITECTURES if a.components[0].name == "transformer"]
BY_ID = {architecture.id: architecture for architecture in ARCHITECTURES}
NETWORKS = [
    pytest.param(component, id=f"{architecture.id}-{number}")
    for architecture in DITS
    for number, component in enumerate(architecture.components)
]
BLOCKS = (0, 1, 10, 11, 47)
"""Block numbers whose digits could run together with their neighbours'."""

SWAPPED = {
    "flux1": {"final_layer.adaLN_modulation.1"},
    "flux2": {"final_layer.adaLN_modulation.1"},
    "flux3": {"final_layer.image.adaLN_modulation.1"},
    "sd3": {"final_layer.adaLN_modulation.1"},
    "auraflow": {"modF.1"},
    "hunyuan-video": {"final_layer.adaLN_modulation.1"},
    "hunyuan-video-1.5": {"final_layer.adaLN_modulation.1"},
    "hunyuan-image-2.1": {"final_layer.adaLN_modulation.1"},
    "framepack": {"final_layer.adaLN_modulation.1"},
    "mochi": {"final_layer.mod", "blocks.{i}.mlp_x.w1", "blocks.{i}.mlp_y.w1"},
    "minimax-h3": {"blocks.{i}.mlp.fc1", "token_refiner.blocks.{i}.mlp.fc1"},
}
"""The channel swaps there are: everything else keeps its order."""


def dialects(component: Component) -> dict[str, tuple[Row | Fused, ...]]:
    return {
        "original": component.rows,
        "comfyui": component.comfyui,
        "checkpoint": component.checkpoint_rows,
    }


def placeholders(template: str) -> set[str]:
    return set(re.findall(r"\{(\w)\}", template))


def numbered(template: str) -> list[str]:
    names = [template.replace("{i}", str(i)) for i in (BLOCKS if "{i}" in template else (0,))]
    return [
        name.replace("{j}", str(j)) for name in names for j in ((0, 1) if "{j}" in name else (0,))
    ]


@pytest.mark.parametrize("component", NETWORKS)
def test_both_names_of_a_row_have_the_same_numbers(component: Component) -> None:
    for rows in dialects(component).values():
        for row in rows:
            for part in row.parts:
                assert placeholders(part) == placeholders(row.original), row


@pytest.mark.parametrize("component", NETWORKS)
def test_dialects_say_nothing_of_modules_that_are_not_there(component: Component) -> None:
    known = {part for row in component.rows for part in row.parts}
    for rows in (component.comfyui, component.checkpoint_rows):
        assert {part for row in rows for part in row.parts} <= known


@pytest.mark.parametrize("component", NETWORKS)
def test_each_name_stands_once(component: Component) -> None:
    for rows in dialects(component).values():
        originals = [row.original for row in rows]
        parts = [part for row in rows for part in row.parts]
        assert sorted(originals) == sorted(set(originals))
        assert sorted(parts) == sorted(set(parts))


@pytest.mark.parametrize("architecture", DITS, ids=lambda a: a.id)
def test_flattened_names_are_injective(architecture: Architecture) -> None:
    """No two modules of a pipeline have one flattened name, in any dialect that flattens."""
    meanings: dict[tuple[str, str], set[str]] = defaultdict(set)
    for component in architecture.components:
        for dialect, rows in dialects(component).items():
            for row in rows:
                for name in numbered(row.original):
                    flat = name.replace(".", "_")
                    meanings[dialect, f"{component.kohya[0]}_{flat}"].add(name)
        for row in component.rows:
            for name in (name for part in row.parts for name in numbered(part)):
                flat = name.replace(".", "_")
                meanings["diffusers", f"{component.kohya[0]}_{flat}"].add(name)
    assert {key: names for key, names in meanings.items() if len(names) > 1} == {}


@pytest.mark.parametrize("architecture", DITS, ids=lambda a: a.id)
def test_halves_are_swapped_where_the_models_differ(architecture: Architecture) -> None:
    rows = architecture.components[0].rows
    found = {r.original for r in rows if isinstance(r, Row) and r.order == "halves_swapped"}
    assert found == SWAPPED.get(architecture.id, set())
    partly = {r.original for r in rows if isinstance(r, Row) and r.order.endswith("_if_two")}
    expected = {"joint_blocks.{i}.context_block.adaLN_modulation.1"}
    assert partly == (expected if architecture.id == "sd3" else set())


@pytest.mark.parametrize("architecture", DITS, ids=lambda a: a.id)
def test_signatures_are_rows_and_tell_relatives_apart(architecture: Architecture) -> None:
    """Only supersets of a model have its signature too."""
    supersets = {"ltx": {"ltx2"}, "hunyuan-video": {"framepack"}, "sana": {"sana-sprint"}}
    signature = set(architecture.signature)
    assert signature <= {row.original for row in architecture.components[0].rows}
    others = {
        other.id
        for other in DITS
        if signature <= {row.original for row in other.components[0].rows}
    }
    assert others - {architecture.id} == supersets.get(architecture.id, set())


def test_ids_and_versions_belong_to_one_architecture() -> None:
    ids = [architecture.id for architecture in ARCHITECTURES]
    versions = [version for a in ARCHITECTURES for version in a.base_versions]
    assert sorted(ids) == sorted(set(ids))
    assert sorted(versions) == sorted(set(versions))


# ── the authors' tables ──────────────────────────────────────────────────────────────────────

_SPRINT = {
    "t_embedder.mlp.0": "time_embed.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "time_embed.timestep_embedder.linear_2",
    "cfg_embedder.mlp.0": "time_embed.guidance_embedder.linear_1",
    "cfg_embedder.mlp.2": "time_embed.guidance_embedder.linear_2",
    "t_block.1": "time_embed.linear",
    "blocks.3.attn.q_norm": "transformer_blocks.3.attn1.norm_q",
    "blocks.3.cross_attn.k_norm": "transformer_blocks.3.attn2.norm_k",
}

TABLES: dict[tuple[str, Naming], dict[str, str]] = {
    # its name: diffusers' modules (``=``: with their component)
    ("hunyuan-video-1.5", "original"): {
        "double_blocks.9.img_attn_q": "transformer_blocks.9.attn.to_q",
        "double_blocks.9.img_attn_k": "transformer_blocks.9.attn.to_k",
        "double_blocks.9.txt_attn_v": "transformer_blocks.9.attn.add_v_proj",
        "double_blocks.9.img_mlp.fc1": "transformer_blocks.9.ff.net.0.proj",
        "double_blocks.9.txt_mod.linear": "transformer_blocks.9.norm1_context.linear",
        "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
        "byt5_in.fc3": "context_embedder_2.linear_3",
        "vision_in.proj.3": "image_embedder.linear_2",
    },
    ("hunyuan-image-2.1", "original"): {
        "double_blocks.9.img_attn_qkv": "transformer_blocks.9.attn.{to_q,to_k,to_v}",
        "single_blocks.9.linear1": (
            "single_transformer_blocks.9.{attn.to_q,attn.to_k,attn.to_v,proj_mlp}"
        ),
        "single_blocks.9.linear2": "single_transformer_blocks.9.proj_out",
        "single_blocks.9.modulation.linear": "single_transformer_blocks.9.norm.linear",
        "time_r_in.mlp.0": "time_guidance_embed.timestep_embedder_r.linear_1",
        "guidance_in.mlp.2": "time_guidance_embed.guidance_embedder.linear_2",
        "byt5_in.fc1": "context_embedder_2.linear_1",
        "txt_in.c_embedder.linear_2": ("context_embedder.time_text_embed.text_embedder.linear_2"),
    },
    ("hunyuan-video", "comfyui"): {
        "double_blocks.9.img_attn.qkv": "transformer_blocks.9.attn.{to_q,to_k,to_v}",
        "double_blocks.9.txt_attn.proj": "transformer_blocks.9.attn.to_add_out",
        "double_blocks.9.img_mlp.2": "transformer_blocks.9.ff.net.2",
        "double_blocks.9.txt_mod.lin": "transformer_blocks.9.norm1_context.linear",
        "single_blocks.9.modulation.lin": "single_transformer_blocks.9.norm.linear",
        "txt_in.individual_token_refiner.blocks.1.self_attn.proj": (
            "context_embedder.token_refiner.refiner_blocks.1.attn.to_out.0"
        ),
        "txt_in.t_embedder.in_layer": (
            "context_embedder.time_text_embed.timestep_embedder.linear_1"
        ),
        "time_in.out_layer": "time_text_embed.timestep_embedder.linear_2",
    },
    ("ideogram4", "original"): {
        "layers.9.attention.qkv": "layers.9.attention.{to_q,to_k,to_v}",
        "layers.9.attention.o": "layers.9.attention.to_out.0",
    },
    ("pixart", "original"): {
        "blocks.9.attn.qkv": "transformer_blocks.9.attn1.{to_q,to_k,to_v}",
        "blocks.9.cross_attn.kv_linear": "transformer_blocks.9.attn2.{to_k,to_v}",
        "csize_embedder.mlp.2": "adaln_single.emb.resolution_embedder.linear_2",
        "ar_embedder.mlp.0": "adaln_single.emb.aspect_ratio_embedder.linear_1",
        "t_block.1": "adaln_single.linear",
        "y_embedder.y_proj.fc2": "caption_projection.linear_2",
    },
    ("sana-sprint", "original"): _SPRINT,
    ("wan", "original"): {
        "img_emb.emb_pos": "condition_embedder.image_embedder.pos_embed",
        "fps_projection.0": "fps_projection.net.0.proj",
    },
    ("ltx2", "original"): {
        "video_embeddings_connector.transformer_1d_blocks.1.attn1.to_k": (
            "=connectors.video_connector.transformer_blocks.1.attn1.to_k"
        ),
        "=text_embedding_projection.aggregate_embed": "=connectors.text_proj_in",
        "=text_embedding_projection.audio_aggregate_embed": "=connectors.audio_text_proj_in",
    },
}


def expanded(modules: str) -> list[str]:
    """Return the names that ``a.{b,c}`` stands for."""
    start, _, rest = modules.partition("{")
    return [start + end for end in rest.rstrip("}").split(",")] if rest else [modules]


def path(name: str, prefix: str) -> str:
    """Return the full path of a table's name; ``=`` marks one that is full."""
    return name[1:] if name.startswith("=") else f"{prefix}.{name}"


@pytest.mark.parametrize(
    ("arch", "naming", "name", "modules"),
    [(*key, *pair) for key, table in TABLES.items() for pair in table.items()],
)
def test_names_are_those_of_the_tables(arch: str, naming: Naming, name: str, modules: str) -> None:
    parts = expanded(modules)
    width, heights = 6, (6, 6, 6, 24) if len(parts) == 4 else (6,) * len(parts)
    delta = LoRA(torch.rand(2, width), torch.rand(sum(heights), 2), alpha=2.0)
    source = Adapter({path(name, "diffusion_model"): delta}, naming=naming)
    there = translate(source, BY_ID[arch], "diffusers")
    assert set(there.layers) == {path(part, "transformer") for part in parts}
    found = [there.layers[path(part, "transformer")] for part in parts]
    changes = [part.materialize() for part in found if isinstance(part, LoRA)]
    assert torch.allclose(torch.cat(changes), delta.materialize())
    back = translate(there, BY_ID[arch], naming)
    assert set(back.layers) == set(source.layers)


def test_official_split_names_of_hunyuan_image_are_known() -> None:
    """Tencent's file holds what sd-scripts' one has fused."""
    delta = LoRA(torch.rand(2, 4), torch.rand(4, 2), alpha=2.0)
    names = (
        "double_blocks.0.img_attn_q",
        "single_blocks.0.linear1_mlp",
        "single_blocks.0.linear2.fc",
    )
    source = Adapter({f"diffusion_model.{n}": delta for n in names}, naming="original")
    found = translate(source, BY_ID["hunyuan-image-2.1"], "diffusers").layers
    assert set(found) == {
        "transformer.transformer_blocks.0.attn.to_q",
        "transformer.single_transformer_blocks.0.proj_mlp",
        "transformer.single_transformer_blocks.0.proj_out",
    }


def test_kohya_names_of_framepack_are_made_of_diffusers_names() -> None:
    delta = LoRA(torch.rand(2, 4), torch.rand(4, 2), alpha=2.0)
    name = "transformer.single_transformer_blocks.3.proj_mlp"
    source = Adapter({name: delta}, naming="diffusers")
    found = translate(source, BY_ID["framepack"], "kohya").layers
    assert set(found) == {"lora_unet_single_transformer_blocks_3_proj_mlp"}


def test_anima_adapter_is_a_component_of_its_own() -> None:
    delta = LoRA(torch.rand(2, 4), torch.rand(4, 2), alpha=2.0)
    name = "lora_unet_llm_adapter_blocks_2_cross_attn_o_proj"
    there = translate(Adapter({name: delta}, naming="kohya"), BY_ID["anima"], "diffusers")
    assert set(there.layers) == {"text_conditioner.blocks.2.cross_attn.o_proj"}
    assert set(translate(there, BY_ID["anima"], "kohya").layers) == {name}
