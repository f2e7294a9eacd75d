"""Every architecture's names: distinct in each dialect, flattened or not, and read back exactly."""

from __future__ import annotations

import pytest

from loratools.keymaps.architecture import Architecture
from loratools.keymaps.lookup import Lookup, flatten
from loratools.keymaps.registry import ARCHITECTURES
from loratools.keymaps.text_encoders import clip_g
from loratools.keymaps.vocabulary import ComponentNames, Dialect, vocabulary_of
from tests.keymap_cases import all_rows, expand

every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.id)


def dialects(arch: Architecture) -> list[tuple[ComponentNames, Dialect]]:
    return [(names, d) for names in vocabulary_of(arch).components for d in names.dialects]


def test_ids_are_distinct() -> None:
    assert len({arch.id for arch in ARCHITECTURES}) == len(ARCHITECTURES)


@every_architecture
def test_flattening_is_injective(arch: Architecture) -> None:
    for names, dialect in dialects(arch):
        dotted = expand(names.templates(dialect), 3)
        flat = [flatten(name) for name in dotted]
        assert len(set(flat)) == len(dotted), (names.component.name, dialect)


@every_architecture
def test_signature_is_of_its_rows(arch: Architecture) -> None:
    originals = {row.original for row in arch.components[0].rows}
    assert arch.signature
    assert set(arch.signature) <= originals


@every_architecture
@pytest.mark.parametrize("flat", [False, True], ids=["dotted", "flat"])
def test_every_name_is_read_back(arch: Architecture, flat: bool) -> None:
    words = vocabulary_of(arch)
    for component in arch.components:
        prefix = component.kohya[0] + "_" if flat else component.original + "."
        names = expand(part for row in all_rows(component) for part in row.parts)
        paths = {prefix + (flatten(name) if flat else name): name for name in names}
        found = words.resolve(paths, "diffusers")
        assert {p: hit.paths for p, hit in found.items()} == {p: (n,) for p, n in paths.items()}
        assert all(hit.component is component for hit in found.values())


@every_architecture
@pytest.mark.parametrize("flat", [False, True], ids=["dotted", "flat"])
def test_every_original_name_leads_to_its_parts(arch: Architecture, flat: bool) -> None:
    words = vocabulary_of(arch)
    for component in arch.components:
        prefix = component.kohya[0] + "_" if flat else component.original + "."
        wanted: dict[str, tuple[str, ...]] = {}
        for row in component.rows:
            names = expand([row.original])
            for name, *parts in zip(names, *(expand([part]) for part in row.parts), strict=True):
                wanted.setdefault(prefix + (flatten(name) if flat else name), tuple(parts))
        found = words.resolve(wanted, "original")
        assert {path: hit.paths for path, hit in found.items()} == wanted


@pytest.mark.parametrize(
    ("prefix", "dialect"),
    [
        ("lora_unet_", "flat"),
        ("lora_unet__", "flat"),
        ("lycoris_", "flat"),
        ("lora_transformer_", "flat"),
        ("oft_unet_", "flat"),
        ("diffusion_model.", "dotted"),
        ("model.diffusion_model.", "dotted"),
        ("unet.", "dotted"),
        ("", "dotted"),
    ],
)
@pytest.mark.parametrize("block", ["input_blocks.4.1", "down_blocks.1.attentions.0"])
def test_prefixes_of_the_denoiser(prefix: str, dialect: str, block: str) -> None:
    name = f"{block}.transformer_blocks.1.ff.net.0.proj"
    arch = next(arch for arch in ARCHITECTURES if arch.id == "sdxl")
    path = prefix + (flatten(name) if dialect == "flat" else name)
    hit = vocabulary_of(arch).resolve([path])[path]
    assert hit is not None
    assert hit.paths == ("down_blocks.1.attentions.0.transformer_blocks.1.ff.net.0.proj",)


@pytest.mark.parametrize(
    "path",
    [
        "lora_te2_text_model_encoder_layers_3_mlp_fc1",
        "lora_te2_encoder_layers_3_mlp_fc1",
        "text_encoder_2.encoder.layers.3.mlp.fc1",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.3.mlp.fc1",
        "conditioner.embedders.1.model.transformer.resblocks.3.mlp.c_fc",
        "lora_te2_text_model_encoder_layers_3_mlp_fc1_",
    ],
)
def test_text_model_level_is_optional(path: str) -> None:
    arch = next(arch for arch in ARCHITECTURES if arch.id == "sdxl")
    hit = vocabulary_of(arch).resolve([path])[path]
    assert hit is not None
    assert hit.component.name == "text_encoder_2"
    assert hit.paths == ("text_model.encoder.layers.3.mlp.fc1",)


def test_fused_attention_of_open_clip() -> None:
    names = ComponentNames(clip_g())
    hit = names.look_up("transformer.resblocks.7.attn.in_proj_weight", flat=False)["checkpoint"]
    assert [path.rpartition(".")[2] for path in hit.paths] == ["q_proj", "k_proj", "v_proj"]
    assert all(".7." in path for path in hit.paths)


def test_a_templates_own_numbers_win() -> None:
    lookup = Lookup([("a.{i}.b", "any"), ("a.0.b", "first"), ("c.{i}.d.{i}", "twice")])
    assert lookup.find("a.0.b") == ("first", {})
    assert lookup.find("a.12.b") == ("any", {"i": "12"})
    assert lookup.find("c.1.d.1") == ("twice", {"i": "1"})
    assert lookup.find("c.1.d.2") is None
    assert lookup.find("a.x.b") is None


@pytest.mark.parametrize(
    ("arch", "path", "component", "module"),
    [
        # sd-scripts' T5 is te3, OneTrainer's te2; CLIP-L is te1 in both
        ("flux1", "lora_te3_encoder_block_2_layer_0_SelfAttention_q", "text_encoder_2", "q"),
        ("flux1", "lora_te2_encoder_block_2_layer_0_SelfAttention_q", "text_encoder_2", "q"),
        ("flux1", "lora_te1_text_model_encoder_layers_2_mlp_fc1", "text_encoder", "fc1"),
        # OneTrainer counts the text encoders a pipeline has
        ("chroma", "lora_te1_encoder_block_2_layer_1_DenseReluDense_wi_0", "text_encoder", "wi_0"),
        ("sd3", "lora_te2_text_model_encoder_layers_2_mlp_fc1", "text_encoder_2", "fc1"),
        ("sd3", "lora_te3_encoder_block_2_layer_1_DenseReluDense_wo", "text_encoder_3", "wo"),
        ("hunyuan-video", "lora_te1_layers_2_self_attn_q_proj", "text_encoder", "q_proj"),
        ("hunyuan-video", "lora_te2_text_model_encoder_layers_2_mlp_fc2", "text_encoder_2", "fc2"),
        ("anima", "lora_te_layers_2_mlp_down_proj", "text_encoder", "down_proj"),
        ("lumina2", "text_encoder.layers.2.self_attn.o_proj", "text_encoder", "o_proj"),
        ("lumina2", "text_encoder.model.layers.2.self_attn.o_proj", "text_encoder", "o_proj"),
    ],
)  # fmt: skip
def test_text_encoders_are_told_by_their_modules(
    arch: str, path: str, component: str, module: str
) -> None:
    (found,) = (a for a in ARCHITECTURES if a.id == arch)
    hit = vocabulary_of(found).resolve([path])[path]
    assert hit is not None
    assert hit.component.name == component
    assert hit.paths[0].rpartition(".")[2] == module
    assert ".2." in hit.paths[0]
