"""kohya files, converted for diffusers 0.42, loaded and fused by diffusers into tiny models.

The tables here say by hand which of diffusers' modules each of kohya's stands for. The oracle is
the model's own weight plus alpha/rank · up·down of the kohya file, row blocks placed by the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from loratools.convert import convert_adapter
from tests.strategies import make_tensor

diffusers = pytest.importorskip("diffusers")

BLOCKS = 2
SWAPPED = "swapped: "
"""Marks a module whose two halves of rows stand the other way round in the original."""

Table = Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Case:
    """One pipeline.

    Attributes:
        arch: its id.
        pipeline: diffusers' class.
        model: the class of its transformer, with tiny ``options``.
        table: kohya's module (template) → diffusers' modules that it holds, in order.
    """

    arch: str
    pipeline: str
    model: str
    options: Mapping[str, Any]
    table: Table

    def __str__(self) -> str:
        return self.arch


QKV = ("to_q", "to_k", "to_v")
ADDED = ("add_q_proj", "add_k_proj", "add_v_proj")


def under(prefix: str, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{prefix}.{name}" for name in names)


def one(table: Mapping[str, str]) -> Table:
    return {kohya: (name,) for kohya, name in table.items()}


DOUBLE, SINGLE = "transformer_blocks.{i}", "single_transformer_blocks.{i}"
FLUX: Table = {
    "double_blocks_{i}_img_attn_qkv": under(f"{DOUBLE}.attn", QKV),
    "double_blocks_{i}_txt_attn_qkv": under(f"{DOUBLE}.attn", ADDED),
    "single_blocks_{i}_linear1": (*under(f"{SINGLE}.attn", QKV), f"{SINGLE}.proj_mlp"),
    **one(
        {
            "double_blocks_{i}_img_attn_proj": f"{DOUBLE}.attn.to_out.0",
            "double_blocks_{i}_txt_attn_proj": f"{DOUBLE}.attn.to_add_out",
            "double_blocks_{i}_img_mlp_0": f"{DOUBLE}.ff.net.0.proj",
            "double_blocks_{i}_img_mlp_2": f"{DOUBLE}.ff.net.2",
            "double_blocks_{i}_txt_mlp_0": f"{DOUBLE}.ff_context.net.0.proj",
            "double_blocks_{i}_txt_mlp_2": f"{DOUBLE}.ff_context.net.2",
            "double_blocks_{i}_img_mod_lin": f"{DOUBLE}.norm1.linear",
            "double_blocks_{i}_txt_mod_lin": f"{DOUBLE}.norm1_context.linear",
            "single_blocks_{i}_linear2": f"{SINGLE}.proj_out",
            "single_blocks_{i}_modulation_lin": f"{SINGLE}.norm.linear",
            "img_in": "x_embedder",
            "txt_in": "context_embedder",
            "time_in_in_layer": "time_text_embed.timestep_embedder.linear_1",
            "time_in_out_layer": "time_text_embed.timestep_embedder.linear_2",
            "vector_in_in_layer": "time_text_embed.text_embedder.linear_1",
            "vector_in_out_layer": "time_text_embed.text_embedder.linear_2",
            "guidance_in_in_layer": "time_text_embed.guidance_embedder.linear_1",
            "guidance_in_out_layer": "time_text_embed.guidance_embedder.linear_2",
            "final_layer_linear": "proj_out",
            "final_layer_adaLN_modulation_1": f"{SWAPPED}norm_out.linear",
        }
    ),
}
SD3: Table = {
    "joint_blocks_{i}_x_block_attn_qkv": under(f"{DOUBLE}.attn", QKV),
    "joint_blocks_{i}_context_block_attn_qkv": under(f"{DOUBLE}.attn", ADDED),
    **one(
        {
            "joint_blocks_{i}_x_block_attn_proj": f"{DOUBLE}.attn.to_out.0",
            "joint_blocks_0_context_block_attn_proj": "transformer_blocks.0.attn.to_add_out",
            "joint_blocks_{i}_x_block_mlp_fc1": f"{DOUBLE}.ff.net.0.proj",
            "joint_blocks_{i}_x_block_mlp_fc2": f"{DOUBLE}.ff.net.2",
            "joint_blocks_0_context_block_mlp_fc1": "transformer_blocks.0.ff_context.net.0.proj",
            "joint_blocks_0_context_block_mlp_fc2": "transformer_blocks.0.ff_context.net.2",
            "joint_blocks_{i}_x_block_adaLN_modulation_1": f"{DOUBLE}.norm1.linear",
            "joint_blocks_0_context_block_adaLN_modulation_1": (
                "transformer_blocks.0.norm1_context.linear"
            ),
            # Before the last block's context there are two modulation vectors, and swapped.
            "joint_blocks_1_context_block_adaLN_modulation_1": (
                f"{SWAPPED}transformer_blocks.1.norm1_context.linear"
            ),
            "x_embedder_proj": "pos_embed.proj",
            "context_embedder": "context_embedder",
            "t_embedder_mlp_0": "time_text_embed.timestep_embedder.linear_1",
            "y_embedder_mlp_2": "time_text_embed.text_embedder.linear_2",
            "final_layer_linear": "proj_out",
            "final_layer_adaLN_modulation_1": f"{SWAPPED}norm_out.linear",
        }
    ),
}
BLOCK = "blocks.{i}"
WAN: Table = one(
    {
        **{f"blocks_{{i}}_self_attn_{x}": f"{BLOCK}.attn1.to_{x}" for x in "qkv"},
        **{f"blocks_{{i}}_cross_attn_{x}": f"{BLOCK}.attn2.to_{x}" for x in "qkv"},
        "blocks_{i}_self_attn_o": f"{BLOCK}.attn1.to_out.0",
        "blocks_{i}_cross_attn_o": f"{BLOCK}.attn2.to_out.0",
        "blocks_{i}_cross_attn_k_img": f"{BLOCK}.attn2.add_k_proj",
        "blocks_{i}_cross_attn_v_img": f"{BLOCK}.attn2.add_v_proj",
        "blocks_{i}_ffn_0": f"{BLOCK}.ffn.net.0.proj",
        "blocks_{i}_ffn_2": f"{BLOCK}.ffn.net.2",
        "patch_embedding": "patch_embedding",
        "time_embedding_0": "condition_embedder.time_embedder.linear_1",
        "time_projection_1": "condition_embedder.time_proj",
        "text_embedding_2": "condition_embedder.text_embedder.linear_2",
        "img_emb_proj_1": "condition_embedder.image_embedder.ff.net.0.proj",
        "head_head": "proj_out",
    }
)
QWEN: Table = one(
    {
        name.replace(".", "_"): name
        for name in (
            *under(f"{DOUBLE}.attn", (*QKV, *ADDED, "to_out.0", "to_add_out")),
            *under(DOUBLE, ("img_mod.1", "txt_mod.1", "img_mlp.net.0.proj", "txt_mlp.net.2")),
            *("img_in", "txt_in", "norm_out.linear", "proj_out"),
            "time_text_embed.timestep_embedder.linear_1",
        )
    }
)
STACKS = ("layers", "noise_refiner", "context_refiner")
ZIMAGE: Table = {
    **one(
        {
            f"{stack}_{{i}}_{kohya}": f"{stack}.{{i}}.{name}"
            for stack in STACKS
            for kohya, name in {
                "attention_out": "attention.to_out.0",
                "feed_forward_w1": "feed_forward.w1",
                "feed_forward_w2": "feed_forward.w2",
                "feed_forward_w3": "feed_forward.w3",
            }.items()
        }
    ),
    **{f"{s}_{{i}}_attention_qkv": under(f"{s}.{{i}}.attention", QKV) for s in STACKS},
    "layers_{i}_adaLN_modulation_0": ("layers.{i}.adaLN_modulation.0",),
    "cap_embedder_1": ("cap_embedder.1",),
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer_linear": ("all_final_layer.2-1.linear",),
}
ZIMAGE_SPLIT: Table = one(
    {
        f"{stack}_{{i}}_attention_{part.replace('.', '_')}": f"{stack}.{{i}}.attention.{part}"
        for stack in STACKS
        for part in (*QKV, "to_out.0")
    }
)
LUMINA: Table = {
    **{f"{s}_{{i}}_attention_qkv": under(f"{s}.{{i}}.attn", QKV) for s in STACKS},
    **one(
        {
            f"{stack}_{{i}}_{kohya}": f"{stack}.{{i}}.{name}"
            for stack in STACKS
            for kohya, name in {
                "attention_out": "attn.to_out.0",
                "feed_forward_w1": "feed_forward.linear_1",
                "feed_forward_w2": "feed_forward.linear_2",
                "feed_forward_w3": "feed_forward.linear_3",
            }.items()
        }
    ),
    **one(
        {
            "layers_{i}_adaLN_modulation_1": "layers.{i}.norm1.linear",
            "x_embedder": "x_embedder",
            "cap_embedder_1": "time_caption_embed.caption_embedder.1",
            "t_embedder_mlp_0": "time_caption_embed.timestep_embedder.linear_1",
            "final_layer_linear": "norm_out.linear_2",
            "final_layer_adaLN_modulation_1": "norm_out.linear_1",
        }
    ),
}
TINY_ZIMAGE = {
    "dim": 32, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2, "n_kv_heads": 2,
    "cap_feat_dim": 12, "axes_dims": [4, 6, 6], "axes_lens": [8, 8, 8], "in_channels": 4,
}  # fmt: skip

TINY_FLUX = {
    "in_channels": 4, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "pooled_projection_dim": 20,
    "axes_dims_rope": (2, 2, 4), "guidance_embeds": True,
}  # fmt: skip
TINY_SD3 = {
    "sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8,
    "num_attention_heads": 2, "joint_attention_dim": 12, "caption_projection_dim": 16,
    "pooled_projection_dim": 20, "out_channels": 4, "pos_embed_max_size": 8,
}  # fmt: skip
TINY_WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "text_dim": 16,
    "out_channels": 4, "freq_dim": 16, "ffn_dim": 40, "num_layers": 2, "image_dim": 20,
    "added_kv_proj_dim": 24,
}  # fmt: skip
TINY_QWEN = {
    "in_channels": 8, "out_channels": 2, "num_layers": 2, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 12, "axes_dims_rope": (4, 6, 6),
}  # fmt: skip
TINY_LUMINA = {
    "sample_size": 8, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
    "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 8, "cap_feat_dim": 12,
    "axes_dim_rope": (4, 2, 2), "axes_lens": (8, 8, 8),
}  # fmt: skip
CASES = (
    Case("flux1", "FluxPipeline", "FluxTransformer2DModel", TINY_FLUX, FLUX),
    Case("sd3", "StableDiffusion3Pipeline", "SD3Transformer2DModel", TINY_SD3, SD3),
    Case("wan", "WanPipeline", "WanTransformer3DModel", TINY_WAN, WAN),
    Case("qwen-image", "QwenImagePipeline", "QwenImageTransformer2DModel", TINY_QWEN, QWEN),
    Case("z-image", "ZImagePipeline", "ZImageTransformer2DModel", TINY_ZIMAGE, ZIMAGE),
    Case("z-image", "ZImagePipeline", "ZImageTransformer2DModel", TINY_ZIMAGE, ZIMAGE_SPLIT),
    Case("lumina2", "Lumina2Pipeline", "Lumina2Transformer2DModel", TINY_LUMINA, LUMINA),
)


# ── the kohya file and what it means ─────────────────────────────────────────────────────────


def expanded(table: Table) -> dict[str, tuple[str, ...]]:
    return {
        kohya.format(i=i): tuple(part.format(i=i) for part in parts)
        for kohya, parts in table.items()
        for i in range(BLOCKS if "{i}" in kohya else 1)
    }


def write_kohya(
    path: Path, modules: Mapping[str, tuple[str, ...]], weights: Mapping[str, Tensor], prefix: str
) -> dict[str, Tensor]:
    """Write LoRAs of mixed ranks and alphas; return ΔW by diffusers' weight."""
    tensors: dict[str, Tensor] = {}
    changes: dict[str, Tensor] = {}
    for seed, (module, marked) in enumerate(modules.items()):
        parts = [part.removeprefix(SWAPPED) + ".weight" for part in marked]
        rows = [weights[part].shape[0] for part in parts]
        inner, *kernel = weights[parts[0]].shape[1:]
        rank, alpha = 1 + seed % 4, (0.5, 1.0, 2.0, 7.0, 3.0)[seed % 5]
        down = make_tensor(seed, rank, inner, *kernel)
        up = make_tensor(seed + 1000, sum(rows), rank, *[1 for _ in kernel])
        name = f"{prefix}_{module}"
        tensors |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
        tensors[f"{name}.alpha"] = torch.tensor(alpha)
        change = up.double().flatten(1) @ down.double().flatten(1) * (alpha / rank)
        if marked[0].startswith(SWAPPED):
            change = change.roll(len(change) // 2, 0)
        for part, block in zip(parts, change.split(rows), strict=True):
            changes[part] = block.reshape(weights[part].shape)
    save_file(tensors, path)
    return changes


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_fused(
    model: nn.Module, before: Mapping[str, Tensor], changes: Mapping[str, Tensor]
) -> None:
    """Assert that the model's weights are the old ones plus the changes, and no others moved."""
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert changes.keys() <= before.keys()
    for name, tensor in after.items():
        if name in changes:
            exact = before[name].double() + changes[name]
            torch.testing.assert_close(tensor.double(), exact, rtol=1e-5, atol=1e-5, msg=name)
        else:
            assert torch.equal(tensor, before[name]), name


def pipeline_of(name: str, **models: nn.Module) -> Any:
    """Return a pipeline that has these models and nothing else."""
    made = getattr(diffusers, name)
    slots, _ = made._get_signature_keys(made)
    return made(**(dict.fromkeys(slots) | models))


@pytest.fixture
def unhandled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Collect the keys that diffusers would only warn about."""
    found: list[str] = []

    def record(incompatible: Any, adapter_name: str) -> None:
        if incompatible is not None:
            found.extend(incompatible.unexpected_keys)
            found.extend(k for k in incompatible.missing_keys if "lora_" in k and adapter_name in k)

    monkeypatch.setattr("diffusers.loaders.peft._maybe_warn_for_unhandled_keys", record)
    yield found
    assert found == []


def load_and_fuse(pipeline: Any, path: Path, components: list[str]) -> None:
    pipeline.load_lora_weights(path)
    pipeline.fuse_lora(components=components)
    pipeline.unload_lora_weights()


def tiny(case: Case) -> nn.Module:
    torch.manual_seed(0)
    made: Callable[..., nn.Module] = getattr(diffusers, case.model)
    return made(**case.options)


# ── tests ────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("share", ["every module", "two thirds"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_transformer(case: Case, share: str, tmp_path: Path, unhandled: list[str]) -> None:
    model = tiny(case)
    before = weights_of(model)
    modules = expanded(case.table)
    if share == "two thirds":
        modules = dict(item for n, item in enumerate(modules.items()) if n % 3 != 1)
    changes = write_kohya(tmp_path / "kohya.safetensors", modules, before, "lora_unet")
    output = tmp_path / "pytorch_lora_weights.safetensors"
    report = convert_adapter(tmp_path / "kohya.safetensors", output, to="diffusers", arch=case.arch)
    assert report.facts["modules_written"] == len(changes)
    load_and_fuse(pipeline_of(case.pipeline, transformer=model), output, ["transformer"])
    assert_fused(model, before, changes)


SELF_ATTENTION = {f"blocks_0_self_attn_{x}": (f"blocks.0.attn1.to_{x}",) for x in "qkv"}
CROSS_ATTENTION = {f"blocks_0_cross_attn_{x}": (f"blocks.0.attn2.to_{x}",) for x in "qkv"}


def test_wan_text_adapter_into_image_model(tmp_path: Path, unhandled: list[str]) -> None:
    """Without the image's projections, which diffusers adds as zeros."""
    (case,) = (case for case in CASES if case.arch == "wan")
    model = tiny(case)
    before = weights_of(model)
    changes = write_kohya(tmp_path / "a.safetensors", SELF_ATTENTION, before, "lora_unet")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    load_and_fuse(
        pipeline_of(case.pipeline, transformer=model), tmp_path / "b.safetensors", ["transformer"]
    )
    assert_fused(model, before, changes)


# PEFT remarks on words about modules that the model lacks, or that diffusers added.
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("image", [True, False])
def test_wan_text_adapter_of_mixed_ranks(image: bool, tmp_path: Path, unhandled: list[str]) -> None:
    """Into an image model too, where diffusers adds zeros of the rank of to_k beside them."""
    (case,) = (case for case in CASES if case.arch == "wan")
    if not image:
        case = replace(case, options={**case.options, "image_dim": None, "added_kv_proj_dim": None})
    model = tiny(case)
    assert (model.config.image_dim is not None) == image
    before = weights_of(model)
    modules = {**SELF_ATTENTION, **CROSS_ATTENTION}
    changes = write_kohya(tmp_path / "a.safetensors", modules, before, "lora_unet")
    convert_adapter(tmp_path / "a.safetensors", tmp_path / "b.safetensors", to="diffusers")
    load_and_fuse(
        pipeline_of(case.pipeline, transformer=model), tmp_path / "b.safetensors", ["transformer"]
    )
    assert_fused(model, before, changes)


UNET = {
    "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
    ),
    "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
    ),
    "down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_out_0": (
        "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_out.0",
    ),
    "down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj": (
        "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    ),
    "down_blocks_0_attentions_0_proj_in": ("down_blocks.0.attentions.0.proj_in",),
    "down_blocks_0_resnets_0_conv1": ("down_blocks.0.resnets.0.conv1",),
    "down_blocks_0_resnets_0_time_emb_proj": ("down_blocks.0.resnets.0.time_emb_proj",),
    "down_blocks_0_downsamplers_0_conv": ("down_blocks.0.downsamplers.0.conv",),
    "mid_block_resnets_1_conv2": ("mid_block.resnets.1.conv2",),
    "up_blocks_3_attentions_1_transformer_blocks_0_attn1_to_v": (
        "up_blocks.3.attentions.1.transformer_blocks.0.attn1.to_v",
    ),
    "conv_in": ("conv_in",),
    "time_embedding_linear_1": ("time_embedding.linear_1",),
}
CLIP = ("self_attn.q_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")


def tiny_stable_diffusion() -> tuple[nn.Module, nn.Module]:
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        block_out_channels=(4, 4, 8, 8), layers_per_block=2, norm_num_groups=2,
        cross_attention_dim=8, attention_head_dim=2,
    )  # fmt: skip
    text = CLIPTextConfig(
        hidden_size=8, intermediate_size=12, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=20,
    )  # fmt: skip
    return unet, CLIPTextModel(text)


def test_stable_diffusion(tmp_path: Path, unhandled: list[str]) -> None:
    """A U-Net with convolutions and its text encoder, in one file."""
    unet, text = tiny_stable_diffusion()
    before, before_text = weights_of(unet), weights_of(text)
    changes = write_kohya(tmp_path / "unet.safetensors", UNET, before, "lora_unet")
    # transformers' newer CLIP has dropped the level text_model, which kohya's names have.
    level = "text_model." if any(name.startswith("text_model.") for name in before_text) else ""
    modules = {
        f"text_model_encoder_layers_{i}_{leaf.replace('.', '_')}": (
            f"{level}encoder.layers.{i}.{leaf}",
        )
        for i in range(2)
        for leaf in CLIP
    }
    changes_text = write_kohya(tmp_path / "te.safetensors", modules, before_text, "lora_te")
    both = joined(tmp_path / "unet.safetensors", tmp_path / "te.safetensors")
    output = tmp_path / "pytorch_lora_weights.safetensors"
    convert_adapter(both, output, to="diffusers", arch="sd1")
    pipeline = pipeline_of("StableDiffusionPipeline", unet=unet, text_encoder=text)
    load_and_fuse(pipeline, output, ["unet", "text_encoder"])
    assert_fused(unet, before, changes)
    assert_fused(text, before_text, changes_text)


def joined(*files: Path) -> Path:
    from safetensors.torch import load_file

    output = files[0].with_name("joined.safetensors")
    save_file({key: tensor for file in files for key, tensor in load_file(file).items()}, output)
    return output
