"""Make the golden files of the diffusion formats: a folder for each format, a file for each case.

    PYTHONPATH=<folder of lycoris-lora 4.1.3, einops, toml> python tests/golden/make_diffusion.py

Made by the tools themselves where they install (diffusers, PEFT, LyCORIS); by hand after their
sources where they do not (sd-scripts, ComfyUI, XLabs, Black Forest Labs, cloneofsimo). Versions
stand in ``diffusion_versions.json``. The tests read the files alone.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import lycoris
import peft
import safetensors
import torch
from diffusers import (
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor, nn

HERE = Path(__file__).parent
Tensors = dict[str, Tensor]


def numbers(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.randn(*shape).to(dtype)


def pair(module: str, out: int, inner: int, rank: int, names: tuple[str, str], alpha: float | None = None) -> Tensors:
    """Return one module's LoRA under the given suffixes for down and up."""
    found = {f"{module}.{names[0]}": numbers(rank, inner), f"{module}.{names[1]}": numbers(out, rank)}
    if alpha is not None:
        found[f"{module}.alpha"] = torch.tensor(alpha, dtype=torch.float16)
    return found


KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")
DOTTED = ("down.weight", "up.weight")


# ── by the tools ──


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 8)
        self.conv = nn.Conv2d(4, 8, 3)


class NormBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(6, 8)
        self.norm = nn.LayerNorm(8)


LYCORIS: Mapping[str, dict[str, Any]] = {
    "locon": {"algo": "locon"},
    "tucker": {"algo": "locon", "use_tucker": True},
    "loha": {"algo": "loha"},
    "lohatucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2, "linear_dim": 1, "conv_dim": 1},
    "lokrfull": {"algo": "lokr", "factor": 2, "full_matrix": True},
    "lokrtucker": {"algo": "lokr", "factor": 2, "use_tucker": True, "linear_dim": 1, "conv_dim": 1},
    "oft": {"algo": "diag-oft", "constraint": 0.5, "rescaled": True},
    "boft": {"algo": "boft", "rescaled": True},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "full": {"algo": "full"},
    "dora": {"algo": "locon", "dora_wd": True},
    "dorain": {"algo": "loha", "dora_wd": True, "wd_on_output": False},
    "norms": {"algo": "locon", "train_norm": True},
}


def lycoris_case() -> tuple[Tensors, dict[str, str]]:
    """Return a block of each algorithm, as LyCORIS' own modules name and shape their tensors."""
    tensors: Tensors = {}
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as preset:
        preset.write('enable_conv = true\ntarget_module = ["Block", "NormBlock"]\ntarget_name = []\n')
        preset.flush()
        for name, words in LYCORIS.items():
            net = nn.ModuleDict({name: NormBlock() if name == "norms" else Block()})
            settings = {"linear_dim": 2, "linear_alpha": 1, "conv_dim": 2, "conv_alpha": 1, **words}
            network = lycoris.create_lycoris(net, 1.0, preset=preset.name, **settings)
            network.apply_to()
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.copy_(torch.randn_like(parameter))
            tensors |= {key: half(tensor) for key, tensor in network.state_dict().items()}
    return tensors, {"ss_network_module": "lycoris.kohya", "ss_network_dim": "2", "ss_network_alpha": "1"}


def half(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float16) if tensor.is_floating_point() else tensor


def tiny_flux() -> nn.Module:
    return FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=4,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(2, 2, 0),
    ).to(torch.float16)  # fmt: skip


UNET_TARGETS = r"down_blocks\.0\.(attentions.*attn1\.to_[qv]|resnets\.0\.conv1|downsamplers\.0\.conv)"


def tiny_unet() -> nn.Module:
    return UNet2DConditionModel(
        block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2, cross_attention_dim=8,
        attention_head_dim=2, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    ).to(torch.float16)  # fmt: skip


def trained(model: nn.Module, **words: Any) -> nn.Module:
    model.add_adapter(LoraConfig(init_lora_weights=False, **words))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn_like(parameter))
    return model.to(torch.float16)


def saved(pipeline: Any, **words: Any) -> tuple[Tensors, dict[str, str]]:
    """Return what ``save_lora_weights`` writes, and its metadata."""
    with tempfile.TemporaryDirectory() as folder:
        pipeline.save_lora_weights(folder, **words)
        with safetensors.safe_open(Path(folder) / "pytorch_lora_weights.safetensors", "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def flux_case() -> tuple[Tensors, dict[str, str]]:
    words = {
        "r": 2, "lora_alpha": 3, "target_modules": ["to_q", "to_k", "x_embedder", "proj_out"],
        "rank_pattern": {"single_transformer_blocks.0.attn.to_k": 1}, "alpha_pattern": {"to_q": 8},
    }  # fmt: skip
    model = trained(tiny_flux(), **words)
    layers = get_peft_model_state_dict(model, adapter_name="default")
    config = model.peft_config["default"].to_dict()
    fields = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    return saved(FluxPipeline, transformer_lora_layers=layers, transformer_lora_adapter_metadata=fields)


def unet_case(**words: Any) -> tuple[Tensors, dict[str, str]]:
    """Return a UNet's convolutions and linear layers, without metadata."""
    model = trained(tiny_unet(), r=2, lora_alpha=2, target_modules=UNET_TARGETS, **words)
    layers = get_peft_model_state_dict(model, adapter_name="default")
    return saved(StableDiffusionPipeline, unet_lora_layers=layers)


def dump_case(*, raw: bool) -> tuple[Tensors, dict[str, str]]:
    """Return a PEFT-wrapped model's tensors: as PEFT saves them, or as they are in memory."""
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False)
    model = get_peft_model(tiny_flux(), config)
    if raw:
        return {k: half(v) for k, v in model.state_dict().items() if "lora_" in k}, {}
    return {k: half(v) for k, v in get_peft_model_state_dict(model).items()}, {}


# ── by hand ──


def sd15_case() -> tuple[Tensors, dict[str, str]]:
    """sd-scripts' networks.lora with C3Lier: half precision, alpha in every module."""
    attention = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    text = "lora_te_text_model_encoder_layers_0_self_attn_q_proj"
    resnet = "lora_unet_down_blocks_0_resnets_0_conv1"
    tensors = pair(attention, 8, 8, 4, KOHYA, 2.0) | pair(text, 6, 6, 2, KOHYA, 1.0)
    tensors |= {
        f"{resnet}.lora_down.weight": numbers(2, 4, 3, 3),
        f"{resnet}.lora_up.weight": numbers(8, 2, 1, 1),
        f"{resnet}.alpha": torch.tensor(1.0, dtype=torch.float16),
    }
    metadata = {
        "ss_v2": "False", "ss_base_model_version": "sd_v1", "ss_network_module": "networks.lora",
        "ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_args": '{"conv_dim": "2", "conv_alpha": "1"}',
        "ss_output_name": "golden", "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
    }  # fmt: skip
    return tensors, metadata


def odd_kohya_case() -> tuple[Tensors, dict[str, str]]:
    """Alphas of every dtype, a bundled embedding, an extraction's residual, sd-scripts' OFT, old GLoRA."""
    flux = "lora_unet_double_blocks_0_img_attn_"
    tensors = pair(f"{flux}qkv", 12, 4, 3, KOHYA) | pair(f"{flux}proj", 4, 4, 2, KOHYA)
    tensors[f"{flux}qkv.alpha"] = torch.tensor(6)
    tensors[f"{flux}proj.alpha"] = torch.tensor([2.0], dtype=torch.float16)
    tensors |= pair("lora_te1_text_model_encoder_layers_0_mlp_fc1", 8, 4, 2, KOHYA)
    tensors |= {
        f"{flux}proj.bias_indices": torch.tensor([[0, 3], [1, 2]], dtype=torch.int16),
        f"{flux}proj.bias_values": numbers(2),
        f"{flux}proj.bias_size": torch.tensor([4, 4], dtype=torch.int16),
        "bundle_emb.word.string_to_param.*": numbers(1, 4),
        "oft_unet_single_blocks_0_linear2.oft_blocks": numbers(2, 2, 2),
        "oft_unet_single_blocks_0_linear2.alpha": torch.tensor(0.25, dtype=torch.float16),
        "lora_unet_img_in.a1.weight": numbers(2, 5),
        "lora_unet_img_in.a2.weight": numbers(5, 2),
        "lora_unet_img_in.b1.weight": numbers(2, 5),
        "lora_unet_img_in.b2.weight": numbers(7, 2),
        "lora_unet_img_in.alpha": torch.tensor(1.0),
    }
    return tensors, {}


def ai_toolkit_case() -> tuple[Tensors, dict[str, str]]:
    tensors = pair("diffusion_model.double_blocks.0.img_attn.qkv", 12, 4, 2, PEFT)
    tensors |= pair("diffusion_model.single_blocks.0.linear1", 20, 4, 1, PEFT)
    return tensors, {"format": "pt", "software": '{"name": "ai-toolkit"}', "name": "golden"}


def comfy_case() -> tuple[Tensors, dict[str, str]]:
    block = "diffusion_model.blocks.0"
    tensors = pair(f"{block}.self_attn.q", 6, 4, 2, PEFT, 1.0)
    tensors |= {
        f"{block}.self_attn.q.diff_b": numbers(6),
        f"{block}.norm3.diff": numbers(4),
        f"{block}.norm3.diff_b": numbers(4),
        "diffusion_model.patch_embedding.lora_A.weight": numbers(2, 4, 1, 2, 2),
        "diffusion_model.patch_embedding.lora_B.weight": numbers(6, 2, 1, 1, 1),
        "diffusion_model.img_in.reshape_weight": torch.tensor([6, 8]),
        "diffusion_model.img_in.set_weight": numbers(6, 8),
        "diffusion_model.norm.query_norm.scale.set_weight": numbers(4),
        f"{block}.ffn.0.lokr_w1": numbers(2, 2),
        f"{block}.ffn.0.lokr_w2_a": numbers(4, 1),
        f"{block}.ffn.0.lokr_w2_b": numbers(1, 2),
        f"{block}.ffn.0.alpha": torch.tensor(2.0, dtype=torch.float16),
        f"{block}.ffn.0.dora_scale": numbers(8, 1),
    }
    tensors |= pair("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1", 8, 4, 2, PEFT)
    return tensors, {"format": "pt"}


def attn_procs_case() -> tuple[Tensors, dict[str, str]]:
    block = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.processor"
    tensors: Tensors = {}
    for leaf in ("to_q", "to_k", "to_v", "to_out"):
        tensors |= pair(f"{block}.{leaf}_lora", 4, 4, 2, DOTTED)
    return tensors, {"format": "pt"}


def old_pipeline_case() -> tuple[Tensors, dict[str, str]]:
    unet = "unet.mid_block.attentions.0"
    text = "text_encoder.text_model.encoder.layers.0"
    tensors = pair(f"{unet}.transformer_blocks.0.attn2.processor.to_k_lora", 4, 6, 2, DOTTED)
    tensors |= pair(f"{unet}.proj_in.lora", 4, 4, 2, DOTTED)
    tensors |= pair(f"{text}.self_attn.to_q_lora", 6, 6, 2, DOTTED)
    tensors |= pair(f"{text}.self_attn.to_out_lora", 6, 6, 2, DOTTED)
    tensors |= pair(f"{text}.mlp.fc1.lora_linear_layer", 8, 6, 2, DOTTED)
    return tensors, {"format": "pt"}


def xlabs_case() -> tuple[Tensors, dict[str, str]]:
    tensors: Tensors = {}
    for stream in "12":
        tensors |= pair(f"double_blocks.0.processor.qkv_lora{stream}", 12, 4, 2, DOTTED)
        tensors |= pair(f"double_blocks.0.processor.proj_lora{stream}", 4, 4, 2, DOTTED)
    tensors |= pair("single_blocks.0.processor.qkv_lora", 12, 4, 2, DOTTED)
    return tensors | pair("single_blocks.0.processor.proj_lora", 4, 20, 2, DOTTED), {}


def bfl_case() -> tuple[Tensors, dict[str, str]]:
    tensors: Tensors = {}
    for module, out, inner in (("img_in", 4, 6), ("double_blocks.0.img_attn.qkv", 12, 4), ("final_layer.linear", 3, 4)):
        tensors |= pair(module, out, inner, 2, PEFT) | {f"{module}.lora_B.bias": numbers(out)}
    for name in ("double_blocks.0.img_attn.norm.query_norm", "single_blocks.0.norm.key_norm"):
        tensors[f"{name}.scale"] = numbers(2)
    return tensors, {}


def numbered_case() -> tuple[Tensors, dict[str, str]]:
    """cloneofsimo's text encoder: two layers of four projections, and a trained word."""
    tensors: Tensors = {"<s1>": numbers(4)}
    metadata = {"text_encoder": '["CLIPAttention"]', "<s1>": "<embed>"}
    for number in range(8):
        tensors |= {f"text_encoder:{number}:up": numbers(4, 2), f"text_encoder:{number}:down": numbers(2, 4)}
        metadata[f"text_encoder:{number}:rank"] = "2"
    return tensors, metadata


CASES: Mapping[str, Any] = {
    "kohya/lycoris": lycoris_case,
    "kohya/sd15": sd15_case,
    "kohya/odd": odd_kohya_case,
    "comfyui/ai_toolkit": ai_toolkit_case,
    "comfyui/mixed": comfy_case,
    "diffusers/flux": flux_case,
    "diffusers/unet": unet_case,
    "diffusers/dora": lambda: unet_case(use_dora=True),
    "diffusers-old/attn_procs": attn_procs_case,
    "diffusers-old/pipeline": old_pipeline_case,
    "xlabs/flux": xlabs_case,
    "bfl-control/canny": bfl_case,
    "peft-dump/flux": lambda: dump_case(raw=False),
    "peft-dump/memory": lambda: dump_case(raw=True),
    "cloneofsimo/text": numbered_case,
}


def main() -> None:
    logging.disable(logging.CRITICAL)
    for number, (name, make) in enumerate(CASES.items()):
        torch.manual_seed(200 + number)
        with contextlib.redirect_stdout(io.StringIO()):
            tensors, metadata = make()
        path = HERE / f"{name}.safetensors"
        path.parent.mkdir(exist_ok=True)
        tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
        save_file(tensors, path, metadata=metadata or None)
    versions = {m.__name__: m.__version__ for m in (diffusers, peft, safetensors, torch)}
    versions["lycoris-lora"] = "4.1.3"
    (HERE / "diffusion_versions.json").write_text(json.dumps(versions, indent=2) + "\n")


if __name__ == "__main__":
    main()
