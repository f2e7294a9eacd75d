"""Rows of the diffusion transformers against diffusers: module names, converters of base weights.

A model is built without memory at its released widths; its weights are replaced by one random
column each, because rows are all that a change of naming moves. The original's state dict is
written by the rows, read by diffusers' converter, and compared. Where diffusers has no converter
for a base (HunyuanVideo 1.5, HunyuanImage, Ideogram, PixArt), the oracle is a table in the tests.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.deltas import LayerDelta, LoRA
from loratools.keymaps.architecture import Component, Fused, Row
from loratools.keymaps.lookup import flatten
from loratools.keymaps.registry import ARCHITECTURES
from loratools.keymaps.translate import translate

pytest.importorskip("diffusers")

BY_ID = {architecture.id: architecture for architecture in ARCHITECTURES}


RMS = "rms_norm_across_heads"


@dataclass(frozen=True)
class Case:
    """One configuration of an architecture.

    Attributes:
        arch: id.
        model: diffusers' class.
        options: its arguments; the rest stands at the released values.
        converter: diffusers' converter of the original's weights: what stands between ``convert_``
            and ``_to_diffusers``.
        dialect: whose rows write the original.
        extra: tensors that the converter demands although nothing can adapt them.
        lost: beginnings of what the converter returns for them.
        unmapped: modules that the rows leave out, as their docstrings say (regular expression).
        component: the network's place in the architecture.
    """

    arch: str
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    converter: str = ""
    dialect: str = "original"
    extra: tuple[str, ...] = ()
    lost: tuple[str, ...] = ()
    unmapped: str = "(?!)"
    component: int = 0

    def __str__(self) -> str:
        return f"{self.arch}-{self.dialect}-{'-'.join(map(str, self.options))}"


TWO = {"num_layers": 2, "num_single_layers": 2}
REFINED = {**TWO, "num_refiner_layers": 2}
WAN = {"num_layers": 2}
I2V = {**WAN, "image_dim": 1280, "added_kv_proj_dim": 5120}
LTX23 = {
    "num_layers": 1, "gated_attn": True, "audio_gated_attn": True, "cross_attn_mod": True,
    "audio_cross_attn_mod": True, "use_keyframes_abs_pos_embedding": True,
}  # fmt: skip
GATED = {"video_gated_attn": True, "audio_gated_attn": True}
COSMOS = {
    "num_layers": 2, "num_attention_heads": 16, "extra_pos_embed_type": None,
    "text_embed_dim": 1024, "adaln_lora_dim": 256,
}  # fmt: skip
HIDREAM = {
    **TWO, "patch_size": 2, "in_channels": 16, "caption_channels": [4096, 4096],
    "llama_layers": [0, 1],
}  # fmt: skip
LUMINA = {"num_layers": 2, "num_refiner_layers": 2}

CASES = (
    Case(
        "flux1",
        "FluxTransformer2DModel",
        {**TWO, "guidance_embeds": True},
        "flux_transformer_checkpoint",
    ),
    Case("flux1", "FluxTransformer2DModel", TWO, "flux_transformer_checkpoint"),
    Case("chroma", "ChromaTransformer2DModel", TWO, "chroma_transformer_checkpoint"),
    Case("flux2", "Flux2Transformer2DModel", TWO, "flux2_transformer_checkpoint"),
    Case(
        "flux3",
        "Flux3Transformer2DModel",
        {**TWO, "flow_map": True},
        "flux3_transformer_checkpoint",
    ),
    Case(
        "sd3",
        "SD3Transformer2DModel",
        {
            "num_layers": 3,
            "num_attention_heads": 24,
            "dual_attention_layers": (0,),
            "qk_norm": "rms_norm",
        },
        "sd3_transformer_checkpoint",
        extra=("pos_embed",),
        lost=("pos_embed.pos_embed",),
    ),
    Case(
        "sd3",
        "SD3Transformer2DModel",
        {"num_layers": 2, "num_attention_heads": 38},
        "sd3_transformer_checkpoint",
        extra=("pos_embed",),
        lost=("pos_embed.pos_embed",),
    ),
    Case(
        "auraflow",
        "AuraFlowTransformer2DModel",
        {"num_mmdit_layers": 2, "num_single_dit_layers": 2},
        "auraflow_transformer_checkpoint",
    ),
    Case(
        "z-image",
        "ZImageTransformer2DModel",
        {"n_layers": 2},
        "z_image_transformer_checkpoint",
        "comfyui",
    ),
    Case("z-image", "ZImageTransformer2DModel", {"n_layers": 2}),
    Case("lumina2", "Lumina2Transformer2DModel", LUMINA, "lumina2"),
    Case(
        "qwen-image",
        "QwenImageTransformer2DModel",
        {"num_layers": 2, "use_additional_t_cond": True},
    ),
    Case(
        "qwen-image-2.1",
        "QwenImage21Transformer2DModel",
        {"num_layers": 2},
        "qwen_image21_transformer_checkpoint",
        "comfyui",
    ),
    Case(
        "qwen-image-2.1",
        "QwenImage21Transformer2DModel",
        {"num_layers": 2},
        "qwen_image21_transformer_checkpoint",
    ),
    Case("wan", "WanTransformer3DModel", WAN, "wan_transformer"),
    Case("wan", "WanTransformer3DModel", {**WAN, "num_attention_heads": 12}, "wan_transformer"),
    Case("wan", "WanTransformer3DModel", I2V, "wan_transformer"),
    Case("wan", "WanTransformer3DModel", {**I2V, "pos_embed_seq_len": 514}),
    Case("wan", "WanVACETransformer3DModel", {**I2V, "vace_layers": [0, 1]}, "wan_transformer"),
    Case(
        "wan",
        "WanAnimateTransformer3DModel",
        {"num_layers": 6},
        "wan_transformer",
        unmapped=r"motion_encoder\..*act_fn",
    ),
    Case("wan", "SkyReelsV2Transformer3DModel", {**WAN, "inject_sample_info": True}),
    Case("hunyuan-video", "HunyuanVideoTransformer3DModel", REFINED, "hunyuan_video_transformer"),
    Case("hunyuan-video", "HunyuanVideoTransformer3DModel", REFINED, dialect="comfyui"),
    Case(
        "framepack",
        "HunyuanVideoFramepackTransformer3DModel",
        {**REFINED, "has_clean_x_embedder": True, "has_image_proj": True},
    ),
    Case(
        "hunyuan-video-1.5",
        "HunyuanVideo15Transformer3DModel",
        {"num_layers": 2, "num_refiner_layers": 2, "use_meanflow": True},
    ),
    Case(
        "hunyuan-video-1.5",
        "HunyuanVideo15Transformer3DModel",
        {"num_layers": 2, "num_refiner_layers": 2},
        dialect="comfyui",
    ),
    Case(
        "hunyuan-image-2.1",
        "HunyuanImageTransformer2DModel",
        {**REFINED, "text_embed_2_dim": 1472, "guidance_embeds": True, "use_meanflow": True},
    ),
    Case(
        "hunyuan-image-2.1",
        "HunyuanImageTransformer2DModel",
        {**REFINED, "text_embed_2_dim": 1472},
        dialect="checkpoint",
    ),
    Case("anima", "CosmosTransformer3DModel", COSMOS, "cosmos_transformer_checkpoint"),
    Case("anima", "AnimaTextConditioner", {"num_layers": 2}, component=1),
    Case("ltx", "LTXVideoTransformer3DModel", {"num_layers": 2}, "ltx_transformer_checkpoint"),
    Case("ltx2", "LTX2VideoTransformer3DModel", {"num_layers": 2}, "ltx2_transformer"),
    Case("ltx2", "LTX2VideoTransformer3DModel", LTX23),
    Case("ltx2", "LTX2TextConnectors", {}, unmapped=r"\w*text_proj_in", component=1),
    Case("ltx2", "LTX2TextConnectors", GATED, unmapped=r"(video|audio)_connector.*", component=2),
    Case(
        "ltx2",
        "LTX2TextConnectors",
        {**GATED, "per_modality_projections": True},
        unmapped=r"\w*text_proj_in",
        component=1,
    ),
    Case(
        "ltx2",
        "LTX2TextConnectors",
        {**GATED, "per_modality_projections": True},
        unmapped=r"(video|audio)_connector.*",
        component=2,
    ),
    Case(
        "krea2",
        "Krea2Transformer2DModel",
        {"num_layers": 2},
        "krea2_transformer_checkpoint",
    ),
    Case("ideogram4", "Ideogram4Transformer2DModel", {"num_layers": 2}),
    Case(
        "ernie-image",
        "ErnieImageTransformer2DModel",
        {"num_layers": 2},
        "ernie_image_transformer_checkpoint",
    ),
    Case(
        "minimax-h3",
        "MiniMaxH3Transformer3DModel",
        {"num_layers": 2},
        "minimax_h3_transformer_checkpoint",
    ),
    Case(
        "pixart",
        "PixArtTransformer2DModel",
        {"num_layers": 2, "caption_channels": 4096, "use_additional_conditions": True},
    ),
    Case(
        "sana",
        "SanaTransformer2DModel",
        {"num_layers": 2},
        "sana_transformer",
        extra=("pos_embed", "y_embedder.y_embedding"),
    ),
    Case("sana", "SanaTransformer2DModel", {"num_layers": 2, "qk_norm": RMS}),
    Case(
        "sana-sprint",
        "SanaTransformer2DModel",
        {"num_layers": 2, "qk_norm": RMS, "guidance_embeds": True},
    ),
    Case("mochi", "MochiTransformer3DModel", {"num_layers": 48}, "mochi_transformer_checkpoint"),
    Case("hidream", "HiDreamImageTransformer2DModel", HIDREAM, "hidream_transformer"),
)

STANDALONE = {"motion_encoder.dec.direction"}
"""Original modules whose weight diffusers holds as a bare parameter."""

Weights = dict[str, Tensor]
Layers = Mapping[str, LayerDelta]


@dataclass(frozen=True)
class Placed:
    """A row at its numbers: the original's name and diffusers' modules."""

    row: Row | Fused
    original: str
    parts: tuple[str, ...]


# ── the model ────────────────────────────────────────────────────────────────────────────────


def shapes_of(case: Case) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the model's parameters; nothing is allocated."""
    import diffusers
    from diffusers.pipelines.ltx2 import connectors

    module = diffusers if hasattr(diffusers, case.model) else connectors
    with torch.device("meta"):
        model = getattr(module, case.model)(**case.options)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def stem(parameter: str) -> str:
    module, _, leaf = parameter.rpartition(".")
    return module if leaf in ("weight", "bias") else parameter


def columns(shapes: Mapping[str, tuple[int, ...]]) -> Weights:
    """Return one random column for each weight; parameters of their own stay as they are."""
    generator = torch.Generator().manual_seed(7)
    whole = {n: s if s[:1] == (1,) or len(s) == 1 else (s[0], 1) for n, s in shapes.items()}
    return {name: torch.rand(shape, generator=generator) for name, shape in whole.items()}


# ── the rows, placed without the engine ──────────────────────────────────────────────────────


def component_of(case: Case) -> Component:
    return BY_ID[case.arch].components[case.component]


def rows_of(component: Component, dialect: str) -> tuple[Row | Fused, ...]:
    """Return a dialect's rows: its own, and the original's for what those do not say."""
    own = {"comfyui": component.comfyui, "checkpoint": component.checkpoint_rows}.get(dialect, ())
    said = {part for row in own for part in row.parts}
    return (*own, *(row for row in component.rows if not said.issuperset(row.parts)))


def pattern(template: str) -> re.Pattern[str]:
    pieces = re.split(r"(\{\w\})", template)
    return re.compile(
        "".join(rf"(?P<{p[1]}>\d+)" if p[:1] == "{" else re.escape(p) for p in pieces)
    )


def place(rows: tuple[Row | Fused, ...], stems: set[str]) -> Iterator[Placed]:
    for row in rows:
        first = pattern(row.parts[0])
        for found in filter(None, map(first.fullmatch, sorted(stems))):
            numbers = found.groupdict()
            parts = tuple(part.format(**numbers) for part in row.parts)
            yield Placed(row, row.original.format(**numbers), parts)


def halves_swapped(tensor: Tensor) -> Tensor:
    first, second = tensor.chunk(2)
    return torch.cat([second, first])


def original_of(case: Case, shapes: Mapping[str, tuple[int, ...]], weights: Weights) -> Weights:
    """Return the original's state dict as the rows say."""
    component = component_of(case)
    result: Weights = {name: torch.zeros(1) for name in case.extra}
    for placed in place(rows_of(component, case.dialect), {stem(name) for name in shapes}):
        for leaf in (".weight", ".bias", ""):
            names = [part + leaf for part in placed.parts]
            if names[0] not in weights:
                continue
            value = torch.cat([weights[name] for name in names])
            if swaps(placed.row, shapes.get(placed.parts[0] + ".weight", ())):
                value = halves_swapped(value)
            if getattr(placed.row, "vectors", 0):
                value = value.flatten()
            result[placed.original + parameter(case, placed, leaf)] = value
    return result


def parameter(case: Case, placed: Placed, leaf: str) -> str:
    """Return what the original calls the module's weight, bias or only parameter."""
    scaled = (placed.row.original + ".scale", placed.row.parts)
    rows = component_of(case).checkpoint_rows
    if case.dialect == "original" and scaled in [(row.original, row.parts) for row in rows]:
        return ".scale"
    return ".weight" if placed.original in STANDALONE else leaf


def swaps(row: Row | Fused, shape: tuple[int, ...]) -> bool:
    order = getattr(row, "order", "same")
    return order == "halves_swapped" or (
        order == "halves_swapped_if_two" and shape[0] == 2 * shape[1]
    )


def part_sizes(row: Fused, total: int, width: int) -> tuple[int, ...]:
    """Return the parts' rows as the record defines them."""
    count = len(row.parts)
    if row.sizes == "equal":
        return (total // count,) * count
    if row.sizes == "inner":
        return (*(width,) * (count - 1), total - width * (count - 1))
    assert row.sizes == "gqa"
    return (width, *((total - width) // (count - 1),) * (count - 1))


# ── tests ────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def shapes(case: Case) -> dict[str, tuple[int, ...]]:
    return shapes_of(case)


def test_every_module_is_reached_by_one_row(case: Case, shapes: dict[str, tuple[int, ...]]) -> None:
    stems = {stem(name) for name in shapes}
    placed = list(place(rows_of(component_of(case), case.dialect), stems))
    reached = Counter(part for found in placed for part in found.parts)
    left_out = {name for name in stems if re.fullmatch(case.unmapped, name)}
    assert stems - reached.keys() == left_out
    assert {name for name, times in reached.items() if times > 1} == set()
    assert reached.keys() - stems == set(), "part of a fused row that the model lacks"
    assert max(Counter(found.original for found in placed).values()) == 1


def test_fused_rows_divide_as_the_model_does(
    case: Case, shapes: dict[str, tuple[int, ...]]
) -> None:
    stems = {stem(name) for name in shapes}
    for placed in place(rows_of(component_of(case), case.dialect), stems):
        if isinstance(placed.row, Fused):
            found = [shapes[part + ".weight"] for part in placed.parts]
            total, width = sum(shape[0] for shape in found), found[0][1]
            sizes = tuple(shape[0] for shape in found)
            assert part_sizes(placed.row, total, width) == sizes, placed.original
            typical = tuple(round(width * share) for share in placed.row.typical)
            assert typical in ((), sizes), placed.original


def test_widths_are_those_of_the_released_model(
    case: Case, shapes: dict[str, tuple[int, ...]]
) -> None:
    stems = {stem(name) for name in shapes}
    for placed in place(rows_of(component_of(case), case.dialect), stems):
        if placed.row.inputs:
            assert shapes[placed.parts[0] + ".weight"][1] in placed.row.inputs, placed.original


@pytest.mark.parametrize("case", [case for case in CASES if case.converter], ids=str)
def test_converter_reads_what_the_rows_write(case: Case) -> None:
    from diffusers.loaders import single_file_utils

    convert = getattr(single_file_utils, f"convert_{case.converter}_to_diffusers")
    options = {"config": {}} if case.arch == "minimax-h3" else {}
    shapes = shapes_of(case)
    weights = columns(shapes)
    converted = convert(original_of(case, shapes, weights), **options)
    found = {
        name: value
        for name, value in converted.items()
        if value is not None and not name.startswith(case.lost or ("\0",))
    }
    expected = {n: w for n, w in weights.items() if not re.fullmatch(case.unmapped, stem(n))}
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []


def test_every_row_is_of_some_configuration() -> None:
    seen: dict[tuple[str, int], set[str]] = {}
    for case in CASES:
        stems = {stem(name) for name in shapes_of(case)}
        rows = rows_of(component_of(case), case.dialect)
        found = seen.setdefault((case.arch, case.component), set())
        found |= {placed.row.original for placed in place(rows, stems)}
    for (arch, number), found in seen.items():
        component = BY_ID[arch].components[number]
        assert {row.original for row in component.rows} - found == set(), arch


# ── adapters: diffusers' converters of LoRAs ─────────────────────────────────────────────────


@dataclass(frozen=True)
class LoraCase:
    """A LoRA in the original's dotted names, given to one of diffusers' converters.

    Attributes:
        case: where its modules come from: a case of ``CASES`` by (id, dialect).
        converter: diffusers' function.
        only: the modules that the LoRA has (regular expression on original names).
        lost: modules that the converter gives no name or a name that the model has not.
        wrong: modules that it changes otherwise than the formula says.
    """

    case: tuple[str, str]
    converter: str
    only: str = ""
    lost: str = "(?!)"
    wrong: str = "(?!)"

    def __str__(self) -> str:
        return "-".join(self.case)


NON_DIFFUSERS = "_convert_non_diffusers_{}_lora_to_diffusers"
LORA_CASES = (
    LoraCase(("anima", "original"), NON_DIFFUSERS.format("anima")),
    LoraCase(("krea2", "original"), NON_DIFFUSERS.format("krea2")),
    LoraCase(("minimax-h3", "original"), NON_DIFFUSERS.format("minimax_h3")),
    LoraCase(("ideogram4", "original"), NON_DIFFUSERS.format("ideogram4"), only=r"layers\."),
    LoraCase(("z-image", "original"), NON_DIFFUSERS.format("z_image")),
    LoraCase(("wan", "original"), NON_DIFFUSERS.format("wan")),
    LoraCase(("ltx2", "original"), NON_DIFFUSERS.format("ltx2")),
    LoraCase(("qwen-image", "original"), NON_DIFFUSERS.format("qwen")),
    LoraCase(("hidream", "original"), NON_DIFFUSERS.format("hidream")),
    LoraCase(
        ("hunyuan-video", "original"),
        "_convert_hunyuan_video_lora_to_diffusers",
        only=r"(?!txt_in)",
        wrong=r"norm_out\.linear",
    ),
    LoraCase(("flux2", "original"), NON_DIFFUSERS.format("flux2"), wrong=r"norm_out\.linear"),
    LoraCase(
        ("flux3", "original"),
        NON_DIFFUSERS.format("flux3"),
        lost=r"(?!.*blocks\.).*",
    ),
    LoraCase(
        ("z-image", "comfyui"),
        NON_DIFFUSERS.format("z_image"),
        lost=r"all_.*|.*\.attention\..*",
    ),
    LoraCase(("ltx", "original"), NON_DIFFUSERS.format("ltxv"), lost=r"proj_in|time_embed\..*"),
)


def lora_of(case: Case) -> dict[str, LoRA]:
    """Return a rank-2 LoRA of every linear layer, by the original's path."""
    shapes, generator = shapes_of(case), torch.Generator().manual_seed(3)
    layers = {}
    for placed in place(rows_of(component_of(case), case.dialect), {stem(n) for n in shapes}):
        found = [shapes.get(part + ".weight", ()) for part in placed.parts]
        if all(len(shape) == 2 for shape in found):
            total, width = sum(shape[0] for shape in found), found[0][1]
            down = torch.rand(2, width, generator=generator)
            up = torch.rand(total, 2, generator=generator)
            layers[f"diffusion_model.{placed.original}"] = LoRA(down, up, alpha=2.0)
    return layers


def written(layers: Mapping[str, LayerDelta], pair: tuple[str, str]) -> Weights:
    state: Weights = {}
    for path, delta in layers.items():
        assert isinstance(delta, LoRA)
        state |= {f"{path}.{pair[0]}.weight": delta.down, f"{path}.{pair[1]}.weight": delta.up}
    return state


def in_diffusers_naming(layers: Mapping[str, LayerDelta], arch: str, naming: str) -> Layers:
    return translate(Adapter(layers, naming=naming), BY_ID[arch], "diffusers").layers


def response(down: Tensor, up: Tensor) -> Tensor:
    """Return ΔW x for a fixed x: two changes with the same responses are one for these sizes."""
    x = torch.linspace(-1, 1, down.shape[1], dtype=torch.float64)
    return up.double() @ (down.double() @ x)


@pytest.mark.parametrize("lora", LORA_CASES, ids=str)
def test_loras_convert_as_in_diffusers_or_better(lora: LoraCase) -> None:
    from diffusers.loaders import lora_conversion_utils

    case = next(case for case in CASES if (case.arch, case.dialect) == lora.case)
    layers = {
        path: delta
        for path, delta in lora_of(case).items()
        if re.match(lora.only, path.removeprefix("diffusion_model."))
    }
    ours = in_diffusers_naming(layers, case.arch, "original")
    convert = getattr(lora_conversion_utils, lora.converter)
    theirs = convert(written(layers, ("lora_A", "lora_B")))
    lost, wrong = set(), set()
    for path, delta in ours.items():
        assert isinstance(delta, LoRA)
        name = path.removeprefix("transformer.")
        body = path if f"{path}.lora_A.weight" in theirs else name
        if f"{body}.lora_A.weight" not in theirs:
            lost.add(name)
        elif not torch.allclose(
            response(theirs[f"{body}.lora_A.weight"], theirs[f"{body}.lora_B.weight"]),
            delta.scale * response(delta.down, delta.up),
        ):
            wrong.add(name)
    names = {path.removeprefix("transformer.") for path in ours}
    assert lost == {name for name in names if re.fullmatch(lora.lost, name)}
    assert wrong == {name for name in names if re.fullmatch(lora.wrong, name)}


@pytest.mark.parametrize("arch", ["flux1", "flux2", "hunyuan-video", "sd3", "auraflow", "mochi"])
def test_final_modulation_is_swapped_in_up_alone(arch: str) -> None:
    case = next(case for case in CASES if case.arch == arch)
    rows = component_of(case).rows
    row = next(row for row in rows if row.parts == ("norm_out.linear",))
    source = {p: d for p, d in lora_of(case).items() if p.endswith(row.original)}
    (delta,) = source.values()
    (found,) = in_diffusers_naming(source, arch, "original").values()
    assert isinstance(found, LoRA)
    assert torch.equal(found.down, delta.down)
    # diffusers' own rule for the base: new W = [scale; shift] of the old, hence also of W + ΔW.
    assert torch.equal(found.up, halves_swapped(delta.up))


def test_sd3_swaps_the_context_modulation_of_the_last_block_alone() -> None:
    case = next(case for case in CASES if case.arch == "sd3")
    source = {
        p: d for p, d in lora_of(case).items() if p.endswith("context_block.adaLN_modulation.1")
    }
    found = in_diffusers_naming(source, "sd3", "original")
    last = len(source) - 1
    for number, (path, delta) in enumerate(source.items()):
        assert isinstance(delta, LoRA), path
        moved = found[f"transformer.transformer_blocks.{number}.norm1_context.linear"]
        assert isinstance(moved, LoRA)
        assert torch.equal(moved.up, halves_swapped(delta.up) if number == last else delta.up)


def test_flux_root_modules_keep_their_component() -> None:
    """diffusers gives them names without ``transformer.``, which its loader then filters out."""
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    case = next(case for case in CASES if case.arch == "flux1")
    roots = re.compile(r"diffusion_model\.(\w+_in(\.\w+)?|final_layer\..*)")
    source = {path: delta for path, delta in lora_of(case).items() if roots.fullmatch(path)}
    kohya = {flatten(p.replace("diffusion_model", "lora_unet")): d for p, d in source.items()}
    theirs = _convert_kohya_flux_lora_to_diffusers(written(kohya, ("lora_down", "lora_up")))
    assert len(kohya) == 10
    assert not any(name.startswith("transformer.") for name in theirs)
    ours = in_diffusers_naming(kohya, "flux1", "kohya")
    expected = {"transformer." + name.rpartition(".lora_")[0] for name in theirs}
    assert ours.keys() == expected


def test_flux_blocks_convert_from_kohya_as_in_diffusers() -> None:
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    case = next(case for case in CASES if case.arch == "flux1")
    source = {p: d for p, d in lora_of(case).items() if "_blocks." in p}
    kohya = {flatten(p.replace("diffusion_model", "lora_unet")): d for p, d in source.items()}
    theirs = _convert_kohya_flux_lora_to_diffusers(written(kohya, ("lora_down", "lora_up")))
    ours = in_diffusers_naming(kohya, "flux1", "kohya")
    assert {name.rpartition(".lora_")[0] for name in theirs} == ours.keys()
    for path, delta in ours.items():
        assert isinstance(delta, LoRA)
        expected = response(theirs[f"{path}.lora_A.weight"], theirs[f"{path}.lora_B.weight"])
        assert torch.allclose(delta.scale * response(delta.down, delta.up), expected), path


def test_wan_lora_of_self_attention_alone_converts() -> None:
    """diffusers' converter of flattened names asks for every module of every block."""
    from diffusers.loaders.lora_conversion_utils import _convert_musubi_wan_lora_to_diffusers

    case = next(case for case in CASES if case.arch == "wan")
    source = {p: d for p, d in lora_of(case).items() if ".self_attn." in p}
    kohya = {flatten(p.replace("diffusion_model", "lora_unet")): d for p, d in source.items()}
    with pytest.raises(KeyError):
        _convert_musubi_wan_lora_to_diffusers(written(kohya, ("lora_down", "lora_up")))
    ours = in_diffusers_naming(kohya, "wan", "kohya")
    leaves = ("to_q", "to_k", "to_v", "to_out.0")
    blocks = range(case.options["num_layers"])
    expected = {f"transformer.blocks.{i}.attn1.{leaf}" for i in blocks for leaf in leaves}
    assert ours.keys() == expected
