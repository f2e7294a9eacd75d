"""Extraction from diffusion models: single files, component folders, pipelines; every format.

Everything moves. Merged into the base, an adapter of full rank gives the tuned model, but for the
tensors that the report says were left out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.adapter_io import load_adapter
from loratools.errors import UnknownArchitectureError, UnsupportedError
from loratools.extract import extract_adapter
from loratools.merge import merge_into_base

Shapes = Mapping[str, tuple[int, ...]]
UNET = "model.diffusion_model."
BIG_G = "conditioner.embedders.1.model."
CLIP_L = "conditioner.embedders.0.transformer.text_model."
ATTENTION = f"{UNET}middle_block.1.transformer_blocks"

SDXL: Shapes = {
    f"{UNET}input_blocks.0.0.weight": (32, 4, 3, 3),
    f"{UNET}input_blocks.0.0.bias": (32,),
    f"{UNET}label_emb.0.0.weight": (24, 2816),
    f"{UNET}out.0.weight": (32,),
    f"{UNET}out.0.bias": (32,),
    f"{UNET}out.2.weight": (4, 32, 3, 3),
    f"{ATTENTION}.0.attn2.to_k.weight": (40, 2048),
    f"{ATTENTION}.9.attn2.to_k.weight": (40, 2048),
    f"{ATTENTION}.9.attn2.to_out.0.weight": (40, 1280),
    f"{ATTENTION}.9.attn2.to_out.0.bias": (40,),
    f"{ATTENTION}.9.norm1.weight": (40,),
    f"{ATTENTION}.9.norm1.bias": (40,),
    f"{BIG_G}transformer.resblocks.0.attn.in_proj_weight": (96, 1280),
    f"{BIG_G}transformer.resblocks.0.attn.in_proj_bias": (96,),
    f"{BIG_G}transformer.resblocks.0.ln_1.weight": (1280,),
    f"{BIG_G}positional_embedding": (7, 32),
    f"{BIG_G}text_projection": (32, 48),
    f"{BIG_G}token_embedding.weight": (50, 32),
    f"{CLIP_L}encoder.layers.0.self_attn.q_proj.weight": (33, 768),
    f"{CLIP_L}encoder.layers.0.self_attn.q_proj.bias": (33,),
    "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
}
SD1: Shapes = {
    f"{UNET}input_blocks.0.0.weight": (32, 4, 3, 3),
    f"{UNET}out.2.weight": (4, 32, 3, 3),
    f"{ATTENTION}.0.attn2.to_k.weight": (40, 768),
    f"{ATTENTION}.0.norm1.weight": (40,),
    f"{UNET}middle_block.1.proj_in.weight": (32, 1280, 1, 1),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (30, 768),
}
FLUX: Shapes = {
    "double_blocks.0.img_attn.qkv.weight": (96, 32),
    "double_blocks.0.img_attn.qkv.bias": (96,),
    "double_blocks.0.img_attn.norm.key_norm.scale": (16,),
    "double_blocks.0.img_mod.lin.weight": (192, 32),
    "single_blocks.0.linear1.weight": (224, 32),
    "vector_in.in_layer.weight": (32, 20),
    "vector_in.in_layer.bias": (32,),
    "guidance_in.in_layer.weight": (32, 20),
    "final_layer.adaLN_modulation.1.weight": (64, 32),
    "final_layer.adaLN_modulation.1.bias": (64,),
    "final_layer.linear.weight": (16, 32),
}
FILES = {"sdxl": SDXL, "sd1": SD1, "flux1": FLUX}
"""Widths that tell the architectures apart are the released models'; others are small."""

VAE = {"first_stage_model.decoder.conv_in.weight"}
DIFFUSERS_LACKS = {
    *VAE,
    f"{UNET}out.0.weight",
    f"{UNET}out.0.bias",
    f"{ATTENTION}.0.norm1.weight",
    f"{ATTENTION}.9.norm1.weight",
    f"{ATTENTION}.9.norm1.bias",
    f"{BIG_G}transformer.resblocks.0.ln_1.weight",
    f"{BIG_G}positional_embedding",
    f"{BIG_G}token_embedding.weight",
    # The networks have layers without a bias.
    f"{UNET}input_blocks.0.0.bias",
    f"{ATTENTION}.9.attn2.to_out.0.bias",
    f"{BIG_G}transformer.resblocks.0.attn.in_proj_bias",
    "double_blocks.0.img_attn.qkv.bias",
    "vector_in.in_layer.bias",
    "final_layer.adaLN_modulation.1.bias",
    "double_blocks.0.img_attn.norm.key_norm.scale",
}


def write_pair(folder: Path, shapes: Shapes) -> tuple[Path, Path]:
    """Write ``base`` and ``tuned``; every tensor differs."""
    generator = torch.Generator().manual_seed(0)
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    noise = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    paths = folder / "base.safetensors", folder / "tuned.safetensors"
    folder.mkdir(parents=True, exist_ok=True)
    save_file(base, paths[0])
    save_file({name: tensor + 0.1 * noise[name] for name, tensor in base.items()}, paths[1])
    return paths


def assert_merged(merged: Path, tuned: Path, base: Path, left: set[str]) -> None:
    """Assert that the merged tensors are the tuned ones, and those left out the base's."""
    found, wanted, before = (load_file(path) for path in (merged, tuned, base))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        expected = before[name] if name in left else wanted[name]
        assert (tensor - expected).abs().max() < 1e-5, name


@pytest.mark.parametrize("to", ["kohya", "comfyui", "diffusers"])
@pytest.mark.parametrize("arch", FILES)
def test_single_files(arch: str, to: str, tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, FILES[arch])
    # FLUX at this width is not told from its relatives when the adapter is read.
    out = tmp_path / "out.safetensors"
    report = extract_adapter(base, tuned, out, energy=1.0, to=to)
    left = {row["tensor"] for row in report.items if row["written"] == "left out"}
    lacks = DIFFUSERS_LACKS if to == "diffusers" else VAE
    assert left == lacks & FILES[arch].keys()
    assert report.facts["architecture"] == arch
    merge_into_base(base, out, tmp_path / "merged.safetensors", arch=arch)
    assert_merged(tmp_path / "merged.safetensors", tuned, base, left)


def test_how_kohya_calls_them(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, SDXL)
    extract_adapter(base, tuned, tmp_path / "out.safetensors", rank=4)
    tensors = load_file(tmp_path / "out.safetensors")
    norm = "lora_te2_text_model_encoder_layers_0_layer_norm1"
    change = load_file(tuned)[f"{BIG_G}transformer.resblocks.0.ln_1.weight"].sub(
        load_file(base)[f"{BIG_G}transformer.resblocks.0.ln_1.weight"]
    )
    assert torch.equal(tensors[f"{norm}.w_norm"], change)
    assert tensors["lora_unet_out_0.b_norm"].shape == (32,)
    assert tensors["lora_unet_input_blocks_0_0.diff_b"].shape == (32,)
    # OpenCLIP stores its projection as (in, out).
    assert tensors["lora_te2_text_projection.lora_down.weight"].shape == (4, 32)
    assert tensors["lora_te2_text_projection.lora_up.weight"].shape == (48, 4)


def test_the_format_of_single_files_is_kohya(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, SD1)
    report = extract_adapter(base, tuned, tmp_path / "out.safetensors", rank=4, conv_rank=2)
    assert report.facts["format"] == "kohya"
    tensors = load_file(tmp_path / "out.safetensors")
    te = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert tensors[f"{te}.lora_down.weight"].shape == (4, 768)
    assert tensors["lora_unet_conv_in.lora_down.weight"].shape == (2, 4, 3, 3)
    assert float(tensors[f"{te}.alpha"]) == 4


def test_names_that_nobody_knows(tmp_path: Path) -> None:
    base, tuned = write_pair(tmp_path, {"backbone.fc.weight": (8, 8)})
    report = extract_adapter(base, tuned, tmp_path / "out", rank=8)
    assert report.facts["format"] == "peft"
    with pytest.raises(UnsupportedError, match="no names in kohya"):
        extract_adapter(base, tuned, tmp_path / "other", rank=8, to="kohya")


# ── diffusers' folders ───────────────────────────────────────────────────────────────────────

NETWORKS: Mapping[str, tuple[str, Shapes]] = {
    "unet": (
        "UNet2DConditionModel",
        {
            "conv_in.weight": (16, 4, 3, 3),
            "conv_out.weight": (4, 16, 3, 3),
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight": (24, 768),
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.weight": (24, 24),
            "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0.bias": (24,),
        },
    ),
    "text_encoder": (
        "",
        {
            "text_model.encoder.layers.0.self_attn.q_proj.weight": (20, 768),
            "text_model.encoder.layers.0.layer_norm1.weight": (768,),
        },
    ),
}


def write_pipelines(folder: Path) -> tuple[Path, Path]:
    """Write two pipelines, each network in a folder of its own."""
    for number, (name, (kind, shapes)) in enumerate(NETWORKS.items()):
        files = write_pair(folder / str(number), shapes)
        config: dict[str, Any] = {"_class_name": kind} if kind else {"model_type": "clip"}
        for side, file in zip(("base", "tuned"), files, strict=True):
            target = folder / side / name
            target.mkdir(parents=True)
            weights = "diffusion_pytorch_model" if kind else "model"
            file.rename(target / f"{weights}.safetensors")
            (target / "config.json").write_text(json.dumps(config))
            (folder / side / "model_index.json").write_text('{"_class_name": "X"}')
    return folder / "base", folder / "tuned"


def change_of(base: Path, tuned: Path, network: str, tensor: str) -> Tensor:
    before, after = (
        load_file(next((side / network).glob("*.safetensors")))[tensor] for side in (base, tuned)
    )
    return after.double() - before.double()


def test_pipelines(tmp_path: Path) -> None:
    base, tuned = write_pipelines(tmp_path)
    report = extract_adapter(base, tuned, tmp_path / "out.safetensors", energy=1.0)
    assert report.facts["format"] == "diffusers"
    layers = load_adapter(tmp_path / "out.safetensors").layers
    for network, (_, shapes) in NETWORKS.items():
        for tensor in shapes:
            module = f"{network}.{tensor.removesuffix('.weight')}"
            if tensor.endswith(".weight") and len(shapes[tensor]) > 1:
                found = layers[module].materialize()  # type: ignore[attr-defined]
                assert (found - change_of(base, tuned, network, tensor)).abs().max() < 1e-5
    # As a kohya file it goes back into the pipeline, norm included.
    extract_adapter(base, tuned, tmp_path / "k.safetensors", energy=1.0, to="kohya", arch="sd1")
    merge_into_base(base, tmp_path / "k.safetensors", tmp_path / "merged", arch="sd1")
    for network in NETWORKS:
        merged, wanted, before = (
            next((side / network).glob("*.safetensors"))
            for side in (tmp_path / "merged", tuned, base)
        )
        assert_merged(merged, wanted, before, set())


def test_component_folders(tmp_path: Path) -> None:
    base, tuned = (side / "unet" for side in write_pipelines(tmp_path))
    report = extract_adapter(base, tuned, tmp_path / "out.safetensors", rank=3)
    assert report.facts["format"] == "diffusers"
    layers = load_adapter(tmp_path / "out.safetensors").layers
    assert all(path.startswith("unet.") for path in layers)
    extract_adapter(base, tuned, tmp_path / "peft", rank=3, to="peft")
    plain = load_adapter(tmp_path / "peft").layers
    assert {f"unet.{path}" for path in plain} == set(layers)


def test_several_networks_do_not_fit_peft(tmp_path: Path) -> None:
    base, tuned = write_pipelines(tmp_path)
    with pytest.raises(UnsupportedError, match="one network"):
        extract_adapter(base, tuned, tmp_path / "out", rank=3, to="peft")
    extract_adapter(base, tuned, tmp_path / "out", rank=3, to="peft", include=["^unet"])


def test_an_unknown_architecture_keeps_its_names(tmp_path: Path) -> None:
    for side in ("base", "tuned"):
        (tmp_path / side).mkdir()
    files = write_pair(tmp_path, {"layers.0.proj.weight": (8, 8)})
    for file, side in zip(files, ("base", "tuned"), strict=True):
        file.rename(tmp_path / side / "diffusion_pytorch_model.safetensors")
        config = {"_class_name": "NovelTransformer2DModel"}
        (tmp_path / side / "config.json").write_text(json.dumps(config))
    pair = tmp_path / "base", tmp_path / "tuned"
    extract_adapter(*pair, tmp_path / "out.safetensors", rank=8)
    assert list(load_adapter(tmp_path / "out.safetensors").layers) == ["transformer.layers.0.proj"]
    with pytest.raises(UnknownArchitectureError, match="kohya names are unknown"):
        extract_adapter(*pair, tmp_path / "k.safetensors", rank=8, to="kohya")
