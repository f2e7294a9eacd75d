"""Which architecture a file is of: names, then widths, then metadata, then a question."""

from __future__ import annotations

from dataclasses import replace

import pytest

from loratools.adapter import Adapter
from loratools.errors import UnknownArchitectureError
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.detection import certain_architecture
from loratools.keymaps.registry import ARCHITECTURES
from loratools.keymaps.translate import (
    detect_architecture,
    detect_base,
    find_architecture,
)
from tests.keymap_cases import whole, wide_lora

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.id)


def of(*paths: str, inputs: int, naming: str = "kohya", **metadata: str) -> Adapter:
    words = {key.replace("__", "."): value for key, value in metadata.items()}
    return Adapter({path: wide_lora(inputs) for path in paths}, naming=naming, metadata=words)


@every_architecture
@pytest.mark.parametrize("naming", ["diffusers", "original", "kohya"])
def test_a_whole_adapter_is_recognised(arch: Architecture, naming: str) -> None:
    assert detect_architecture(whole(arch, naming)) is arch


SELF = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_k"
CROSS = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("inputs", "arch"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (1280, "sdxl-refiner")]
)
def test_the_width_of_the_text_tells_unets_apart(inputs: int, arch: str) -> None:
    assert detect_architecture(of(CROSS, inputs=inputs)).id == arch


def test_names_come_before_widths() -> None:
    # A pruned or tiny model has other widths than any released one.
    deep = CROSS.replace(
        "blocks_1_attentions_0_transformer_blocks_0", "blocks_2_attentions_1_transformer_blocks_9"
    )
    assert detect_architecture(of(deep, inputs=32)).id == "sdxl"
    assert detect_architecture(of(deep, CROSS, inputs=768)).id == "sdxl"


def test_whose_names_are_flattened_tells_relatives_apart() -> None:
    # musubi's FramePack has diffusers' names, its HunyuanVideo the authors'.
    theirs, ours = "single_transformer_blocks_0_proj_mlp", "double_blocks_0_img_"
    assert detect_architecture(of(f"lora_unet_{theirs}", inputs=3072)).id == "framepack"
    pair = (f"lora_unet_{ours}attn_qkv", f"lora_unet_{ours}mlp_fc1")
    assert detect_architecture(of(*pair, inputs=3072)).id == "hunyuan-video"
    # LyCORIS flattens diffusers' names for every model.
    with pytest.raises(UnknownArchitectureError, match=r"FLUX\.1 or Chroma"):
        detect_architecture(of(f"lycoris_{theirs}", inputs=3072))


def test_all_blocks_tell_flux_from_hunyuan() -> None:
    def attention(double: int, single: int) -> Adapter:
        paths = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(double)]
        paths += [f"transformer.single_transformer_blocks.{i}.attn.to_q" for i in range(single)]
        return replace(of(*paths, inputs=3072), naming="diffusers")

    # Chroma's names of these modules are FLUX.1's, so that nothing depends on the answer.
    assert detect_architecture(attention(19, 38)).id == "flux1"
    with pytest.raises(UnknownArchitectureError, match="HunyuanVideo or FramePack"):
        detect_architecture(attention(20, 40))


@pytest.mark.parametrize(
    ("metadata", "arch"),
    [
        ({"ss_base_model_version": "sd_v2"}, "sd2"),
        ({"ss_base_model_version": "sd_v1"}, "sd1"),
        ({"modelspec__architecture": "stable-diffusion-v1/lora"}, "sd1"),
        ({"modelspec__architecture": "stable-diffusion-v2-512/lora"}, "sd2"),
    ],
)
def test_metadata_breaks_ties(metadata: dict[str, str], arch: str) -> None:
    assert detect_architecture(of(SELF, inputs=640, **metadata)).id == arch


def test_a_name_that_relatives_share_in_diffusers_tree_decides_nothing() -> None:
    paths = ("transformer_blocks.0.norm1.linear", "transformer_blocks.0.attn.to_q")
    theirs = replace(of(*(f"transformer.{p}" for p in paths), inputs=3072), naming="diffusers")
    with pytest.raises(UnknownArchitectureError, match=r"FLUX\.1 or HunyuanVideo"):
        detect_architecture(theirs)
    ours = of("diffusion_model.double_blocks.0.img_mod.lin", inputs=3072, naming="original")
    assert detect_architecture(ours).id == "flux1"


# ── bare names: PEFT's, most of which are language models' ───────────────────────────────────

_LLAMA = [
    f"model.layers.{i}.{leaf}_proj"
    for i in range(2)
    for leaf in ("self_attn.q", "self_attn.v", "mlp.gate", "mlp.up", "mlp.down")
]
_VIT = [f"blocks.{i}.{leaf}" for i in range(2) for leaf in ("attn.qkv", "attn.proj", "mlp.fc1")]
_BERT = [f"bert.encoder.layer.{i}.attention.self.query" for i in range(2)]
_MPT = [f"transformer.blocks.{i}.attn.{leaf}" for i in range(2) for leaf in ("Wqkv", "out_proj")]


@pytest.mark.parametrize(
    "paths",
    [_LLAMA, _LLAMA[2:5], _LLAMA[2:3], _VIT, _VIT[2:3], _BERT, _MPT, _MPT[1:2]],
)
def test_other_models_are_no_diffusion_models(paths: list[str]) -> None:
    assert certain_architecture(of(*paths, inputs=64, naming="transformers")) is None


@pytest.mark.parametrize("leaves", [("_proj",), ("mlp.gate_proj", "mlp.up_proj")])
def test_names_of_language_models_alone_fit_nothing(leaves: tuple[str, ...]) -> None:
    """ERNIE-Image has a gate and an up projection of the same names."""
    paths = [path for path in _LLAMA if path.endswith(leaves)]
    with pytest.raises(UnknownArchitectureError, match="no known architecture"):
        detect_architecture(of(*paths, inputs=64, naming="transformers"))


@every_architecture
def test_bare_names_of_a_whole_denoiser_are_certain(arch: Architecture) -> None:
    start = f"{arch.components[0].name}."
    layers = whole(arch).layers
    bare = {p.removeprefix(start): d for p, d in layers.items() if p.startswith(start)}
    assert certain_architecture(Adapter(bare)) is arch
    stray = {**bare, "model.layers.0.self_attn.q_proj": wide_lora(4)}
    assert certain_architecture(Adapter(stray)) is None


def test_metadata_does_not_outvote_names() -> None:
    adapter = of(CROSS, inputs=2048, ss_base_model_version="sd_v1")
    assert detect_architecture(adapter).id == "sdxl"


def test_a_tie_is_a_question() -> None:
    with pytest.raises(UnknownArchitectureError) as raised:
        detect_architecture(of(SELF, inputs=640))
    assert "Stable Diffusion 1.x" in raised.value.message
    assert "Stable Diffusion 2.x" in raised.value.message
    assert "--arch sd1" in (raised.value.hint or "")
    assert "--arch sd2" in (raised.value.hint or "")


def test_unknown_modules_name_the_nearest() -> None:
    known = [CROSS.replace("attentions_0", f"attentions_{i}") for i in (0, 1)]
    unknown = [f"lora_unet_strange_{i}_thing" for i in range(5)]
    with pytest.raises(UnknownArchitectureError) as raised:
        detect_architecture(of(*known, *unknown, inputs=768))
    assert "Stable Diffusion 1.x knows 2 of 7" in raised.value.message
    with pytest.raises(UnknownArchitectureError, match="no known architecture"):
        detect_architecture(of(*unknown, inputs=768))
    near = CROSS.replace("down_blocks", "down_block")
    with pytest.raises(UnknownArchitectureError) as raised:
        detect_architecture(of(near, inputs=768))
    assert f"{near} (nearest: {CROSS}" in raised.value.message


def test_the_users_word_settles_it() -> None:
    assert detect_architecture(of(CROSS, inputs=2048), "sd1").id == "sd1"
    assert detect_architecture(replace(of(CROSS, inputs=2048), arch="sd2")).id == "sd2"
    assert find_architecture("SDXL").id == "sdxl"
    with pytest.raises(UnknownArchitectureError) as raised:
        find_architecture("sdlx")
    assert "sdxl" in (raised.value.hint or "")
    with pytest.raises(UnknownArchitectureError) as raised:
        find_architecture("flux")
    assert "flux1 or flux2" in (raised.value.hint or "")


@every_architecture
@pytest.mark.parametrize("naming", ["original", "diffusers"])
def test_bases_are_recognised(arch: Architecture, naming: str) -> None:
    component = arch.components[0]
    start = (component.original if naming == "original" else component.name) + "."
    home = component.checkpoint[0] if naming == "original" else ""
    tensors = {
        f"{home}{path.removeprefix(start)}.weight": delta.weight_shape
        for path, delta in whole(arch, naming).layers.items()
        if path.startswith(start)
    }
    assert detect_base(tensors) is arch
