"""Models that were cast to float8 as a whole: no scales, no word of quantisation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.errors import CorruptFileError, UnsupportedError
from loratools.extract import extract_adapter
from loratools.merge import merge_into_base
from loratools.quantize import dequantize_base
from loratools.summary.files import summarize

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LINEAR = "model.diffusion_model.double_blocks.0.img_attn.proj"
FILTER = "model.diffusion_model.input_blocks.1.0.conv"


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def write_base(path: Path, dtype: torch.dtype = E4M3, **more: Tensor) -> dict[str, Tensor]:
    tensors = {
        f"{LINEAR}.weight": 0.1 * torch.randn(64, 96),
        f"{LINEAR}.bias": torch.randn(64),
        f"{FILTER}.weight": 0.1 * torch.randn(8, 6, 3, 3),
        "model.diffusion_model.double_blocks.0.img_attn.norm.key_norm.scale": torch.rand(16),
    }
    stored = {name: tensor.to(dtype) for name, tensor in tensors.items()} | more
    save_file(stored, path)
    return stored


def write_adapter(folder: Path, module: str, shape: tuple[int, ...], size: float) -> Tensor:
    """A LoRA of rank 2; returns ΔW (out, in ...)."""
    down, up = torch.randn(2, *shape[1:]), torch.randn(shape[0], 2)
    up *= size / float((up @ down.flatten(1)).std())
    names = {"A": down, "B": up.view(*up.shape, *[1] * (len(shape) - 2))}
    folder.mkdir()
    tensors = {f"base_model.model.{module}.lora_{x}.weight": t for x, t in names.items()}
    save_file(tensors, folder / "adapter_model.safetensors")
    words = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [module]}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    return (up.double() @ down.double().flatten(1)).view(shape)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_the_default_is_bfloat16_with_a_note(tmp_path: Path, dtype: torch.dtype) -> None:
    base = write_base(tmp_path / "base.safetensors", dtype)
    change = write_adapter(tmp_path / "adapter", LINEAR, (64, 96), 0.001)
    out = tmp_path / "out.safetensors"
    report = merge_into_base(tmp_path / "base.safetensors", tmp_path / "adapter", out)
    found = load_file(out)
    assert found.keys() == base.keys()
    assert {t.dtype for t in found.values()} == {torch.bfloat16}
    wanted = base[f"{LINEAR}.weight"].double() + change
    exact = {"rtol": 2**-8, "atol": 1e-7}
    torch.testing.assert_close(found[f"{LINEAR}.weight"].double(), wanted, **exact)
    for name in base.keys() - {f"{LINEAR}.weight"}:
        assert torch.equal(found[name].float(), base[name].float())
    (note,) = [n.message for n in report.notes if "float8 without scales" in n.message]
    assert "BF16" in note
    assert "--quant keep" in note


@pytest.mark.parametrize("rounding", ["nearest", "adapter-aware"])
@pytest.mark.parametrize(("module", "shape"), [(LINEAR, (64, 96)), (FILTER, (8, 6, 3, 3))])
def test_keep_casts_the_sum_back(
    tmp_path: Path, rounding: str, module: str, shape: tuple[int, ...]
) -> None:
    base = write_base(tmp_path / "base.safetensors")
    change = write_adapter(tmp_path / "adapter", module, shape, 0.02)
    out = tmp_path / "out.safetensors"
    report = merge_into_base(
        tmp_path / "base.safetensors", tmp_path / "adapter", out, quant="keep", rounding=rounding
    )
    found = load_file(out)
    name = f"{module}.weight"
    assert {t.dtype for t in found.values()} == {E4M3}
    for other in base.keys() - {name}:
        assert torch.equal(found[other].view(torch.uint8), base[other].view(torch.uint8))
    wanted = base[name].double() + change
    if rounding == "nearest":
        nearest = wanted.float().to(E4M3).float()
        off = (found[name].float() != nearest).double().mean()
        # A tie may fall either way.
        assert float(off) < 0.01
    (item,) = report.items
    error = (found[name].double() - wanted).flatten(1)
    assert item["added_error"] == pytest.approx(float(error.norm() / wanted.norm()), rel=1e-2)
    if rounding == "adapter-aware":
        assert item["subspace_error"] < 0.1
    assert not any("scales as they are" in note.message for note in report.notes)


def test_dequantize_and_inspect(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors")
    dequantize_base(tmp_path / "base.safetensors", tmp_path / "out.safetensors", dtype="fp32")
    found = load_file(tmp_path / "out.safetensors")
    assert all(torch.equal(found[name], base[name].float()) for name in base)
    facts = summarize(tmp_path / "base.safetensors").facts
    assert facts["quantisation"] == "float8 without scales"
    assert list(facts["parameters_by_dtype"]) == ["float8 without scales"]


def test_what_a_mask_stores_as_infinite_stays(tmp_path: Path) -> None:
    mask = torch.tensor([[0.0, float("-inf")]] * 2).to(E5M2)
    write_base(tmp_path / "base.safetensors", E5M2, mask=mask)
    dequantize_base(tmp_path / "base.safetensors", tmp_path / "out.safetensors")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["mask"].float(), mask.float())


def test_where_scales_are_spoken_of_a_missing_one_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "base.safetensors"
    write_base(path, scaled_fp8=torch.zeros(2).to(E4M3))
    with pytest.raises(CorruptFileError, match=rf"{LINEAR}\.weight: stored as fp8.*no scale"):
        summarize(path)
    scale = {f"{LINEAR}.scale_weight": torch.tensor(0.5)}
    write_base(path, **scale)
    with pytest.raises(CorruptFileError, match=rf"{FILTER}\.weight: stored as fp8.*no scale"):
        summarize(path)
    (tmp_path / "folder").mkdir()
    write_base(tmp_path / "folder" / "model.safetensors")
    words = {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "folder" / "config.json").write_text(json.dumps(words))
    with pytest.raises(CorruptFileError, match=rf"{LINEAR}: stored as fp8.*no .weight_scale"):
        summarize(tmp_path / "folder")


def test_extract_takes_them_at_their_values_and_says_so(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base.safetensors")
    change = write_adapter(tmp_path / "adapter", LINEAR, (64, 96), 0.01)
    tuned = {name: tensor.float() for name, tensor in base.items()}
    tuned[f"{LINEAR}.weight"] += change.float()
    save_file(tuned, tmp_path / "tuned.safetensors")
    out = tmp_path / "lora"
    report = extract_adapter(
        tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out, rank=2, arch="flux1"
    )
    assert any("base.safetensors: 4 tensors are float8" in n.message for n in report.notes)
    scaled = {f"{LINEAR}.scale_weight": torch.tensor(0.5)}
    only = {f"{LINEAR}.weight": base[f"{LINEAR}.weight"]}
    save_file({**only, **scaled}, tmp_path / "scaled.safetensors")
    paths = tmp_path / "scaled.safetensors", tmp_path / "tuned.safetensors", tmp_path / "no"
    with pytest.raises(UnsupportedError, match="quantised"):
        extract_adapter(*paths, rank=2)
