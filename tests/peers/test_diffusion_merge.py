"""Merging into diffusion models: component folders, pipelines and single files.

The oracle is the formula W + strength·(alpha/rank)·B·A, row blocks placed by hand.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.errors import MatchError
from loratools.merge import merge_into_base, unmerge_from_base

Tensors = dict[str, Tensor]
RANK, ALPHA = 4, 2.0
WIDTH = 32


def kohya(path: Path, modules: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, Tensor]:
    """Write a kohya file for modules of the given (out, in[, k, k]); return ΔW by module."""
    generator = torch.Generator().manual_seed(seed)
    tensors, deltas = {}, {}
    for name, (out, inner, *kernel) in modules.items():
        down = torch.randn(RANK, inner, *kernel, generator=generator)
        up = torch.randn(out, RANK, *[1 for _ in kernel], generator=generator)
        tensors |= {
            f"{name}.lora_down.weight": down,
            f"{name}.lora_up.weight": up,
            f"{name}.alpha": torch.tensor(ALPHA),
        }
        product = up.double().flatten(1) @ down.double().flatten(1) * (ALPHA / RANK)
        deltas[name] = product.reshape(out, inner, *kernel)
    save_file(tensors, path)
    return deltas


def tensors_of(folder: Path) -> Tensors:
    """Return every tensor below a file or folder."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def assert_changed_by(merged: Tensors, base: Tensors, expected: dict[str, Tensor]) -> None:
    """Assert merged == base + expected, and nothing else changed."""
    assert merged.keys() == base.keys()
    for name, tensor in merged.items():
        if name in expected:
            exact = base[name].double() + expected[name]
            assert (tensor.double() - exact).abs().max() < 1e-5, name
        else:
            assert torch.equal(tensor, base[name]), name


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    """A FLUX transformer of one double and one single block, as diffusers saves it."""
    import diffusers

    torch.manual_seed(0)
    config: dict[str, Any] = {
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
    diffusers.FluxTransformer2DModel(**config).save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


FLUX_MODULES = {
    "lora_unet_double_blocks_0_img_attn_qkv": (3 * WIDTH, WIDTH),
    "lora_unet_double_blocks_0_txt_attn_proj": (WIDTH, WIDTH),
    "lora_unet_single_blocks_0_linear1": (7 * WIDTH, WIDTH),
    "lora_unet_single_blocks_0_linear2": (WIDTH, 5 * WIDTH),
    "lora_unet_final_layer_adaLN_modulation_1": (2 * WIDTH, WIDTH),
}


def flux_expected(deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Place the deltas on diffusers' names: fused rows apart, adaLN's halves swapped."""
    qkv = deltas["lora_unet_double_blocks_0_img_attn_qkv"].split(WIDTH)
    linear1 = deltas["lora_unet_single_blocks_0_linear1"].split([WIDTH, WIDTH, WIDTH, 4 * WIDTH])
    shift, scale = deltas["lora_unet_final_layer_adaLN_modulation_1"].split(WIDTH)
    double, single = "transformer_blocks.0.", "single_transformer_blocks.0."
    return {
        **{f"{double}attn.to_{n}.weight": d for n, d in zip("qkv", qkv, strict=True)},
        f"{double}attn.to_add_out.weight": deltas["lora_unet_double_blocks_0_txt_attn_proj"],
        **{f"{single}attn.to_{n}.weight": d for n, d in zip("qkv", linear1[:3], strict=True)},
        f"{single}proj_mlp.weight": linear1[3],
        f"{single}proj_out.weight": deltas["lora_unet_single_blocks_0_linear2"],
        "norm_out.linear.weight": torch.cat([scale, shift]),
    }


def test_component_folder(flux: Path, tmp_path: Path) -> None:
    """A kohya file (BFL names, fused) into diffusers' transformer folder (split)."""
    import diffusers

    deltas = kohya(tmp_path / "a.safetensors", FLUX_MODULES)
    report = merge_into_base(flux, tmp_path / "a.safetensors", tmp_path / "out")
    expected = flux_expected(deltas)
    assert_changed_by(tensors_of(tmp_path / "out"), tensors_of(flux), expected)
    assert report.facts["tensors_changed"] == len(expected)
    diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out")


def test_converted_first(flux: Path, tmp_path: Path) -> None:
    """Converting and then merging is merging."""
    from loratools.convert import convert_adapter

    deltas = kohya(tmp_path / "a.safetensors", FLUX_MODULES)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    # At this width the names alone do not tell FLUX from its relatives.
    convert_adapter(first, second, to="diffusers", arch="flux1")
    merge_into_base(flux, (tmp_path / "b.safetensors", 0.5), tmp_path / "out")
    halves = {name: delta / 2 for name, delta in flux_expected(deltas).items()}
    assert_changed_by(tensors_of(tmp_path / "out"), tensors_of(flux), halves)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", ""])
def test_bfl_single_file(prefix: str, tmp_path: Path) -> None:
    """Into a checkpoint with BFL's names, whole or as ComfyUI's split file."""
    shapes = {
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.0.img_attn.norm.key_norm": (16,),
        "double_blocks.0.img_mod.lin": (192, 32),
        "double_blocks.0.txt_attn.proj": (32, 32),
        "single_blocks.0.linear1": (224, 32),
        "single_blocks.0.linear2": (32, 160),
        "vector_in.in_layer": (32, 20),
        "img_in": (32, 4),
        "final_layer.adaLN_modulation.1": (64, 32),
    }
    torch.manual_seed(1)
    base = {
        f"{prefix}{name}.{'scale' if 'key_norm' in name else 'weight'}": torch.randn(shape)
        for name, shape in shapes.items()
    }
    base["first_stage_model.decoder.conv_in.weight"] = torch.randn(4, 4, 3, 3)
    save_file(base, tmp_path / "flux.safetensors")
    deltas = kohya(tmp_path / "a.safetensors", FLUX_MODULES)
    output = tmp_path / "out.safetensors"
    merge_into_base(tmp_path / "flux.safetensors", tmp_path / "a.safetensors", output)
    expected = {
        f"{prefix}{name}.weight": deltas["lora_unet_" + name.replace(".", "_")]
        for name in shapes
        if "lora_unet_" + name.replace(".", "_") in deltas
    }
    assert len(expected) == len(deltas)
    assert_changed_by(tensors_of(output), base, expected)


@pytest.fixture
def sd1(tmp_path: Path) -> Path:
    """A Stable Diffusion pipeline folder with a small U-Net and text encoder."""
    import diffusers
    import transformers

    torch.manual_seed(2)
    folder = tmp_path / "sd1"
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(32, 32, 32, 32), cross_attention_dim=768, norm_num_groups=8,
        attention_head_dim=8, layers_per_block=2,
    )  # fmt: skip
    unet.save_pretrained(folder / "unet")
    text = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=64, num_hidden_layers=2, num_attention_heads=8,
        vocab_size=99,
    )  # fmt: skip
    transformers.CLIPTextModel(text).save_pretrained(folder / "text_encoder")
    (folder / "vae").mkdir()
    save_file({"x": torch.ones(3)}, folder / "vae" / "diffusion_pytorch_model.safetensors")
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "vocab.json").write_text("{}")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder


SD1_UNET = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
SD1_CONV = "lora_unet_mid_block_resnets_0_conv1"
SD1_TEXT = "lora_te_text_model_encoder_layers_1_mlp_fc1"


def sd1_adapter(path: Path) -> dict[str, Tensor]:
    """Write a kohya file of a U-Net attention, a 3×3 convolution and a text-encoder layer."""
    return kohya(path, {SD1_UNET: (32, 768), SD1_CONV: (32, 32, 3, 3), SD1_TEXT: (64, 768)})


def test_pipeline(sd1: Path, tmp_path: Path) -> None:
    """Each network takes its share; the rest of the pipeline is copied byte for byte."""
    deltas = sd1_adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out"
    report = merge_into_base(sd1, tmp_path / "a.safetensors", out)
    unet = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight": deltas[SD1_UNET],
        "mid_block.resnets.0.conv1.weight": deltas[SD1_CONV],
    }
    assert_changed_by(tensors_of(out / "unet"), tensors_of(sd1 / "unet"), unet)
    text = tensors_of(sd1 / "text_encoder")
    changed = [name for name in text if name.endswith("layers.1.mlp.fc1.weight")]
    expected = {changed[0]: deltas[SD1_TEXT]}
    assert_changed_by(tensors_of(out / "text_encoder"), text, expected)
    files = {path.relative_to(sd1) for path in sd1.rglob("*") if path.is_file()}
    assert files == {path.relative_to(out) for path in out.rglob("*") if path.is_file()}
    same = ("model_index.json", "vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json")
    assert all((out / name).read_bytes() == (sd1 / name).read_bytes() for name in same)
    assert report.facts["tensors_changed"] == 3


def test_network_that_is_not_there(sd1: Path, tmp_path: Path) -> None:
    """A pipeline without the text encoder that the adapter changes: refused, nothing written."""
    sd1_adapter(tmp_path / "a.safetensors")
    shutil.rmtree(sd1 / "text_encoder")
    with pytest.raises(MatchError, match="text_encoder"):
        merge_into_base(sd1, tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_architecture(flux: Path, tmp_path: Path) -> None:
    """An adapter for Stable Diffusion on FLUX: refused, naming both."""
    sd1_adapter(tmp_path / "a.safetensors")
    with pytest.raises(MatchError, match=r"(?s)Stable Diffusion.*FLUX"):
        merge_into_base(flux, tmp_path / "a.safetensors", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_openclip_rows(tmp_path: Path) -> None:
    """SDXL's te2 q, k, v land on row blocks of in_proj_weight, in that order (reference §9.12)."""
    torch.manual_seed(3)
    width = 1280
    stem = "conditioner.embedders.1.model.transformer.resblocks.0."
    unet = "model.diffusion_model."
    base = {
        f"{unet}input_blocks.0.0.weight": torch.randn(320, 4, 3, 3),
        f"{unet}label_emb.0.0.weight": torch.randn(1280, 2816),
        f"{unet}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": torch.randn(640, 2048),
        f"{stem}attn.in_proj_weight": torch.randn(3 * width, width),
        f"{stem}attn.out_proj.weight": torch.randn(width, width),
        f"{stem}mlp.c_fc.weight": torch.randn(4, width),
    }
    save_file(base, tmp_path / "xl.safetensors")
    layer = "lora_te2_text_model_encoder_layers_0_"
    to_k = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    deltas = kohya(
        tmp_path / "a.safetensors",
        {
            f"{layer}self_attn_v_proj": (width, width),
            f"{layer}self_attn_q_proj": (width, width),
            f"{layer}mlp_fc1": (4, width),
            to_k: (640, 2048),
        },
    )
    output = tmp_path / "out.safetensors"
    merge_into_base(tmp_path / "xl.safetensors", tmp_path / "a.safetensors", output, arch="sdxl")
    zero = torch.zeros(width, width, dtype=torch.float64)
    rows = [deltas[f"{layer}self_attn_q_proj"], zero, deltas[f"{layer}self_attn_v_proj"]]
    expected = {
        f"{stem}attn.in_proj_weight": torch.cat(rows),
        f"{stem}mlp.c_fc.weight": deltas[f"{layer}mlp_fc1"],
        f"{unet}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": deltas[to_k],
    }
    assert_changed_by(tensors_of(output), base, expected)


def test_taken_out_again(flux: Path, tmp_path: Path) -> None:
    """Unmerge copies the touched tensors back, whatever the adapter's naming."""
    kohya(tmp_path / "a.safetensors", FLUX_MODULES)
    merge_into_base(flux, tmp_path / "a.safetensors", tmp_path / "out")
    unmerge_from_base(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "back", base=flux)
    assert_changed_by(tensors_of(tmp_path / "back"), tensors_of(flux), {})


def files_of(folder: Path) -> dict[Path, bytes]:
    """Return every file below a folder by its relative path."""
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("given", ["adapter", "no adapter"])
def test_pipeline_restored(sd1: Path, tmp_path: Path, given: str) -> None:
    """With the base every byte of the pipeline is back, whether or not the adapter is named."""
    sd1_adapter(tmp_path / "a.safetensors")
    adapters = [(tmp_path / "a.safetensors", 0.7)]
    merge_into_base(sd1, adapters, tmp_path / "out")
    assert files_of(tmp_path / "out") != files_of(sd1)
    named = adapters if given == "adapter" else []
    report = unmerge_from_base(tmp_path / "out", named, tmp_path / "back", base=sd1)
    assert files_of(tmp_path / "back") == files_of(sd1)
    assert report.facts["method"] == "copied from base"
    assert report.facts["components"] == ["unet", "text_encoder"]


def test_pipeline_restored_only_where_touched(sd1: Path, tmp_path: Path) -> None:
    """What no named adapter touches stays as the merged pipeline has it."""
    kohya(tmp_path / "a.safetensors", {SD1_UNET: (32, 768)})
    kohya(tmp_path / "b.safetensors", {SD1_TEXT: (64, 768)})
    both = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    merge_into_base(sd1, both, tmp_path / "out")
    unmerge_from_base(tmp_path / "out", both[:1], tmp_path / "back", base=sd1)
    back, merged, base = (files_of(folder) for folder in (tmp_path / "back", tmp_path / "out", sd1))
    for path in base:
        assert back[path] == (merged if path.parts[0] == "text_encoder" else base)[path], path


def test_pipeline_subtracted(sd1: Path, tmp_path: Path) -> None:
    """Without the base: within the reported bound, and far within the change."""
    sd1_adapter(tmp_path / "a.safetensors")
    adapter = (tmp_path / "a.safetensors", 0.7)
    merge_into_base(sd1, adapter, tmp_path / "out")
    report = unmerge_from_base(tmp_path / "out", adapter, tmp_path / "back")
    squares = 0.0
    for network in ("unet", "text_encoder"):
        before, after = tensors_of(sd1 / network), tensors_of(tmp_path / "back" / network)
        assert before.keys() == after.keys()
        squares += sum(float((after[n].double() - t).norm()) ** 2 for n, t in before.items())
    assert 0 < squares**0.5 <= report.facts["error_bound"] < 1e-4 < report.facts["change_norm"]
    assert report.facts["tensors_changed"] == 3
    same = ("vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "unet/config.json")
    assert all((tmp_path / "back" / n).read_bytes() == (sd1 / n).read_bytes() for n in same)


def test_pipeline_of_another_merge(sd1: Path, tmp_path: Path) -> None:
    """A base or an adapter that does not belong to it: refused, nothing written."""
    sd1_adapter(tmp_path / "a.safetensors")
    kohya(tmp_path / "b.safetensors", {SD1_TEXT: (64, 768)}, seed=9)
    merge_into_base(sd1, tmp_path / "a.safetensors", tmp_path / "out")
    arguments: list[tuple[str, Path, str]] = [
        ("b.safetensors", sd1, "is not what these adapters make of"),
        ("a.safetensors", sd1 / "unet", "one model"),
    ]
    for name, base, words in arguments:
        with pytest.raises(MatchError, match=words):
            unmerge_from_base(tmp_path / "out", tmp_path / name, tmp_path / "back", base=base)
    shutil.rmtree(sd1 / "text_encoder")
    with pytest.raises(MatchError, match="text_encoder"):
        unmerge_from_base(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "back", base=sd1)
    assert not (tmp_path / "back").exists()


Made = tuple[Tensors, dict[str, Tensor]]


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Return a random tensor."""
    return torch.randn(shape, generator=generator)


def lokr(generator: torch.Generator) -> Made:
    """Return a LoKr of a (32, 32) weight, and its changes by parameter."""
    w1, a, b = normal(generator, 4, 4), normal(generator, 8, 2), normal(generator, 2, 8)
    stored = {"lokr_w1": w1, "lokr_w2_a": a, "lokr_w2_b": b, "alpha": torch.tensor(1.0)}
    return stored, {"weight": torch.kron(w1.double(), a.double() @ b.double()) / 2}


def loha_conv(generator: torch.Generator) -> Made:
    """Return a LoHa of a (32, 32, 3, 3) convolution, and its change."""
    stored = {
        "hada_w1_a": normal(generator, 32, 2),
        "hada_w1_b": normal(generator, 2, 288),
        "hada_w2_a": normal(generator, 32, 2),
        "hada_w2_b": normal(generator, 2, 288),
    }
    one, two = (stored[f"hada_w{n}_a"].double() @ stored[f"hada_w{n}_b"].double() for n in (1, 2))
    stored["alpha"] = torch.tensor(2.0)
    return stored, {"weight": (one * two).reshape(32, 32, 3, 3)}


def full(generator: torch.Generator) -> Made:
    """Return a full difference of a (32, 768) weight."""
    diff = normal(generator, 32, 768)
    return {"diff": diff}, {"weight": diff.double()}


def bias_alone(generator: torch.Generator) -> Made:
    """Return a difference of a bias of 32, without one of its weight."""
    diff = normal(generator, 32)
    return {"diff_b": diff}, {"bias": diff.double()}


def test_other_parameterisations(sd1: Path, tmp_path: Path) -> None:
    """LoKr, LoHa on a convolution, full differences and biases, in a pipeline's U-Net."""
    generator = torch.Generator().manual_seed(5)
    block = "down_blocks.1.attentions.0.transformer_blocks.0."
    modules = {
        f"{block}attn1.to_q": lokr,
        "mid_block.resnets.0.conv1": loha_conv,
        f"{block}attn2.to_v": full,
        f"{block}attn1.to_out.0": bias_alone,
    }
    tensors, expected = {}, {}
    for module, make in modules.items():
        stored, changes = make(generator)
        flat = "lora_unet_" + module.replace(".", "_")
        tensors |= {f"{flat}.{name}": tensor for name, tensor in stored.items()}
        expected |= {f"{module}.{name}": change for name, change in changes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    merge_into_base(sd1, tmp_path / "a.safetensors", tmp_path / "out")
    assert_changed_by(tensors_of(tmp_path / "out" / "unet"), tensors_of(sd1 / "unet"), expected)


@pytest.mark.parametrize(
    "text",
    [",".join(["0.5", *["1"] * 4, "2", *["1"] * 7, "0", *["1"] * 12]), "text_model=0.5,mid=0,.=2"],
    ids=["list", "patterns"],
)
def test_block_strengths(sd1: Path, tmp_path: Path, text: str) -> None:
    """Text encoder at half, IN04 (down_blocks.1.attentions.0) doubled, middle block left out."""
    deltas = sd1_adapter(tmp_path / "a.safetensors")
    out = tmp_path / "out"
    merge_into_base(sd1, tmp_path / "a.safetensors", out, block_strengths=text)
    to_k = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    doubled = {to_k: 2 * deltas[SD1_UNET]}
    assert_changed_by(tensors_of(out / "unet"), tensors_of(sd1 / "unet"), doubled)
    text_base = tensors_of(sd1 / "text_encoder")
    name = next(name for name in text_base if name.endswith("layers.1.mlp.fc1.weight"))
    halved = {name: deltas[SD1_TEXT] / 2}
    assert_changed_by(tensors_of(out / "text_encoder"), text_base, halved)
