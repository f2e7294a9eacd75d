"""diffusers 0.42: what we write loads through its mixins, key for key and with the same ΔW."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter, save_adapter
from loratools.deltas import DoRA, LayerDelta, LoRA
from tests.strategies import make_tensor

diffusers = pytest.importorskip("diffusers")
GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture
def unhandled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Collect the keys that diffusers would only warn about."""
    found: list[str] = []

    def record(incompatible: Any, adapter_name: str) -> None:
        if incompatible is not None:
            found.extend(incompatible.unexpected_keys)
            found.extend(k for k in incompatible.missing_keys if "lora_" in k and adapter_name in k)

    monkeypatch.setattr("diffusers.loaders.peft._maybe_warn_for_unhandled_keys", record)
    return found


def tiny_flux() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=4,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 0),
    )


def tiny_unet() -> nn.Module:
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        block_out_channels=(4, 8),
        layers_per_block=1,
        norm_num_groups=2,
        cross_attention_dim=8,
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def tiny_text() -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    return CLIPTextModel(
        CLIPTextConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=20,
        )
    )


def layers_for(
    model: nn.Module, prefix: str, wanted: Callable[[str], bool]
) -> dict[str, LayerDelta]:
    """Return a LoRA of its own rank and alpha for each linear layer and convolution."""
    layers: dict[str, LayerDelta] = {}
    for number, (name, module) in enumerate(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Conv2d) or not wanted(name):
            continue
        out, inner, *kernel = module.weight.shape
        rank = 1 + number % 3
        down = make_tensor(number, rank, inner, *kernel)
        up = make_tensor(number + 1000, out, rank, *[1] * len(kernel))
        layers[f"{prefix}.{name}"] = LoRA(down, up, float(1 + number % 4))
    return layers


def assert_loaded(
    model: nn.Module, layers: dict[str, LayerDelta], prefix: str, scope: str = ""
) -> None:
    """Assert that PEFT's layers in ``model`` are exactly ours, with our ΔW."""
    found = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A") and len(m.lora_A)}
    assert {f"{prefix}.{scope}{name}" for name in found} == set(layers)
    for name, module in found.items():
        delta = layers[f"{prefix}.{scope}{name}"]
        lora = delta.inner if isinstance(delta, DoRA) else delta
        (adapter,) = module.lora_A
        assert module.scaling[adapter] == pytest.approx(lora.scale, rel=1e-12)
        torch.testing.assert_close(
            module.get_delta_weight(adapter), lora.materialize(), rtol=1e-6, atol=1e-6
        )


def state(mixin: Any, path: Path) -> tuple[dict[str, Tensor], Any, Any]:
    found: tuple[dict[str, Tensor], Any, Any] = (
        mixin.lora_state_dict(path, return_alphas=True, return_lora_metadata=True)
        if mixin is not diffusers.StableDiffusionPipeline
        else mixin.lora_state_dict(path, return_lora_metadata=True)
    )
    return found


@pytest.mark.parametrize("kind", ["every rank", "one rank", "DoRA", "bias"])
def test_flux(kind: str, unhandled: list[str], tmp_path: Path) -> None:
    """All linear layers, among them proj_out, whose name ends other modules' names too."""
    model = tiny_flux()
    layers = layers_for(model, "transformer", lambda name: True)
    if kind == "one rank":
        layers = {p: LoRA(d.down[:1], d.up[:, :1], 0.5) for p, d in layers.items()}
    if kind == "DoRA":
        layers = {p: DoRA(d, make_tensor(3, d.weight_shape[0]).abs()) for p, d in layers.items()}
    if kind == "bias":
        layers = {
            p: LoRA(d.down, d.up, d.alpha, make_tensor(5, d.weight_shape[0]))
            for p, d in layers.items()
        }
    save_adapter(Adapter(layers, naming="diffusers"), tmp_path / "lora", format="diffusers")
    loaded, alphas, metadata = state(diffusers.FluxPipeline, tmp_path / "lora")
    diffusers.FluxPipeline.load_lora_into_transformer(loaded, alphas, model, metadata=metadata)
    assert unhandled == []
    assert_loaded(model, layers, "transformer")
    for name, module in model.named_modules():
        if (
            kind == "DoRA"
            and hasattr(module, "lora_magnitude_vector")
            and len(module.lora_magnitude_vector)
        ):
            (vector,) = module.lora_magnitude_vector.values()
            torch.testing.assert_close(vector.weight, layers[f"transformer.{name}"].magnitude)
        if kind == "bias" and hasattr(module, "lora_B") and len(module.lora_B):
            (up,) = module.lora_B.values()
            torch.testing.assert_close(up.bias, layers[f"transformer.{name}"].bias)


def test_some_modules_only(unhandled: list[str], tmp_path: Path) -> None:
    """The root's proj_out alone: PEFT must not adapt the blocks' proj_out with it."""
    model = tiny_flux()
    layers = layers_for(
        model, "transformer", lambda name: name == "proj_out" or name.endswith("0.attn.to_q")
    )
    save_adapter(Adapter(layers, naming="diffusers"), tmp_path / "lora", format="diffusers")
    loaded, alphas, metadata = state(diffusers.FluxPipeline, tmp_path / "lora")
    diffusers.FluxPipeline.load_lora_into_transformer(loaded, alphas, model, metadata=metadata)
    assert unhandled == []
    assert_loaded(model, layers, "transformer")


def test_unet_with_convolutions_and_text_encoder(unhandled: list[str], tmp_path: Path) -> None:
    unet, text = tiny_unet(), tiny_text()
    layers = layers_for(unet, "unet", lambda name: "down_blocks" in name)
    # Files keep the level that transformers' newer CLIP has dropped.
    scope = "" if hasattr(text, "text_model") else "text_model."
    names = layers_for(text, f"text_encoder.{scope}".rstrip("."), lambda name: "layers" in name)
    save_adapter(
        Adapter({**layers, **names}, naming="diffusers"), tmp_path / "lora", format="diffusers"
    )
    pipeline = diffusers.StableDiffusionPipeline
    loaded, alphas, metadata = state(pipeline, tmp_path / "lora")
    pipeline.load_lora_into_unet(loaded, alphas, unet, metadata=metadata)
    pipeline.load_lora_into_text_encoder(loaded, alphas, text, metadata=metadata)
    assert unhandled == []
    assert_loaded(unet, layers, "unet")
    assert_loaded(text, names, "text_encoder", scope)


@pytest.mark.parametrize(("case", "prefix"), [("flux", "transformer"), ("unet", "unet")])
def test_what_diffusers_wrote_means_the_same(case: str, prefix: str, tmp_path: Path) -> None:
    """The golden files: diffusers' own reading of its file against ours."""
    path = GOLDEN / f"diffusers/{case}.safetensors"
    model = tiny_flux() if case == "flux" else tiny_unet()
    mixin = diffusers.FluxPipeline if case == "flux" else diffusers.StableDiffusionPipeline
    loaded, alphas, metadata = state(mixin, path)
    load = mixin.load_lora_into_transformer if case == "flux" else mixin.load_lora_into_unet
    load(loaded, alphas, model, metadata=metadata)
    assert_loaded(model, dict(load_adapter(path).layers), prefix)


def test_old_spellings_as_diffusers_maps_them() -> None:
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN / "diffusers-old/pipeline.safetensors")
    unet = {k.removeprefix("unet."): t for k, t in tensors.items() if k.startswith("unet.")}
    text = {k: t for k, t in tensors.items() if k.startswith("text_encoder.")}
    theirs = {f"unet.{k}": t for k, t in convert_unet_state_dict_to_peft(unet).items()}
    theirs |= convert_state_dict_to_peft(convert_state_dict_to_diffusers(text))
    ours = load_adapter(GOLDEN / "diffusers-old/pipeline.safetensors").layers
    assert {k.partition(".lora_")[0] for k in theirs} == set(ours)
    for key, tensor in theirs.items():
        path, _, side = key.partition(".lora_")
        assert torch.equal(ours[path].tensors()["down" if side.startswith("A") else "up"], tensor)


def test_xlabs_streams_as_diffusers_maps_them() -> None:
    """Number 1 is the image stream: to_q, not add_q_proj."""
    from diffusers.loaders.lora_conversion_utils import _convert_xlabs_flux_lora_to_diffusers
    from safetensors.torch import load_file

    tensors = load_file(GOLDEN / "xlabs/flux.safetensors")
    theirs = _convert_xlabs_flux_lora_to_diffusers(dict(tensors))
    ours = load_adapter(GOLDEN / "xlabs/flux.safetensors").layers
    pairs = {
        "transformer_blocks.0.attn.to_out.0": "double_blocks.0.img_attn.proj",
        "transformer_blocks.0.attn.to_add_out": "double_blocks.0.txt_attn.proj",
        "single_transformer_blocks.0.proj_out": "single_blocks.0.linear2",
    }
    for diffusers_name, original in pairs.items():
        delta = ours[f"diffusion_model.{original}"]
        assert torch.equal(theirs[f"transformer.{diffusers_name}.lora_A.weight"], delta.down)
        assert torch.equal(theirs[f"transformer.{diffusers_name}.lora_B.weight"], delta.up)
    for part, stream in (("to_q", "img"), ("add_q_proj", "txt")):
        rows = theirs[f"transformer.transformer_blocks.0.attn.{part}.lora_B.weight"]
        whole = ours[f"diffusion_model.double_blocks.0.{stream}_attn.qkv"]
        assert torch.equal(rows, whole.up[:4])
