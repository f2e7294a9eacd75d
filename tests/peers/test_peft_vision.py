"""Vision-language models, whose modules have other names in memory than on disk: cases 27, 28."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from . import builders, oracles
from .builders import HIDDEN, Base
from .conftest import Merge

TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
SIGHT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 2 * HIDDEN,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}


def llava(folder: Path) -> Base:
    """Build a Llava: a CLIP tower, a projector and a Llama."""
    import transformers

    torch.manual_seed(2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**SIGHT),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=63,
    )
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    return Base(folder, builders.auto_class("LlavaForConditionalGeneration"))


def qwen2_vl(folder: Path) -> Base:
    """Build a Qwen2-VL."""
    import transformers

    torch.manual_seed(2)
    sight = {"depth": 1, "embed_dim": HIDDEN, "hidden_size": HIDDEN, "num_heads": 4}
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    config = transformers.Qwen2VLConfig(
        vision_config=sight, text_config={**TEXT, "rope_parameters": rope}
    )
    transformers.Qwen2VLForConditionalGeneration(config).save_pretrained(folder)
    return Base(folder, builders.auto_class("Qwen2VLForConditionalGeneration"))


MODELS: dict[str, tuple[Callable[[Path], Base], str]] = {
    # what names the language model's layers had before transformers 4.52
    "llava": (llava, "language_model.model."),
    "qwen2_vl": (qwen2_vl, "model."),
}


@pytest.mark.parametrize("spelling", ["new", "old"])
@pytest.mark.parametrize("name", MODELS)
def test_both_spellings(name: str, spelling: str, tmp_path: Path, merge: Merge) -> None:
    """PEFT 0.21 does not apply the old names of Qwen2-VL; the oracle is its merge of the new."""
    make, old = MODELS[name]
    base = make(tmp_path / "base")
    adapter = builders.lora(
        base,
        tmp_path / "a",
        r=4,
        lora_alpha=8,
        target_modules=r".*language_model.*(q_proj|up_proj)",
    )
    oracles.peft_model(base, adapter).merge_and_unload().save_pretrained(tmp_path / "peft")
    expected = dict(load_file(tmp_path / "peft" / "model.safetensors"))
    if spelling == "old":
        new = "model.language_model."
        rename = builders.renamed(lambda key: key.replace(f"model.{new}", f"model.{old}", 1))
        adapter = builders.edited(adapter, tmp_path / "b", tensors=rename)
    merged = merge(base, adapter)
    oracles.assert_close(merged.tensors, expected, 1e-6)
    assert len(oracles.changed(merged.tensors, base)) == 4
