"""Every key written for ComfyUI is one that its loader looks up.

ComfyUI (``comfy/lora.py``) takes ``diffusion_model.`` and ``text_encoders.`` before names of its
own base's weights, and ``comfy/weight_adapter/lora.py`` says what may follow. The bases' modules
are written here by hand, as their checkpoints have them.
"""

from __future__ import annotations

import re

import pytest
import torch

from loratools.adapter import Adapter, in_natural_order
from loratools.conversion import convert_value
from loratools.deltas import LayerDelta, LoRA
from loratools.formats import get_format
from loratools.keymaps.architecture import Component, Fused
from loratools.keymaps.lookup import flatten
from loratools.keymaps.registry import ARCHITECTURES
from tests.keymap_cases import expand, part_sizes, shapes
from tests.strategies import make_tensor

BY_ID = {arch.id: arch for arch in ARCHITECTURES}
LEAVES = r"\.(?:lora_[AB]\.weight|alpha)"
N = r"\d+"
MLP = "(?:in_layer|out_layer)"
CLIP_LAYER = (
    rf"text_model\.encoder\.layers\.{N}\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12]|"
    r"layer_norm[12])"
)
CLIP = (
    rf"(?:{CLIP_LAYER}|text_model\.embeddings\.(?:token|position)_embedding|"
    r"text_model\.final_layer_norm|text_projection)"
)
T5 = (
    rf"(?:shared|encoder\.final_layer_norm|encoder\.block\.{N}\.layer\.[01]\."
    r"(?:layer_norm|SelfAttention\.(?:[qkvo]|relative_attention_bias)|"
    r"DenseReluDense\.(?:wi_[01]|wo)))"
)
LLAMA = (
    rf"model\.(?:embed_tokens|norm|layers\.{N}\.(?:self_attn\.(?:[qkvo]_proj|[qk]_norm)|"
    r"mlp\.(?:gate|up|down)_proj|(?:input|post_attention|(?:pre|post)_feedforward)_layernorm))"
)
TRANSFORMER = (
    rf"(?:norm|proj_in|proj_out|transformer_blocks\.{N}\.(?:norm[123]|"
    r"attn[12]\.to_(?:[qkv]|out\.0)|ff\.net\.(?:0\.proj|2)))"
)
RESNET = r"(?:in_layers\.[02]|emb_layers\.1|out_layers\.[03]|skip_connection)"
UNET = (
    rf"(?:(?:input_blocks\.{N}\.{N}|middle_block\.{N}|output_blocks\.{N}\.{N})\."
    rf"(?:{RESNET}|{TRANSFORMER}|op|conv)|input_blocks\.0\.0|time_embed\.[02]|label_emb\.0\.[02]|"
    r"out\.[02])"
)
STREAM = r"(?:img|txt)"
FLUX = (
    rf"(?:double_blocks\.{N}\.{STREAM}_(?:attn\.(?:qkv|proj|norm\.(?:query|key)_norm)|mlp\.[02]|"
    rf"mod\.lin)|single_blocks\.{N}\.(?:linear[12]|modulation\.lin|norm\.(?:query|key)_norm)|"
    rf"img_in|txt_in|(?:time|vector|guidance)_in\.{MLP}|final_layer\.(?:linear|adaLN_modulation\.1))"
)
SD3 = (
    rf"(?:joint_blocks\.{N}\.(?:x|context)_block\.(?:attn2?\.(?:qkv|proj|ln_[qk])|mlp\.fc[12]|"
    r"adaLN_modulation\.1)|[ty]_embedder\.mlp\.[02]|context_embedder|x_embedder\.proj|"
    r"final_layer\.(?:linear|adaLN_modulation\.1))"
)
WAN_BLOCK = (
    r"(?:self_attn\.(?:[qkvo]|norm_[qk])|cross_attn\.(?:[qkvo]|[kv]_img|norm_(?:q|k|k_img))|"
    r"ffn\.[02]|norm3|modulation|before_proj|after_proj)"
)
WAN = (
    rf"(?:(?:vace_)?blocks\.{N}\.{WAN_BLOCK}|(?:vace_|pose_)?patch_embedding|"
    r"(?:text|time)_embedding\.[02]|time_projection\.1|img_emb\.(?:proj\.[0134]|emb_pos)|"
    # Animate and SkyReels-V2
    r"head\.(?:head|modulation)|(?:face|motion)_\w+\..+|fps_embedding|fps_projection\.[02])"
)
QWEN = (
    rf"(?:transformer_blocks\.{N}\.(?:attn\.(?:to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|"
    rf"norm_(?:added_)?[qk])|{STREAM}_mod\.1|{STREAM}_mlp\.net\.(?:0\.proj|2))|img_in|txt_in|"
    r"txt_norm|norm_out\.linear|proj_out|time_text_embed\.(?:timestep_embedder\.linear_[12]|"
    r"addition_t_embedding))"
)
ZIMAGE = (
    rf"(?:(?:layers|noise_refiner|context_refiner)\.{N}\.(?:attention\.(?:qkv|out|[qk]_norm)|"
    r"feed_forward\.w[123]|adaLN_modulation\.0|(?:attention|ffn)_norm[12])|x_embedder|"
    r"cap_embedder\.[01]|t_embedder\.mlp\.[02]|(?:x|cap)_pad_token|"
    r"final_layer\.(?:linear|adaLN_modulation\.1))"
)
CASES = {
    "sdxl": (UNET, {"clip_l": CLIP, "clip_g": CLIP}),
    "flux1": (FLUX, {"clip_l": CLIP, "t5xxl": T5}),
    "sd3": (SD3, {"clip_l": CLIP, "clip_g": CLIP, "t5xxl": T5}),
    "wan": (WAN, {"umt5xxl": T5}),
    "qwen-image": (QWEN, {"qwen25_7b": LLAMA}),
    "z-image": (ZIMAGE, {"qwen3_4b": LLAMA}),
}


def accepted(arch: str) -> re.Pattern[str]:
    denoiser, encoders = CASES[arch]
    ways = [rf"diffusion_model\.{denoiser}"]
    ways += [rf"text_encoders\.{name}\.transformer\.{body}" for name, body in encoders.items()]
    return re.compile(f"(?:{'|'.join(ways)}){LEAVES}")


def layer(rows: int, inputs: int, seed: int) -> LoRA:
    return LoRA(make_tensor(seed, 2, inputs), make_tensor(seed + 1, rows, 2), 1.0)


def kohya_names(component: Component) -> dict[str, int]:
    """Return kohya's modules and their output rows."""
    sizes = {name: shape[0] for name, shape in shapes(component).items()}
    if component.flattens == "diffusers":
        return {flatten(n): rows for n, rows in sizes.items()}
    found: dict[str, int] = {}
    for row in component.rows:
        rows = sum(part_sizes(row)) if isinstance(row, Fused) else sizes[expand(row.parts)[0]]
        found |= dict.fromkeys(map(flatten, expand([row.original])), rows)
    return found


def adapter(arch: str, naming: str) -> Adapter:
    """Return an adapter of every module that the rows know."""
    layers: dict[str, LayerDelta] = {}
    for component in BY_ID[arch].components:
        if naming == "kohya":
            names = {f"{component.kohya[0]}_{n}": r for n, r in kohya_names(component).items()}
        else:
            known = shapes(component).items()
            names = {f"{component.name}.{n}": shape[0] for n, shape in known}
        layers |= {name: layer(rows, 4, seed) for seed, (name, rows) in enumerate(names.items())}
    return Adapter(in_natural_order(layers), naming=naming, arch=arch)


@pytest.mark.parametrize("naming", ["kohya", "diffusers"])
@pytest.mark.parametrize("arch", CASES)
def test_every_key_is_accepted(arch: str, naming: str) -> None:
    comfyui = get_format("comfyui")
    done = convert_value(adapter(arch, naming), comfyui, arch=arch)
    keys = comfyui.write(done.adapter).tensors
    pattern = accepted(arch)
    assert [key for key in keys if not pattern.fullmatch(key)] == []
    assert len(keys) == 3 * len(done.adapter.layers)


def test_alpha_is_written_only_where_it_says_something() -> None:
    comfyui = get_format("comfyui")
    path = "diffusion_model.transformer_blocks.0.attn.to_q"
    down, up = torch.ones(2, 4), torch.ones(4, 2)
    for alpha, leaves in ((2.0, 2), (1.0, 3)):
        bundle = comfyui.write(Adapter({path: LoRA(down, up, alpha)}, naming="comfyui"))
        assert len(bundle.tensors) == leaves


def test_one_change_for_each_weight() -> None:
    """Qkv of Z-Image, given in parts, is one module of ComfyUI's base."""
    parts = ("to_q", "to_k", "to_v")
    layers = {f"transformer.layers.0.attention.{p}": layer(4, 4, n) for n, p in enumerate(parts)}
    source = Adapter(layers, naming="diffusers", arch="z-image")
    done = convert_value(source, get_format("comfyui"), arch="z-image")
    assert list(done.adapter.layers) == ["diffusion_model.layers.0.attention.qkv"]


ENCODERS = {
    # what ComfyUI's models call their text encoders (comfy/text_encoders)
    "sd1": {"clip_l"},
    "sd2": {"clip_h"},
    "sdxl": {"clip_l", "clip_g"},
    "sdxl-refiner": {"clip_g"},
    "flux1": {"clip_l", "t5xxl"},
    "chroma": {"t5xxl"},
    "flux2": set(),
    "flux3": set(),
    "sd3": {"clip_l", "clip_g", "t5xxl"},
    "auraflow": {"pile_t5xl"},
    "z-image": {"qwen3_4b"},
    "lumina2": {"gemma2_2b"},
    "qwen-image": {"qwen25_7b"},
    "qwen-image-2.1": {"qwen3vl_8b"},
    "wan": {"umt5xxl"},
    "hunyuan-video": {"llama", "clip_l"},
    "hunyuan-video-1.5": {"qwen25_7b", "byt5_small"},
    "hunyuan-image-2.1": {"qwen25_7b", "byt5_small"},
    "framepack": {"llama", "clip_l"},
    "anima": {"qwen3_06b"},
    "ltx": {"t5xxl"},
    "ltx2": {"gemma3_12b"},
    "krea2": {"qwen3vl_4b"},
    "ideogram4": {"qwen3vl_8b"},
    "ernie-image": {"ministral3_3b"},
    "minimax-h3": {"qwen3vl_32b"},
    "pixart": {"t5xxl"},
    "sana": {"gemma2_2b"},
    "sana-sprint": {"gemma2_2b"},
    "mochi": {"t5xxl"},
    "hidream": {"clip_l", "clip_g", "t5xxl", "llama"},
}
HOLDS = {"clip": CLIP, "t5": T5, "umt5": T5, "byt5": T5, "pile": T5}


@pytest.mark.parametrize("arch", BY_ID)
def test_text_encoders_are_called_as_in_comfyui(arch: str) -> None:
    found = set()
    for component in BY_ID[arch].components:
        start, _, rest = component.original.partition(".")
        if start != "text_encoders":
            continue
        name = rest.removesuffix(".transformer")
        found.add(name)
        kinds = [body for word, body in HOLDS.items() if name.startswith(word)]
        bodies = expand(row.original for row in component.rows)
        assert [b for b in bodies if not re.fullmatch((kinds or [LLAMA])[0], b)] == []
    assert found == ENCODERS[arch]


@pytest.mark.parametrize(
    ("arch", "name", "module"),
    [
        # Composite models' encoders without their own name; CLIP-L is always the first.
        (
            "ltx2",
            "text_encoders.transformer.model.layers.3.mlp.up_proj",
            "text_encoder.layers.3.mlp.up_proj",
        ),
        (
            "hunyuan-video",
            "lora_te1_text_model_encoder_layers_2_mlp_fc1",
            "text_encoder_2.text_model.encoder.layers.2.mlp.fc1",
        ),
        (
            "hunyuan-video",
            "lora_te1_layers_2_self_attn_q_proj",
            "text_encoder.layers.2.self_attn.q_proj",
        ),
    ],
)
def test_comfyuis_other_names_of_encoders(arch: str, name: str, module: str) -> None:
    source = Adapter({name: layer(4, 4, 0)}, naming="original", arch=arch)
    done = convert_value(source, get_format("diffusers"), arch=arch)
    assert list(done.adapter.layers) == [module]
