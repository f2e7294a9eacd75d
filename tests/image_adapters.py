"""A small kohya file for Stable Diffusion XL: real module names and widths, few modules, rank 1."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

MODULES = {
    # module: (out, in); the second cross-attention's inputs tell SDXL from its relatives
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_v": (640, 640),
    "lora_unet_middle_block_1_transformer_blocks_9_attn2_to_k": (1280, 2048),
    "lora_te1_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
}
METADATA = {
    "ss_output_name": "ink",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_network_module": "networks.lora",
}


def write_kohya_sdxl(path: Path, seed: int = 5) -> None:
    """Write half-precision factors of rank 1 with alpha 0.5."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module, (rows, columns) in MODULES.items():
        up = torch.randn(rows, 1, generator=generator) / 8
        down = torch.randn(1, columns, generator=generator) / columns**0.5
        tensors[f"{module}.lora_up.weight"] = up.half()
        tensors[f"{module}.lora_down.weight"] = down.half()
        tensors[f"{module}.alpha"] = torch.tensor(0.5).half()
    save_file(tensors, path, METADATA)
