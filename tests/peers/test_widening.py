"""Adapters that widen a base's weight: FLUX Control LoRAs, in ComfyUI's, BFL's, diffusers' words.

The oracle is the formula, W padded with zeros by hand, and diffusers' own loader.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.errors import MatchError, UnsupportedError
from loratools.merge import merge_into_base, unmerge_from_base
from tests.peers.test_convert_diffusers import load_and_fuse, pipeline_of, weights_of
from tests.peers.test_diffusion_merge import assert_changed_by, tensors_of

WIDTH = 32
X = "x_embedder.weight"
ONE = {"alpha": 1.0}

OPTIONS: dict[str, Any] = {
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


def tiny_flux() -> torch.nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(**OPTIONS)


@pytest.fixture
def flux(tmp_path: Path) -> Path:
    tiny_flux().save_pretrained(tmp_path / "transformer", max_shard_size="40KB")
    return tmp_path / "transformer"


def factors(out: int, inner: int, seed: int = 0, rank: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(out, rank, generator=generator), torch.randn(
        rank, inner, generator=generator
    )


def padded(weight: Tensor, *shape: int) -> Tensor:
    wide = torch.zeros(shape, dtype=weight.dtype)
    wide[tuple(slice(size) for size in weight.shape)] = weight
    return wide


def control(path: Path, inner: int = 8, seed: int = 0) -> dict[str, Tensor]:
    """Write a diffusers Control LoRA without alphas; return ΔW by tensor."""
    modules = {
        "x_embedder": factors(WIDTH, inner, seed),
        "transformer_blocks.0.attn.to_q": factors(WIDTH, WIDTH, seed + 1),
    }
    tensors = {}
    for name, (up, down) in modules.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up
    save_file(tensors, path)
    return {f"{name}.weight": up.double() @ down.double() for name, (up, down) in modules.items()}


def widened(base: dict[str, Tensor], name: str, *shape: int) -> dict[str, Tensor]:
    return {**base, name: padded(base[name], *shape)}


def test_as_diffusers_loads_it(flux: Path, tmp_path: Path) -> None:
    changes = control(tmp_path / "a.safetensors")
    report = merge_into_base(flux, tmp_path / "a.safetensors", tmp_path / "out")
    assert_changed_by(tensors_of(tmp_path / "out"), widened(tensors_of(flux), X, WIDTH, 8), changes)
    notes = [note for note in report.notes if note.subject == X]
    assert [note.level for note in notes] == ["warning"]
    assert "(32, 4) to (32, 8)" in notes[0].message

    theirs = tiny_flux()
    load_and_fuse(
        pipeline_of("FluxControlPipeline", transformer=theirs),
        tmp_path / "a.safetensors",
        ["transformer"],
    )
    ours = diffusers.FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    fused, merged = weights_of(theirs), weights_of(ours)
    assert fused.keys() == merged.keys()
    for name, weight in fused.items():
        assert torch.allclose(weight, merged[name], atol=1e-5), name
    assert (ours.config.in_channels, theirs.config.in_channels) == (8, 8)
    # Without it the model would be built with as many outputs as inputs.
    assert ours.config.out_channels == 4


def test_index_and_offsets(flux: Path, tmp_path: Path) -> None:
    """The shards' sizes change and the index says so."""
    control(tmp_path / "a.safetensors")
    assert len(list(flux.glob("*.safetensors"))) > 1
    merge_into_base(flux, tmp_path / "a.safetensors", tmp_path / "out")
    (index,) = (tmp_path / "out").glob("*.index.json")
    size = json.loads(index.read_text())["metadata"]["total_size"]
    tensors = tensors_of(tmp_path / "out")
    assert size == sum(t.numel() * t.element_size() for t in tensors.values())
    assert tensors[X].shape == (WIDTH, 8)


def bfl_base(path: Path) -> dict[str, Tensor]:
    """Write a small BFL checkpoint in bfloat16."""
    shapes = {
        "img_in": (WIDTH, 4),
        "vector_in.in_layer": (WIDTH, 20),
        "double_blocks.0.img_attn.qkv": (96, 32),
        "double_blocks.0.img_attn.norm.key_norm": (16,),
        "single_blocks.0.linear1": (224, 32),
        "single_blocks.0.linear2": (32, 160),
        "single_blocks.0.norm.key_norm": (16,),
    }
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for name, shape in shapes.items():
        leaf = "scale" if name.endswith("norm") else "weight"
        tensors[f"{name}.{leaf}"] = torch.randn(shape, generator=generator).bfloat16()
    tensors["img_in.bias"] = torch.randn(WIDTH, generator=generator).bfloat16()
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize("dialect", ["comfyui", "kohya", "bfl-control"])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_stated_shape(dialect: str, strength: float, tmp_path: Path) -> None:
    """One rounding of the padded weight plus the change; padding does not depend on strength."""
    base = bfl_base(tmp_path / "flux.safetensors")
    (up, down), (up2, down2) = factors(WIDTH, 8), factors(WIDTH, 160, 1)
    words = {
        "comfyui": ("diffusion_model.img_in", "diffusion_model.single_blocks.0.linear2"),
        "kohya": ("lora_unet_img_in", "lora_unet_single_blocks_0_linear2"),
        "bfl-control": ("img_in", "single_blocks.0.linear2"),
    }[dialect]
    a, b = ("lora_down", "lora_up") if dialect == "kohya" else ("lora_A", "lora_B")
    tensors = {
        f"{words[0]}.{a}.weight": down,
        f"{words[0]}.{b}.weight": up,
        f"{words[1]}.{a}.weight": down2,
        f"{words[1]}.{b}.weight": up2,
    }
    norm = torch.full((16,), 2.0)
    if dialect == "bfl-control":
        tensors["single_blocks.0.norm.key_norm.scale"] = norm
    else:
        tensors[f"{words[0]}.reshape_weight"] = torch.tensor([WIDTH, 8])
    save_file(tensors, tmp_path / "a.safetensors")
    adapter = (tmp_path / "a.safetensors", strength)
    merge_into_base(
        tmp_path / "flux.safetensors", adapter, tmp_path / "out.safetensors", arch="flux1"
    )
    merged = load_file(tmp_path / "out.safetensors")
    expected = {
        "img_in.weight": padded(base["img_in.weight"], WIDTH, 8).double()
        + strength * up.double() @ down.double(),
        "single_blocks.0.linear2.weight": base["single_blocks.0.linear2.weight"].double()
        + strength * up2.double() @ down2.double(),
    }
    for name, tensor in base.items():
        exact = expected.get(name, tensor).double()
        if dialect == "bfl-control" and name == "single_blocks.0.norm.key_norm.scale":
            exact = tensor.double() + strength * (norm.double() - tensor.double())
        # Half a unit in the last place of bfloat16, and float32's noise where a sum cancels.
        assert torch.allclose(merged[name].double(), exact, rtol=2**-8, atol=1e-6), name


def test_beside_an_adapter_of_the_original_width(flux: Path, tmp_path: Path) -> None:
    """A LoRA (and a DoRA) of the narrow weight changes the corner of the widened one."""
    changes = control(tmp_path / "a.safetensors")
    up, down = factors(WIDTH, 4, 7)
    magnitude = torch.rand(WIDTH) + 0.5
    save_file(
        {
            "transformer.x_embedder.lora_A.weight": down,
            "transformer.x_embedder.lora_B.weight": up,
            "transformer.x_embedder.lora_magnitude_vector": magnitude,
        },
        tmp_path / "b.safetensors",
    )
    files = [tmp_path / "b.safetensors", (tmp_path / "a.safetensors", 0.25)]
    merge_into_base(flux, files, tmp_path / "out")
    base = tensors_of(flux)
    tuned = base[X].double() + up.double() @ down.double()
    dora = tuned * (magnitude.double() / tuned.norm(dim=1))[:, None]
    both = {name: change / 4 for name, change in changes.items()}
    both[X] = both[X] + padded(dora - base[X].double(), WIDTH, 8)
    assert_changed_by(tensors_of(tmp_path / "out"), widened(base, X, WIDTH, 8), both)


def test_convolution(tmp_path: Path) -> None:
    """An inpainting U-Net's first convolution: more input channels, the kernel kept."""
    generator = torch.Generator().manual_seed(1)
    base = {"conv_in.weight": torch.randn(6, 4, 3, 3, generator=generator)}
    down, up = torch.randn(2, 9, 3, 3, generator=generator), torch.randn(6, 2, 1, 1)
    save_file(base, tmp_path / "base.safetensors")
    save_file(
        {
            "unet.conv_in.lora_A.weight": down,
            "unet.conv_in.lora_B.weight": up,
            "unet.conv_in.reshape_weight": torch.tensor([6, 9, 3, 3]),
        },
        tmp_path / "a.safetensors",
    )
    from loratools.adapter import Adapter
    from loratools.adapter_io import load_adapter
    from loratools.basemodel import open_base
    from loratools.compute import resolve_compute
    from loratools.planning.merge_plan import LoadedAdapter, plan_merge
    from loratools.planning.networks import split_networks
    from loratools.streaming.checkpoint import write_checkpoints

    share: Adapter = split_networks(load_adapter(tmp_path / "a.safetensors"))["unet"]
    model = open_base(tmp_path / "base.safetensors")
    plan = plan_merge(model, [LoadedAdapter("a", 1.0, share)])
    write_checkpoints(
        {"": plan.checkpoint},
        tmp_path / "out.safetensors",
        compute=resolve_compute("cpu"),
        root=model.path,
    )
    delta = torch.einsum("or,rikl->oikl", up.double()[:, :, 0, 0], down.double())
    exact = padded(base["conv_in.weight"], 6, 9, 3, 3).double() + delta
    merged = load_file(tmp_path / "out.safetensors")["conv_in.weight"]
    assert torch.allclose(merged.double(), exact, atol=1e-5)


WRONG: dict[str, tuple[dict[str, Tensor], str]] = {
    "narrower": ({"img_in.reshape_weight": torch.tensor([WIDTH, 2])}, "is to be widened to"),
    "other dimensions": (
        {"img_in.reshape_weight": torch.tensor([WIDTH, 8, 1])},
        "is to be widened to",
    ),
    "rows of a layer with a bias": (
        {"img_in.reshape_weight": torch.tensor([2 * WIDTH, 8])},
        "bias has 32",
    ),
}


@pytest.mark.parametrize(("tensors", "words"), WRONG.values(), ids=WRONG)
def test_refused(tensors: dict[str, Tensor], words: str, tmp_path: Path) -> None:
    bfl_base(tmp_path / "flux.safetensors")
    up, down = factors(WIDTH, 160)
    layer = "diffusion_model.single_blocks.0.linear2"
    tensors = {f"diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    tensors |= {f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": up}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(MatchError, match=words):
        merge_into_base(
            tmp_path / "flux.safetensors",
            tmp_path / "a.safetensors",
            tmp_path / "out.safetensors",
            arch="flux1",
        )
    assert not (tmp_path / "out.safetensors").exists()


def test_only_the_input_widens_in_silence(flux: Path, tmp_path: Path) -> None:
    """A LoRA of another shape elsewhere is a wrong base, as ever."""
    up, down = factors(WIDTH, 2 * WIDTH)
    name = "transformer.transformer_blocks.0.attn.to_q"
    save_file(
        {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, tmp_path / "a.safetensors"
    )
    with pytest.raises(MatchError, match="64"):
        merge_into_base(flux, tmp_path / "a.safetensors", tmp_path / "out")


def test_restored_from_the_base(flux: Path, tmp_path: Path) -> None:
    control(tmp_path / "a.safetensors")
    merge_into_base(flux, tmp_path / "a.safetensors", tmp_path / "out")
    unmerge_from_base(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "back", base=flux)
    before, after = tensors_of(flux), tensors_of(tmp_path / "back")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    restored, own = (
        diffusers.FluxTransformer2DModel.load_config(folder) for folder in (tmp_path / "back", flux)
    )
    assert restored == own


def test_subtraction_is_refused(tmp_path: Path) -> None:
    bfl_base(tmp_path / "flux.safetensors")
    up, down = factors(WIDTH, 8)
    tensors = {
        "diffusion_model.img_in.lora_A.weight": down,
        "diffusion_model.img_in.lora_B.weight": up,
        "diffusion_model.img_in.reshape_weight": torch.tensor([WIDTH, 8]),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    files = (tmp_path / "flux.safetensors", tmp_path / "a.safetensors", tmp_path / "m.safetensors")
    merge_into_base(*files, arch="flux1")
    with pytest.raises(UnsupportedError, match="widened") as caught:
        unmerge_from_base(files[2], files[1], tmp_path / "back.safetensors")
    assert "--base" in (caught.value.hint or "")


def test_subtraction_that_cannot_know(flux: Path, tmp_path: Path) -> None:
    """A diffusers file does not say that it widened; the columns stay, with a warning."""
    control(tmp_path / "a.safetensors")
    merge_into_base(flux, tmp_path / "a.safetensors", tmp_path / "out")
    report = unmerge_from_base(tmp_path / "out", tmp_path / "a.safetensors", tmp_path / "back")
    back = tensors_of(tmp_path / "back")[X]
    assert torch.allclose(back, padded(tensors_of(flux)[X], WIDTH, 8), atol=1e-5)
    assert [n.level for n in report.notes if n.subject == X] == ["warning"]
