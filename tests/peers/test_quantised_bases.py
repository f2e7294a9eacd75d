"""Checkpoints that bitsandbytes and MLX quantised, merged without them, against them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loratools.merge import merge_into_base
from loratools.quantize import dequantize_base, quantize_base

pytestmark = pytest.mark.peers

IDS = torch.arange(24)[None]
MODULES = ["q_proj", "v_proj", "gate_proj", "down_proj"]


@pytest.fixture(scope="module")
def transformers() -> Any:
    pytest.importorskip("bitsandbytes")
    return pytest.importorskip("transformers")


def settings(transformers: Any, kind: str) -> Any:
    if kind == "int8":
        return transformers.BitsAndBytesConfig(load_in_8bit=True)
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant="nested" in kind,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )


def save_llama(transformers: Any, folder: Path, inner: int) -> Path:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=96, hidden_size=128, intermediate_size=inner, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama in bfloat16, one matrix of whose rows are no whole blocks of 64."""
    return save_llama(transformers, tmp_path_factory.mktemp("float"), 336)


@pytest.fixture(scope="module")
def even(transformers: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that bitsandbytes' CPU kernels can compute with."""
    return save_llama(transformers, tmp_path_factory.mktemp("even"), 256)


def quantised(transformers: Any, model: Path, folder: Path, kind: str) -> Path:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        model, quantization_config=settings(transformers, kind), dtype=torch.bfloat16
    )
    loaded.save_pretrained(folder)
    return folder


def adapter(transformers: Any, model: Path, folder: Path, size: float = 0.01) -> Path:
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    plain = transformers.AutoModelForCausalLM.from_pretrained(model)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=MODULES)
    wrapped = peft.get_peft_model(plain, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = size * torch.randn_like(parameter)
    wrapped.save_pretrained(folder)
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def logits(transformers: Any, folder: Path) -> Tensor:
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        found: Tensor = loaded(IDS).logits
    return found.float()


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "fp4 nested", "int8"])
def test_the_default_is_dequantise_and_merge(
    transformers: Any, model: Path, tmp_path: Path, kind: str
) -> None:
    """What transformers' own dequantize() and PEFT's merge make, read without bitsandbytes."""
    peft = pytest.importorskip("peft")
    base = quantised(transformers, model, tmp_path / "base", kind)
    lora = adapter(transformers, model, tmp_path / "adapter")
    program = (
        "import sys; sys.modules['bitsandbytes'] = None\n"
        "from loratools.merge import merge_into_base\n"
        f"merge_into_base({str(base)!r}, {str(lora)!r}, {str(tmp_path / 'out')!r})"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(base).dequantize()
    merged = peft.PeftModel.from_pretrained(theirs, lora).merge_and_unload()
    expected = {n: t for n, t in merged.state_dict().items() if "rotary" not in n}
    found = weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == torch.bfloat16
        if "336" in str(tuple(tensor.shape)[-1:]) and kind != "int8":
            # bitsandbytes' CPU kernel decodes such rows wrongly: see test_packed_schemes.
            continue
        # PEFT rounds the base to bfloat16 before it adds, and once more after.
        torch.testing.assert_close(tensor.float(), expected[name].float(), rtol=2**-7, atol=2e-4)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


@pytest.mark.parametrize("kind", ["nf4", "nf4 nested", "int8"])
@pytest.mark.parametrize("rounding", ["nearest", "adapter-aware"])
def test_what_is_kept_loads_and_computes_with_its_own_weights(
    transformers: Any, even: Path, tmp_path: Path, kind: str, rounding: str
) -> None:
    base = quantised(transformers, even, tmp_path / "base", kind)
    lora = adapter(transformers, even, tmp_path / "adapter", size=0.05)
    merge_into_base(base, lora, tmp_path / "out", quant="keep", rounding=rounding)
    assert weights(tmp_path / "out").keys() == weights(base).keys()
    dequantize_base(tmp_path / "out", tmp_path / "dense")
    ours = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    with torch.no_grad():
        expected = ours(IDS).logits.float()
    found = logits(transformers, tmp_path / "out")
    # int8 rounds activations too.
    limit = 0.05 if kind == "int8" else 0.02
    assert float((found - expected).norm() / expected.norm()) < limit
    before = logits(transformers, base)
    assert float((found - before).norm() / before.norm()) > 0.02


def test_mlx_is_dequantised_and_merged(tmp_path: Path) -> None:
    mx = pytest.importorskip("mlx.core")
    torch.manual_seed(0)
    name = "model.layers.0.mlp.up_proj"
    weight = 0.02 * torch.randn(64, 128)
    words, scales, biases = mx.quantize(mx.array(weight.numpy()), group_size=64, bits=4)
    (tmp_path / "base").mkdir()
    stored = {"weight": words, "scales": scales, "biases": biases}
    mx.save_safetensors(
        str(tmp_path / "base" / "model.safetensors"),
        {f"{name}.{part}": array for part, array in stored.items()},
        metadata={"format": "mlx"},
    )
    config = {"model_type": "llama", "quantization": {"group_size": 64, "bits": 4}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    down, up = torch.randn(4, 128), 0.01 * torch.randn(64, 4)
    lora = tmp_path / "adapter"
    lora.mkdir()
    tensors = {"A": down, "B": up}
    from safetensors.torch import save_file

    save_file(
        {f"base_model.model.{name}.lora_{x}.weight": t for x, t in tensors.items()},
        lora / "adapter_model.safetensors",
    )
    words_ = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["up_proj"]}
    (lora / "adapter_config.json").write_text(json.dumps(words_))
    merge_into_base(tmp_path / "base", lora, tmp_path / "out", dtype="fp32")
    theirs = torch.tensor(mx.dequantize(words, scales, biases, group_size=64, bits=4).tolist())
    found = weights(tmp_path / "out")[f"{name}.weight"]
    torch.testing.assert_close(found, theirs + up @ down, rtol=1e-5, atol=1e-6)
    merge_into_base(tmp_path / "base", lora, tmp_path / "kept", rounding="adapter-aware")
    kept = mx.load(str(tmp_path / "kept" / "model.safetensors"))
    parts = [kept[f"{name}.{part}"] for part in stored]
    again = torch.tensor(mx.dequantize(*parts, group_size=64, bits=4).tolist())
    share = ((again - theirs) * (up @ down)).sum() / (up @ down).square().sum()
    assert float(share) > 0.9


# ── loratools quantize ──


def same_bytes(one: Tensor, other: Tensor) -> bool:
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    return torch.equal(*(t.contiguous().view(-1).view(torch.uint8) for t in (one, other)))


KINDS = {"nf4": "nf4", "nf4-double": "nf4 nested", "fp4": "fp4", "int8": "int8"}


@pytest.mark.parametrize("word", list(KINDS))
def test_what_is_quantised_here_is_what_transformers_quantises(
    transformers: Any, even: Path, tmp_path: Path, word: str
) -> None:
    quantize_base(even, tmp_path / "ours", to=word)
    theirs = quantised(transformers, even, tmp_path / "theirs", KINDS[word])
    found, expected = weights(tmp_path / "ours"), weights(theirs)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        if "quant_state" not in name:
            assert same_bytes(tensor, expected[name]), name
            continue
        states = [json.loads(bytes(t.tolist())) for t in (tensor, expected[name])]
        offsets = [state.pop("nested_offset", 0.0) for state in states]
        assert torch.tensor(offsets[0]) == torch.tensor(offsets[1])
        assert states[0] == states[1]
    assert torch.equal(logits(transformers, tmp_path / "ours"), logits(transformers, theirs))


def test_fp8_blocks_load_in_transformers(transformers: Any, model: Path, tmp_path: Path) -> None:
    """On a CPU transformers dequantises them while loading."""
    quantize_base(model, tmp_path / "ours", to="fp8")
    stored, before = weights(tmp_path / "ours"), weights(model)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    for name, tensor in loaded.state_dict().items():
        if f"{name}_scale_inv" not in stored:
            continue
        scale = stored[f"{name}_scale_inv"]
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)
        expected = stored[name].float() * wide[: tensor.shape[0], : tensor.shape[1]]
        assert float((expected - before[name].float()).norm() / before[name].float().norm()) < 0.04
        if tensor.shape[0] % 128 == 0 and tensor.shape[1] % 128 == 0:
            torch.testing.assert_close(tensor.float(), expected, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_quantises_to_the_same_bytes(model: Path, tmp_path: Path, bits: int) -> None:
    mx = pytest.importorskip("mlx.core")
    quantize_base(model, tmp_path / "ours", to=f"mlx-{bits}")
    found = mx.load(str(tmp_path / "ours" / "model.safetensors"))
    before = mx.load(str(model / "model.safetensors"))
    names = [name.removesuffix(".scales") for name in found if name.endswith(".scales")]
    assert "model.embed_tokens" in names
    for name in names:
        expected = mx.quantize(before[f"{name}.weight"], group_size=64, bits=bits)
        for part, array in zip(("weight", "scales", "biases"), expected, strict=True):
            stored = found[f"{name}.{part}"]
            assert stored.dtype == array.dtype
            assert bool(mx.all(stored == array)), f"{name}.{part}"
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config["quantization"] == {"group_size": 64, "bits": bits}
