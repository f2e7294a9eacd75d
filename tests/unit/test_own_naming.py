"""A file rewritten in the format that it is in: its names are looked up all the same.

Files are made and read here by hand; what a change is, is alpha/rank · up·down.
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

from loratools.convert import convert_adapter
from loratools.errors import InputError, MatchError
from loratools.report import Report
from loratools.verify import compare_adapters
from tests.strategies import make_tensor

Tensors = dict[str, Tensor]
Modules = Mapping[str, tuple[int, int]]
D = 3072
FACTORS = {
    "kohya": ("lora_up.weight", "lora_down.weight"),
    "diffusers": ("lora_B.weight", "lora_A.weight"),
    "comfyui": ("lora_B.weight", "lora_A.weight"),
}
# Modules that only FLUX.1 has.
KNOWN: dict[str, Modules] = {
    "kohya": {
        "lora_unet_double_blocks_3_img_mlp_0": (8, D),
        "lora_unet_vector_in_in_layer": (6, 768),
    },
    "diffusers": {
        "transformer.transformer_blocks.3.ff.net.0.proj": (8, D),
        "transformer.time_text_embed.text_embedder.linear_1": (6, 768),
        "transformer.transformer_blocks.18.attn.to_q": (D, D),
        "transformer.single_transformer_blocks.37.attn.to_q": (D, D),
    },
    "comfyui": {
        "diffusion_model.double_blocks.3.img_mlp.0": (8, D),
        "diffusion_model.double_blocks.0.img_mod.lin": (6, D),
    },
}
STRAY = {
    "kohya": ("lora_unet_double_blocks_3_img_mpl_0", "lora_unet_double_blocks_3_img_mlp_0"),
    "diffusers": ("transformer.transformer_blocks.3.norm1.linar", "transformer_blocks.3.norm1"),
    "comfyui": ("diffusion_model.double_blocks.3.img_mod.lim", "double_blocks.3.img_mod.lin"),
}
STRANGE = {
    "kohya": "lora_unet_visual_things_0_self_attention_to_query",
    "diffusers": "transformer.visual_things.0.self_attention.to_query",
    "comfyui": "diffusion_model.visual_things.0.self_attention.to_query",
}
every_format = pytest.mark.parametrize("form", sorted(KNOWN))


def file(form: str, modules: Modules, rank: int = 2) -> Tensors:
    up, down = FACTORS[form]
    tensors: Tensors = {}
    for seed, (name, (rows, inputs)) in enumerate(modules.items()):
        tensors[f"{name}.{up}"] = make_tensor(seed, rows, rank)
        tensors[f"{name}.{down}"] = make_tensor(seed + 50, rank, inputs)
    return tensors


def product(tensors: Tensors, module: str) -> Tensor:
    up, down = (tensors[f"{module}.lora_{side}.weight"].double() for side in ("up", "down"))
    alpha = float(tensors.get(f"{module}.alpha", torch.tensor(float(len(down)))))
    return up @ down * (alpha / len(down))


def convert(tensors: Tensors, folder: Path, to: str, **options: Any) -> tuple[Tensors, Report]:
    save_file(tensors, folder / "in.safetensors")
    output = folder / "out.safetensors"
    report = convert_adapter(folder / "in.safetensors", output, to=to, overwrite=True, **options)
    return load_file(output), report


def words(report: Report) -> str:
    return "\n".join(note.message for note in report.notes)


# ── what is known ────────────────────────────────────────────────────────────────────────────


@every_format
def test_a_files_own_names_stay(form: str, tmp_path: Path) -> None:
    tensors = file(form, KNOWN[form])
    made, report = convert(tensors, tmp_path, form)
    assert {key: made[key] for key in tensors}.keys() == tensors.keys()
    assert all(torch.equal(made[key], tensors[key]) for key in tensors)
    assert report.facts["architecture"] == "flux1"
    assert "spelled" not in words(report)


@every_format
def test_unknown_names_are_refused(form: str, tmp_path: Path) -> None:
    stray, near = STRAY[form]
    strays = {stray: (4, D), stray.replace("3", "4"): (4, D)}
    with pytest.raises(MatchError) as raised:
        convert(file(form, {**KNOWN[form], **strays}), tmp_path, form)
    assert "2 modules have no name in FLUX.1" in raised.value.message
    assert all(name in raised.value.message for name in strays)
    assert near in raised.value.message
    assert not (tmp_path / "out.safetensors").exists()


def test_unknown_names_of_old_diffusers_files_are_refused(tmp_path: Path) -> None:
    start = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.processor."
    names = {f"{start}to_k_lora": 768, f"{start}to_v_lora": 768, "unet.sideways.to_k_lora": 768}
    tensors: Tensors = {}
    for name, inputs in names.items():
        tensors[f"{name}.up.weight"] = torch.ones(320, 2)
        tensors[f"{name}.down.weight"] = torch.ones(2, inputs)
    with pytest.raises(MatchError, match=r"1 module has no name(.|\n)*sideways"):
        convert(tensors, tmp_path, "diffusers")


def test_another_models_modules_are_named(tmp_path: Path) -> None:
    theirs = "lora_unet_down_blocks_2_attentions_0_transformer_blocks_9_attn2_to_k"
    with pytest.raises(MatchError) as raised:
        convert(file("kohya", {**KNOWN["kohya"], theirs: (1280, 2048)}), tmp_path, "kohya")
    assert "FLUX.1" in raised.value.message
    assert "(Stable Diffusion XL has it)" in raised.value.message


# ── what is not ──────────────────────────────────────────────────────────────────────────────


@every_format
def test_an_unknown_architecture_keeps_its_names(form: str, tmp_path: Path) -> None:
    name = STRANGE[form]
    tensors = file(form, {name: (6, 4)})
    made, report = convert(tensors, tmp_path, form, dtype="fp16")
    assert all(torch.equal(made[key], tensor.half()) for key, tensor in tensors.items())
    assert "names were not checked" in words(report)


@every_format
def test_an_unknown_architecture_has_no_other_names(form: str, tmp_path: Path) -> None:
    other = {"kohya": "diffusers", "diffusers": "comfyui", "comfyui": "kohya"}[form]
    with pytest.raises(InputError, match="no known architecture"):
        convert(file(form, {STRANGE[form]: (6, 4)}), tmp_path, other)


SELF = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k"


def test_what_fits_several_keeps_its_names(tmp_path: Path) -> None:
    tensors = file("kohya", {SELF: (640, 640)})
    made, _ = convert(tensors, tmp_path, "kohya")
    assert set(made) - set(tensors) == {f"{SELF}.alpha"}
    stray = SELF.replace("attn1", "attn3")
    with pytest.raises(MatchError) as raised:
        convert(file("kohya", {SELF: (640, 640), stray: (640, 640)}), tmp_path, "kohya")
    assert "Stable Diffusion 1.x or Stable Diffusion 2.x" in raised.value.message
    assert f"{stray} (nearest: {SELF}" in raised.value.message


# ── other spellings ──────────────────────────────────────────────────────────────────────────


def split_projections(prefix: str) -> tuple[Tensors, Tensor]:
    """Three projections and a modulation, and the fused projections' ΔW."""
    parts = [f"{prefix}_transformer_blocks_0_attn_to_{part}" for part in "qkv"]
    modules = {
        **dict.fromkeys(parts, (D, D)),
        f"{prefix}_transformer_blocks_0_norm1_linear": (6, D),
    }
    tensors = file("kohya", modules)
    return tensors, torch.cat([product(tensors, part) for part in parts])


@pytest.mark.parametrize("prefix", ["lycoris", "lora_transformer"])
def test_other_trainers_names_become_kohyas(prefix: str, tmp_path: Path) -> None:
    tensors, change = split_projections(prefix)
    made, report = convert(tensors, tmp_path, "kohya", arch="flux1")
    assert {key.partition(".")[0] for key in made} == {
        "lora_unet_double_blocks_0_img_attn_qkv", "lora_unet_double_blocks_0_img_mod_lin",
    }  # fmt: skip
    ours = product(made, "lora_unet_double_blocks_0_img_attn_qkv")
    assert float((ours - change).norm() / change.norm()) < 1e-6
    assert "4 of 4 names spelled otherwise" in words(report)


def test_what_cannot_be_laid_out_keeps_its_names(tmp_path: Path) -> None:
    """LoKr of split projections has no fused form."""
    tensors: Tensors = {}
    for part in "qkv":
        name = f"lycoris_transformer_blocks_0_attn_to_{part}"
        tensors[f"{name}.lokr_w1"] = torch.rand(4, 4)
        tensors[f"{name}.lokr_w2"] = torch.rand(768, 768)
    made, report = convert(tensors, tmp_path, "kohya", arch="flux1")
    assert {key: made[key] for key in tensors}.keys() == tensors.keys()
    assert "names are kept as they are" in words(report)


def twice(factor: float) -> Tensors:
    """A module under two names, the second time times ``factor``."""
    one, other = "lora_unet_double_blocks_0_img_mlp_0", "lycoris_transformer_blocks_0_ff_net_0_proj"
    tensors = file("kohya", {one: (8, D)})
    up, down = tensors[f"{one}.lora_up.weight"], tensors[f"{one}.lora_down.weight"]
    extra = {f"{other}.lora_up.weight": up * factor, f"{other}.lora_down.weight": down.clone()}
    return {**tensors, **extra}


def test_a_module_under_two_names(tmp_path: Path) -> None:
    made, report = convert(twice(1.0), tmp_path, "kohya", arch="flux1")
    assert {key.partition(".")[0] for key in made} == {"lora_unet_double_blocks_0_img_mlp_0"}
    assert "kept once" in words(report)
    with pytest.raises(MatchError, match="change the same module"):
        convert(twice(2.0), tmp_path, "kohya", arch="flux1")


def test_the_same_change_in_two_spellings_is_the_same(tmp_path: Path) -> None:
    tensors, _ = split_projections("lycoris")
    made, _ = convert(tensors, tmp_path, "kohya", arch="flux1")
    one, other = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    assert compare_adapters(one, other, arch="flux1").facts["same"]
    name = "lora_unet_double_blocks_0_img_mod_lin.lora_up.weight"
    save_file({**made, name: made[name] * 1.5}, other)
    report = compare_adapters(one, other, arch="flux1")
    assert report.facts["modules_differing"] == 1
    assert report.facts["largest_difference"] == pytest.approx(0.5, rel=1e-5)


# ── PEFT, whose files name no network ────────────────────────────────────────────────────────


def peft(folder: Path, modules: Modules) -> Path:
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": sorted(modules)}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = file("diffusers", modules)
    save_file(
        {f"base_model.model.{key}": tensor for key, tensor in tensors.items()},
        folder / "adapter_model.safetensors",
    )
    return folder


LLAMA = {f"model.layers.{i}.{m}_proj": (4, 4) for i in (0, 1) for m in ("self_attn.q", "mlp.up")}


def test_adapters_of_language_models_are_left_alone(tmp_path: Path) -> None:
    source = peft(tmp_path / "in", LLAMA)
    report = convert_adapter(source, tmp_path / "out", to="peft")
    before, after = (load_file(p / "adapter_model.safetensors") for p in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert "names" not in words(report)
    with pytest.raises(InputError, match="no known architecture"):
        convert_adapter(source, tmp_path / "out.safetensors", to="kohya")


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
        ("double_blocks.0.img_mod.lin", "transformer_blocks.0.norm1.linear"),
    ],
)
def test_adapters_of_diffusion_models_get_diffusers_names(
    module: str, expected: str, tmp_path: Path
) -> None:
    modules = {module: (D, D), module.replace(".0.", ".1.", 1): (D, D)}
    source = peft(tmp_path / "in", modules)
    convert_adapter(source, tmp_path / "out", to="peft")
    made = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert f"base_model.model.{expected}.lora_A.weight" in made
    assert len(made) == 4
