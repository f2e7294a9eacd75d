"""Adapters extracted from diffusers' models, loaded and fused by diffusers.

The oracle is the tuned model's own weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from loratools.extract import extract_adapter

diffusers = pytest.importorskip("diffusers")

FLUX: dict[str, Any] = {
    "in_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
UNET: dict[str, Any] = {
    "block_out_channels": (32, 64),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": 24,
    "attention_head_dim": 8,
    "norm_num_groups": 8,
    "sample_size": 8,
}
MODELS = {
    "transformer": ("FluxTransformer2DModel", FLUX),
    "unet": ("UNet2DConditionModel", UNET),
}


@pytest.mark.parametrize("component", MODELS)
def test_loaded_by_the_mixin(component: str, tmp_path: Path) -> None:
    name, options = MODELS[component]
    kind = getattr(diffusers, name)
    torch.manual_seed(0)
    model = kind(**options)
    model.save_pretrained(tmp_path / "base")
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            # Norms have no words in diffusers' format.
            if "norm" not in path or "linear" in path:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "tuned")
    wanted = {n: p.detach().clone() for n, p in model.named_parameters()}
    out = tmp_path / "adapter.safetensors"
    report = extract_adapter(tmp_path / "base", tmp_path / "tuned", out, energy=1.0)
    # The U-Net's projections of queries, keys and values have no bias.
    left = {row["tensor"] for row in report.items if row["written"] == "left out"}
    changed = {row["tensor"] for row in report.items}
    biases = {name for name in changed if name.endswith(".bias")}
    assert left == (biases if component == "unet" else set())
    assert report.facts["format"] == "diffusers"
    fresh = kind.from_pretrained(tmp_path / "base")
    wanted |= {n: p.detach().clone() for n, p in fresh.named_parameters() if n in left}
    fresh.load_lora_adapter(out, prefix=component)
    fresh.fuse_lora()
    fresh.unload_lora()
    found = dict(fresh.named_parameters())
    assert found.keys() == wanted.keys()
    for path, parameter in found.items():
        assert (parameter - wanted[path]).abs().max() < 1e-4, path
