"""What weights files are called, in folders here and in repositories on the Hub."""

from __future__ import annotations

import re

ADAPTER_WEIGHTS = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
    "adapters.safetensors",
)
"""What an adapter folder's weights are called, PEFT's names, diffusers' and mlx-lm's; the first
that exists is read, as PEFT does."""

ADAPTER_CONFIG = "adapter_config.json"

MODEL_WEIGHTS = (
    "model.safetensors",
    "diffusion_pytorch_model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)
"""What a model folder's weights are called; the first that exists, or whose index does, is read."""

INDEX_SUFFIX = ".index.json"
TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
WEIGHT_SUFFIXES = (*TORCH_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")

LEFT_FOLDERS = re.compile(r"\.git|\.cache|__pycache__|checkpoint-\d+")
"""Folders beside a model that are no part of it."""

PIPELINE_INDEX = "model_index.json"
MODEL_MARKS = ("config.json", PIPELINE_INDEX)
"""Files that make a folder a model's or a pipeline's."""

PIPELINE_NETWORKS = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)
"""Folders of a diffusers pipeline whose models adapters change."""


def index_wins(single: str, *, whole: bool) -> bool:
    """Return whether an index is read rather than the file it splits, if that is there (``whole``).

    transformers reads the whole file where both are present, diffusers the index.
    """
    return not whole or single.startswith("diffusion")
