"""Names of the Stable Diffusion models, against diffusers' own converters."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas import LayerDelta, LoRA
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.registry import ARCHITECTURES
from loratools.keymaps.translate import translate
from loratools.keymaps.vocabulary import ComponentNames, is_stored_transposed, vocabulary_of
from tests.strategies import make_tensor

pytest.importorskip("diffusers")

PLAIN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
PLAIN_UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
CONFIGS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": 768, "attention_head_dim": 8},
    "sd2": {
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
    },
    "sdxl": {
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": (PLAIN, CROSS, CROSS),
        "up_block_types": (CROSS_UP, CROSS_UP, PLAIN_UP),
        "transformer_layers_per_block": [1, 2, 10],
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    "sdxl-refiner": {
        "cross_attention_dim": 1280,
        "attention_head_dim": [6, 12, 24, 24],
        "use_linear_projection": True,
        "block_out_channels": (384, 768, 1536, 1536),
        "down_block_types": (PLAIN, CROSS, CROSS, PLAIN),
        "up_block_types": (PLAIN_UP, CROSS_UP, CROSS_UP, PLAIN_UP),
        "transformer_layers_per_block": 4,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2560,
    },
}
PARAMETERS = {"sd1": 686, "sd2": 686, "sdxl": 1680, "sdxl-refiner": 1220}
MODULES = {"sd1": 282, "sd2": 282, "sdxl": 794, "sdxl-refiner": 554}


@cache
def unet(name: str) -> Any:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**CONFIGS[name])


def architecture(name: str) -> Architecture:
    return next(arch for arch in ARCHITECTURES if arch.id == name)


def names_of(name: str) -> ComponentNames:
    return vocabulary_of(architecture(name)).components[0]


def adapted_modules(name: str) -> list[str]:
    return [
        path
        for path, module in unet(name).named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d)
    ]


def empty_lora(shape: tuple[int, ...] = (1, 1)) -> LoRA:
    return LoRA(torch.zeros(1, *shape[1:]), torch.zeros(shape[0], 1), 1.0)


every_unet = pytest.mark.parametrize("name", CONFIGS)


@every_unet
def test_every_parameter_of_a_checkpoint(name: str) -> None:
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    rows = names_of(name).rowset("original").parts
    wanted, checkpoint = {}, {}
    for position, parameter in enumerate(unet(name).state_dict()):
        module, _, leaf = parameter.rpartition(".")
        found = rows.find(module)
        assert found is not None, parameter
        wanted[parameter] = torch.tensor(position)
        checkpoint[f"model.diffusion_model.{found[0][0].original}.{leaf}"] = wanted[parameter]
    converted = convert_ldm_unet_checkpoint(checkpoint, dict(unet(name).config))
    assert len(wanted) == len(checkpoint) == PARAMETERS[name]
    assert converted == wanted


@every_unet
def test_rows_name_no_other_modules(name: str) -> None:
    parameters = unet(name).state_dict()
    modules = {parameter.rpartition(".")[0] for parameter in parameters}
    assert set(names_of(name).templates("diffusers")) == modules
    for row in names_of(name).component.rows:
        (module,) = row.parts
        if row.inputs:
            assert parameters[f"{module}.weight"].shape[1] in row.inputs, module


@every_unet
def test_every_module_survives_kohya(name: str) -> None:
    modules = [f"unet.{path}" for path in adapted_modules(name)]
    assert len(modules) == MODULES[name]
    adapter = Adapter({path: empty_lora() for path in modules}, naming="diffusers")
    kohya = translate(adapter, architecture(name), "kohya")
    back = translate(kohya, architecture(name), "diffusers")
    assert set(back.layers) == set(modules)
    assert translate(back, architecture(name), "kohya").layers.keys() == kohya.layers.keys()


def kohya_tensors(paths: list[str]) -> dict[str, torch.Tensor]:
    return {
        f"{path}.lora_{side}.weight": torch.tensor(position)
        for position, path in enumerate(paths)
        for side in ("down", "up")
    }


def as_diffusers_reads(name: str, paths: list[str]) -> dict[str, str]:
    """Return kohya's module → the module that diffusers gives its LoRA to."""
    from diffusers.loaders import lora_conversion_utils as peer
    from diffusers.utils import state_dict_utils as steps

    config = SimpleNamespace(**unet(name).config)
    mapped = peer._maybe_map_sgm_blocks_to_diffusers(kohya_tensors(paths), config)
    found, _ = peer._convert_non_diffusers_lora_to_diffusers(mapped)
    denoiser = {key: value for key, value in found.items() if key.startswith("unet.")}
    encoders = {key: value for key, value in found.items() if key not in denoiser}
    loaded = steps.convert_unet_state_dict_to_peft(denoiser)
    if encoders:
        loaded |= steps.convert_state_dict_to_peft(steps.convert_state_dict_to_diffusers(encoders))
    ending = ".lora_A.weight"
    return {
        paths[int(value)]: key.removesuffix(ending)
        for key, value in loaded.items()
        if key.endswith(ending)
    }


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_kohya_names_mean_what_diffusers_reads(name: str) -> None:
    arch = architecture(name)
    layers: dict[str, LayerDelta] = {f"unet.{p}": empty_lora() for p in adapted_modules(name)}
    encoders = ("text_encoder", "text_encoder_2") if name == "sdxl" else ("text_encoder",)
    for encoder in encoders:
        for leaf in ("self_attn.q_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2"):
            layers[f"{encoder}.text_model.encoder.layers.11.{leaf}"] = empty_lora()
    paths = list(translate(Adapter(layers, naming="diffusers"), arch, "kohya").layers)
    theirs = as_diffusers_reads(name, paths)
    for path in paths:
        ours = translate(Adapter({path: empty_lora()}, naming="kohya"), arch, "diffusers")
        assert list(ours.layers) == [theirs[path]]
    assert len(theirs) == len(layers) == MODULES[name] + 4 * len(encoders)


def test_diffusers_misreads_its_own_name_of_the_added_embedding() -> None:
    path = "lora_unet_add_embedding_linear_1"
    ours = translate(
        Adapter({path: empty_lora()}, naming="kohya"), architecture("sdxl"), "diffusers"
    )
    assert list(ours.layers) == ["unet.add_embedding.linear_1"]
    # Its string rules break the name up; the module of that name gets nothing.
    assert as_diffusers_reads("sdxl", [path])[path] != "unet.add_embedding.linear_1"


# ── OpenCLIP ─────────────────────────────────────────────────────────────────────────────────

WIDTH, PROJECTED = 8, 6
PREFIX = "conditioner.embedders.1.model."
SHAPES = {
    "token_embedding.weight": (20, WIDTH),
    "positional_embedding": (5, WIDTH),
    "ln_final.weight": (WIDTH,),
    "ln_final.bias": (WIDTH,),
    "text_projection": (WIDTH, PROJECTED),
    **{
        f"transformer.resblocks.{block}.{leaf}": shape
        for block in range(2)
        for leaf, shape in {
            "attn.in_proj_weight": (3 * WIDTH, WIDTH),
            "attn.in_proj_bias": (3 * WIDTH,),
            "attn.out_proj.weight": (WIDTH, WIDTH),
            "attn.out_proj.bias": (WIDTH,),
            "mlp.c_fc.weight": (4 * WIDTH, WIDTH),
            "mlp.c_fc.bias": (4 * WIDTH,),
            "mlp.c_proj.weight": (WIDTH, 4 * WIDTH),
            "mlp.c_proj.bias": (WIDTH,),
            "ln_1.weight": (WIDTH,),
            "ln_1.bias": (WIDTH,),
            "ln_2.weight": (WIDTH,),
            "ln_2.bias": (WIDTH,),
        }.items()
    },
}


def converted(checkpoint: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    model = SimpleNamespace(config=SimpleNamespace(hidden_size=WIDTH))
    found: dict[str, torch.Tensor] = convert_open_clip_checkpoint(model, checkpoint, PREFIX)
    return found


def test_merging_into_open_clip_is_merging_into_what_diffusers_makes_of_it() -> None:
    sdxl = architecture("sdxl")
    stored = {PREFIX + n: make_tensor(i, *s) for i, (n, s) in enumerate(SHAPES.items())}
    before = converted(stored)
    names = [n for n, w in before.items() if w.dim() == 2 and "embedding" not in n]
    assert len(names) == 2 * 6 + 1
    # Not every projection is trained, and ranks and scales differ.
    trained = [name for name in names if name != names[1]]
    layers: dict[str, LayerDelta] = {}
    for seed, name in enumerate(trained):
        out, inner = before[name].shape
        rank = 1 + seed % 3
        down, up = make_tensor(seed, rank, inner), make_tensor(seed + 50, out, rank)
        flat = name.removesuffix(".weight").replace(".", "_")
        layers[f"lora_te2_{flat}"] = LoRA(down, up, alpha=0.5 + seed)
    adapter = Adapter(layers, naming="kohya")
    in_file = translate(adapter, sdxl, "checkpoint", vocabulary=stored)
    for path, delta in in_file.layers.items():
        tensor = path if path in stored else f"{path}.weight"
        turned = is_stored_transposed(sdxl, tensor)
        weight = stored[tensor].T if turned else stored[tensor]
        stored[tensor] = delta.apply(weight).T if turned else delta.apply(weight)
    after = converted(stored)
    assert after.keys() == before.keys()
    for name, weight in before.items():
        delta = layers.get("lora_te2_" + name.removesuffix(".weight").replace(".", "_"))
        wanted = weight.double()
        if isinstance(delta, LoRA):
            wanted = wanted + delta.scale * (delta.up.double() @ delta.down.double())
        torch.testing.assert_close(after[name].double(), wanted, rtol=1e-5, atol=1e-5, msg=name)
