"""Whole folders that transformers saved with torchao, and compressed-tensors' own compressor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loratools.merge import merge_into_base
from loratools.quantize import dequantize_base

pytestmark = pytest.mark.peers

MODULE = "model.layers.0.mlp.up_proj"
IDS = torch.arange(24)[None]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=256, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    folder: Path = tmp_path_factory.mktemp("float")
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_adapter(folder: Path) -> Path:
    torch.manual_seed(1)
    folder.mkdir()
    prefix = f"base_model.model.{MODULE}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(4, 128),
        f"{prefix}.lora_B.weight": 0.01 * torch.randn(256, 4),
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    return folder


def torchao_config(name: str) -> Any:
    quantization = pytest.importorskip("torchao.quantization")
    return {
        "int8": quantization.Int8WeightOnlyConfig,
        "float8": quantization.Float8WeightOnlyConfig,
        "intx": lambda: quantization.IntxWeightOnlyConfig(
            weight_dtype=torch.int4, granularity=quantization.PerGroup(32)
        ),
    }[name]()


@pytest.mark.parametrize("name", ["int8", "float8", "intx"])
def test_torchao_folders_are_read_and_written(
    transformers: Any, model: Path, tmp_path: Path, name: str
) -> None:
    how = transformers.TorchAoConfig(torchao_config(name))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=how, dtype=torch.bfloat16
    )
    loaded.save_pretrained(tmp_path / "base")
    dequantize_base(tmp_path / "base", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    for weight, tensor in loaded.state_dict().items():
        whole = tensor.dequantize() if hasattr(tensor, "qdata") else tensor
        assert torch.equal(plain[weight], whole), weight
    with safe_open(tmp_path / "plain" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    with torch.no_grad():
        near = again(IDS).logits.float() - loaded(IDS).logits.float()
    assert float(near.abs().max()) < 0.05

    lora = write_adapter(tmp_path / "adapter")
    report = merge_into_base(tmp_path / "base", lora, tmp_path / "kept", rounding="adapter-aware")
    kept = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "kept")
    found = kept.get_parameter(f"{MODULE}.weight").dequantize().float()
    change = found - plain[f"{MODULE}.weight"].float()
    tensors = load_file(lora / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.{MODULE}.lora_{x}.weight"] for x in "AB")
    share = float((change * (up @ down)).sum() / (up @ down).square().sum())
    assert share == pytest.approx(report.items[0]["retained"], abs=0.02)
    assert share > 0.8


@pytest.mark.parametrize(
    "preset", ["W8A8", "W8A16", "W4A16", "FP8_DYNAMIC", "FP8_BLOCK", "MXFP4A16"]
)
def test_compressed_tensors_folders_are_read(
    transformers: Any, model: Path, tmp_path: Path, preset: str
) -> None:
    """As llm-compressor saves them: the library's own whole-model compressor, and its config."""
    quantization = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    scheme = quantization.preset_name_to_scheme(preset, targets=["Linear"])
    config = quantization.QuantizationConfig(
        config_groups={"group_0": scheme}, ignore=["lm_head", "re:.*k_proj"]
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    quantization.apply_quantization_config(loaded, config)
    _calibrate(loaded)
    compressor = compressors.ModelCompressor.from_pretrained_model(loaded)
    compressor.compress_model(loaded)
    (tmp_path / "base").mkdir()
    tensors = {n: t.detach().contiguous() for n, t in loaded.state_dict().items()}
    save_file(tensors, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    (tmp_path / "base" / "config.json").write_text((model / "config.json").read_text())
    compressor.update_config(str(tmp_path / "base"))
    dequantize_base(tmp_path / "base", tmp_path / "plain")
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    compressor.decompress_model(loaded)
    expected = loaded.state_dict()
    names = [name for name in expected if name.endswith(".weight")]
    assert set(plain) == set(names)
    for name in names:
        assert torch.equal(plain[name], expected[name].to(torch.bfloat16)), name


def _calibrate(model: Any) -> None:
    """Set scales of a size that leaves no code unused and clips some."""
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None and scheme.weights is not None:
            scale = module.weight_scale.data
            micro = scheme.weights.group_size == 32
            scale.copy_(2.0**-6 if micro else 2**-8 * (1 + torch.rand(scale.shape)))
