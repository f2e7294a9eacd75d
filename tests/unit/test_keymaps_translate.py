"""Renaming with its layout steps, against concatenations and permutations of dense matrices."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch

from loratools.adapter import Adapter
from loratools.deltas import FullDelta, LayerDelta, LoRA, Replacement
from loratools.errors import MatchError, UnsupportedError
from loratools.keymaps.architecture import Architecture, Component, Fused, Row
from loratools.keymaps.translate import Naming, find_architecture, translate
from loratools.keymaps.vocabulary import is_stored_transposed
from tests.keymap_cases import lora, whole

QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
SMALL = Architecture(
    id="small",
    title="Small",
    components=(
        Component(
            name="transformer",
            original="diffusion_model",
            checkpoint=("net.", ""),
            kohya=("lora_unet",),
            rows=(
                Fused("blocks.{i}.qkv", tuple(f"layers.{{i}}.{part}" for part in QKV)),
                Fused(
                    "blocks.{i}.linear1",
                    ("layers.{i}.one.q", "layers.{i}.one.k", "layers.{i}.one.mlp"),
                    "inner",
                    typical=(1, 1, 4),
                ),
                Fused("blocks.{i}.gqa", ("layers.{i}.g.q", "layers.{i}.g.k"), "gqa"),
                Fused("blocks.{i}.fixed", ("layers.{i}.f.a", "layers.{i}.f.b"), (1, 5)),
                Row("blocks.{i}.ada", "layers.{i}.norm.linear", "halves_swapped"),
                Row("blocks.{i}.mod", "layers.{i}.mod", "halves_swapped_if_two"),
                Row("blocks.{i}.norm", "layers.{i}.norm"),
                Row("same", "same"),
                Row("norm2", "norm3"),
                Row("norm3", "norm2"),
                Row("only.ours", "only.theirs"),
            ),
            comfyui=(
                Row("blocks.{i}.q", "layers.{i}.attn.to_q"),
                Fused("blocks.{i}.kv", ("layers.{i}.attn.to_k", "layers.{i}.attn.to_v")),
            ),
            checkpoint_rows=(Row("blocks.{i}.norm.scale", "layers.{i}.norm"),),
        ),
    ),
    signature=("same",),
)


def given(naming: str, **layers: LayerDelta) -> Adapter:
    return Adapter({name.replace("__", "."): d for name, d in layers.items()}, naming=naming)


def change(adapter: Adapter, path: str) -> torch.Tensor:
    delta = adapter.layers[path]
    assert isinstance(delta, LoRA)
    return delta.scale * (delta.up.double() @ delta.down.double())


def dense(delta: LoRA) -> torch.Tensor:
    return delta.scale * (delta.up.double() @ delta.down.double())


# ── fused projections ────────────────────────────────────────────────────────────────────────


def test_fused_becomes_consecutive_rows() -> None:
    whole_delta = lora(1, 12, 4, rank=3, alpha=6.0)
    result = translate(given("kohya", lora_unet_blocks_7_qkv=whole_delta), SMALL, "diffusers")
    assert list(result.layers) == [f"transformer.layers.7.{part}" for part in sorted(QKV)]
    parts = [change(result, f"transformer.layers.7.{part}") for part in QKV]
    torch.testing.assert_close(torch.cat(parts), dense(whole_delta))


@pytest.mark.parametrize("naming", ["original", "kohya"])
def test_split_parts_of_other_ranks_and_scales_are_stacked(naming: Naming) -> None:
    q, v = lora(1, 6, 4, rank=1, alpha=2.0), lora(5, 6, 4, rank=3, alpha=0.5)
    adapter = Adapter(
        {"transformer.layers.0.attn.to_q": q, "transformer.layers.0.attn.to_v": v},
        naming="diffusers",
    )
    result = translate(adapter, SMALL, naming)
    (path,) = result.layers
    assert (
        path
        == {"original": "diffusion_model.blocks.0.qkv", "kohya": "lora_unet_blocks_0_qkv"}[naming]
    )
    stacked = torch.cat([dense(q), torch.zeros(6, 4, dtype=torch.float64), dense(v)])
    torch.testing.assert_close(change(result, path), stacked, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("original", "total", "sizes"),
    [("linear1", 20, (4, 4, 12)), ("gqa", 10, (4, 6)), ("fixed", 6, (1, 5)), ("qkv", 9, (3, 3, 3))],
)
def test_sizes_follow_the_rule(original: str, total: int, sizes: tuple[int, ...]) -> None:
    adapter = Adapter(
        {f"diffusion_model.blocks.0.{original}": lora(1, total, 4)}, naming="original"
    )
    result = translate(adapter, SMALL, "diffusers")
    found = {path: delta.weight_shape[0] for path, delta in result.layers.items()}
    row = next(row for row in SMALL.components[0].rows if row.original.endswith(original))
    assert found == {
        f"transformer.{part.replace('{i}', '0')}": size
        for part, size in zip(row.parts, sizes, strict=True)
    }


def test_rows_that_do_not_divide_are_refused() -> None:
    adapter = Adapter({"diffusion_model.blocks.0.qkv": lora(1, 10, 4)}, naming="original")
    with pytest.raises(MatchError, match=r"diffusion_model\.blocks\.0\.qkv: 10 rows"):
        translate(adapter, SMALL, "diffusers")


def test_missing_part_is_sized_by_base_then_sibling_then_released_models() -> None:
    q = given("diffusers", transformer__layers__0__one__q=lora(1, 4, 4))
    typical = translate(q, SMALL, "original")
    assert typical.layers["diffusion_model.blocks.0.linear1"].weight_shape == (24, 4)
    assert any("(4, 4, 16)" in note for note in typical.notes)
    sibling = replace(
        q,
        layers={
            **q.layers,
            **{
                f"transformer.layers.1.one.{part}": lora(9, rows, 4)
                for part, rows in (("q", 4), ("k", 4), ("mlp", 10))
            },
        },
    )
    told = translate(sibling, SMALL, "original")
    assert told.layers["diffusion_model.blocks.0.linear1"].weight_shape == (18, 4)
    base = translate(q, SMALL, "original", shapes={"net.blocks.0.linear1.weight": (15, 4)})
    assert base.layers["diffusion_model.blocks.0.linear1"].weight_shape == (15, 4)
    assert told.notes == base.notes == ()


def test_missing_part_of_unknown_size_is_refused() -> None:
    adapter = given("diffusers", transformer__layers__0__g__q=lora(1, 4, 4))
    with pytest.raises(UnsupportedError, match=r"layers\.\{i\}\.g\.k") as raised:
        translate(adapter, SMALL, "original")
    assert "base" in (raised.value.hint or "")
    base = translate(adapter, SMALL, "original", shapes={"blocks.0.gqa.weight": (7, 4)})
    assert base.layers["diffusion_model.blocks.0.gqa"].weight_shape == (7, 4)


def test_same_fusion_on_both_sides_stays_whole() -> None:
    delta = lora(1, 12, 4)
    result = translate(given("kohya", lora_unet_blocks_0_qkv=delta), SMALL, "original")
    assert result.layers["diffusion_model.blocks.0.qkv"] is delta


def test_other_fusion_of_comfyui() -> None:
    delta = lora(1, 12, 4)
    adapter = given("kohya", lora_unet_blocks_0_qkv=delta, lora_unet_same=lora(5, 2, 2))
    result = translate(adapter, SMALL, "comfyui")
    start = "diffusion_model.blocks.0."
    assert set(result.layers) == {start + "q", start + "kv", "diffusion_model.same"}
    rows = torch.cat([change(result, start + "q"), change(result, start + "kv")])
    torch.testing.assert_close(rows, dense(delta))
    back = translate(result, SMALL, "kohya")
    torch.testing.assert_close(change(back, "lora_unet_blocks_0_qkv"), dense(delta))


# ── swapped halves ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("module", "rows", "swapped"),
    [("ada", 8, True), ("ada", 6, True), ("mod", 8, True), ("mod", 24, False), ("norm", 8, False)],
)
def test_halves_are_swapped_on_the_output_side_alone(module: str, rows: int, swapped: bool) -> None:
    delta = lora(1, rows, 4)
    adapter = Adapter({f"diffusion_model.blocks.0.{module}": delta}, naming="original")
    (result,) = translate(adapter, SMALL, "diffusers").layers.values()
    assert isinstance(result, LoRA)
    first, second = dense(delta).chunk(2)
    wanted = torch.cat([second, first] if swapped else [first, second])
    torch.testing.assert_close(dense(result), wanted)
    assert result.down is delta.down


def test_swap_on_both_sides_is_none() -> None:
    delta = lora(1, 8, 4)
    result = translate(given("kohya", lora_unet_blocks_0_ada=delta), SMALL, "original")
    assert result.layers["diffusion_model.blocks.0.ada"] is delta


# ── names ────────────────────────────────────────────────────────────────────────────────────


def test_one_spelling_throughout_a_file() -> None:
    # As in Wan, each of two names is the other's in diffusers: the rest of the file tells which.
    delta = lora(1, 4, 4)
    ours = {"norm2": delta, "blocks.0.mod": delta, "only.ours": delta}
    theirs = {"norm2": delta, "layers.0.mod": delta, "only.theirs": delta}
    shared = ("transformer.layers.0.mod", "transformer.only.theirs")
    for naming in ("original", "diffusers"):
        result = translate(Adapter(ours, naming=naming), SMALL, "diffusers")
        assert set(result.layers) == {*shared, "transformer.norm3"}
        result = translate(Adapter(theirs, naming=naming), SMALL, "diffusers")
        assert set(result.layers) == {*shared, "transformer.norm2"}


@pytest.mark.parametrize("naming", ["diffusers", "original", "kohya", "comfyui"])
def test_all_unknown_modules_are_listed_with_the_nearest(naming: Naming) -> None:
    unknown = [f"lora_unet_blocks_{i}_qkvv" for i in range(30)]
    layers = {name: lora(1, 3, 3) for name in (*unknown, "lora_unet_same")}
    with pytest.raises(MatchError) as raised:
        translate(Adapter(layers, naming="kohya"), SMALL, naming)
    assert "30 modules" in raised.value.message
    assert all(name in raised.value.message for name in unknown)
    assert "lora_unet_blocks_11_qkvv (nearest: lora_unet_blocks_11_qkv" in raised.value.message
    assert "lora_unet_same" not in raised.value.message


def test_copies_are_kept_once_and_contradictions_refused() -> None:
    fused = lora(1, 12, 4)
    parts = {
        f"diffusion_model.layers.0.{part}": LoRA(
            fused.down, fused.up[4 * i : 4 * i + 4], fused.alpha
        )
        for i, part in enumerate(QKV)
    }
    both = {"diffusion_model.blocks.0.qkv": fused, **parts}
    result = translate(Adapter(both, naming="original"), SMALL, "original")
    assert list(result.layers) == ["diffusion_model.blocks.0.qkv"]
    torch.testing.assert_close(change(result, "diffusion_model.blocks.0.qkv"), dense(fused))
    assert sum("kept once" in note for note in result.notes) == 3
    both["diffusion_model.layers.0.attn.to_k"] = lora(3, 4, 4)
    with pytest.raises(MatchError, match="differently"):
        translate(Adapter(both, naming="original"), SMALL, "original")


def test_modules_that_only_the_base_knows() -> None:
    adapter = given("kohya", lora_unet_new_thing_0=lora(1, 3, 3), lora_unet_same=lora(1, 3, 3))
    base = {"net.new.thing.0.weight", "net.same.weight", "net.blocks.0.qkv.weight"}
    with pytest.raises(MatchError, match="lora_unet_new_thing_0"):
        translate(adapter, SMALL, "original")
    result = translate(adapter, SMALL, "original", vocabulary=base)
    assert set(result.layers) == {"diffusion_model.new.thing.0", "diffusion_model.same"}
    stored = translate(adapter, SMALL, "checkpoint", vocabulary=base)
    assert set(stored.layers) == {"net.new.thing.0", "net.same"}
    with pytest.raises(MatchError, match="lora_unet_new_thing_0"):
        translate(adapter, SMALL, "diffusers", vocabulary=base)


# ── the names of a base ──────────────────────────────────────────────────────────────────────


def test_checkpoint_names_of_a_single_file() -> None:
    sdxl = find_architecture("sdxl")
    layer = "text_model.encoder.layers.3."
    parts = {f"{layer}self_attn.{p}_proj": lora(i, 1280, 1280, 1) for i, p in enumerate("qkv")}
    adapter = Adapter(
        {
            "unet.down_blocks.1.resnets.0.conv1": lora(7, 3, 3),
            f"text_encoder.{layer}mlp.fc1": lora(8, 3, 3),
            f"text_encoder_2.{layer}mlp.fc2": lora(9, 3, 3),
            "text_encoder_2.text_projection": lora(9, 3, 3),
            **{f"text_encoder_2.{name}": delta for name, delta in parts.items()},
        },
        naming="diffusers",
    )
    unet = "model.diffusion_model.input_blocks.4.0.in_layers.2"
    one = "conditioner.embedders.0.transformer.text_model.encoder.layers.3.mlp.fc1"
    two = "conditioner.embedders.1.model."
    block = two + "transformer.resblocks.3."
    base = {
        f"{unet}.weight",
        f"{one}.weight",
        f"{block}mlp.c_proj.weight",
        f"{block}attn.in_proj_weight",
        f"{block}attn.in_proj_bias",
        f"{two}text_projection",
    }
    result = translate(adapter, sdxl, "checkpoint", vocabulary=base)
    assert set(result.layers) == {
        unet, one, f"{block}mlp.c_proj", f"{block}attn.in_proj_weight", f"{two}text_projection",
    }  # fmt: skip
    stacked = torch.cat([dense(delta) for delta in parts.values()])
    torch.testing.assert_close(
        change(result, f"{block}attn.in_proj_weight"), stacked, rtol=1e-5, atol=1e-6
    )
    assert is_stored_transposed(sdxl, f"{two}text_projection")
    assert not is_stored_transposed(sdxl, f"{block}mlp.c_proj.weight")


def test_base_without_the_text_model_level() -> None:
    sd1 = find_architecture("sd1")
    adapter = given("kohya", lora_te_text_model_encoder_layers_0_mlp_fc1=lora(1, 3, 3))
    stem = "cond_stage_model.transformer.encoder.layers.0.mlp.fc1"
    result = translate(adapter, sd1, "checkpoint", vocabulary={f"{stem}.weight"})
    assert list(result.layers) == [stem]


def test_kohya_flattens_ldm_names_for_sdxl_and_diffusers_names_for_sd1() -> None:
    path = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    adapter = Adapter({path: lora(1, 4, 4)}, naming="diffusers")
    flat = {
        arch: next(iter(translate(adapter, find_architecture(arch), "kohya").layers))
        for arch in ("sd1", "sd2", "sdxl", "sdxl-refiner")
    }
    ours = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    ldm = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    assert flat == {"sd1": ours, "sd2": ours, "sdxl": ldm, "sdxl-refiner": ldm}


# ── full tensors ─────────────────────────────────────────────────────────────────────────────


def test_full_tensors_are_renamed_with_their_rows() -> None:
    bias = torch.arange(12.0)
    ada = torch.arange(8.0).reshape(8, 1)
    extras = {
        "diffusion_model.blocks.0.norm.scale": Replacement(torch.ones(4)),
        "diffusion_model.blocks.0.qkv.bias": Replacement(bias),
        "diffusion_model.blocks.0.ada.weight": Replacement(ada),
        "bundle_emb.word.string_to_param.*": Replacement(torch.ones(2, 3)),
    }
    adapter = Adapter({}, extras=extras, naming="original")
    there = translate(adapter, SMALL, "diffusers")
    start = "transformer.layers.0."
    assert set(there.extras) == {
        "bundle_emb.word.string_to_param.*",
        f"{start}norm.weight",
        f"{start}norm.linear.weight",
        *(f"{start}{part}.bias" for part in QKV),
    }
    values = {name: next(iter(extra.tensors().values())) for name, extra in there.extras.items()}
    assert values[f"{start}attn.to_k.bias"].tolist() == [4, 5, 6, 7]
    assert values[f"{start}norm.linear.weight"].flatten().tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    back = translate(there, SMALL, "original")
    assert set(back.extras) == set(extras)
    for name, extra in back.extras.items():
        assert torch.equal(next(iter(extra.tensors().values())), extras[name].value), name


def test_vectors_end_to_end_are_a_table_in_diffusers() -> None:
    krea = find_architecture("krea2")
    vector, table = torch.arange(24.0), torch.arange(24.0).reshape(6, 4)
    ours, theirs = "blocks.3.mod.lin", "transformer.transformer_blocks.3.scale_shift_table"
    adapter = Adapter({f"diffusion_model.{ours}": FullDelta(vector, None)}, naming="original")
    there = translate(adapter, krea, "diffusers")
    assert torch.equal(there.layers[theirs].tensors()["weight"], table)
    for naming, name in (
        ("comfyui", f"diffusion_model.{ours}"),
        ("kohya", "lora_unet_blocks_3_mod_lin"),
    ):
        back = translate(there, krea, naming).layers[name]
        assert torch.equal(back.tensors()["weight"], vector)
    base = {f"model.diffusion_model.{ours}": (24,)}
    merged = translate(there, krea, "checkpoint", shapes=base).layers
    assert torch.equal(merged[f"model.diffusion_model.{ours}"].tensors()["weight"], vector)
    odd = replace(adapter, layers={f"diffusion_model.{ours}": FullDelta(vector[:23], None)})
    with pytest.raises(MatchError, match="are not 6 vectors"):
        translate(odd, krea, "diffusers")


def test_a_replaced_projection_of_open_clip_is_turned() -> None:
    """The checkpoint's own parameter is (in, out); diffusers' is a linear layer's weight."""
    sdxl = find_architecture("sdxl")
    weight = torch.arange(6.0).reshape(2, 3)
    name = "text_encoder_2.text_projection.weight"
    adapter = Adapter({}, extras={name: Replacement(weight)}, naming="diffusers")
    theirs = "conditioner.embedders.1.model.text_projection"
    block = "conditioner.embedders.1.model.transformer.resblocks.0."
    base = {theirs: (3, 2), f"{block}mlp.c_fc.weight": (12, 3), f"{block}ln_1.weight": (3,)}
    there = translate(adapter, sdxl, "checkpoint", shapes=base)
    assert torch.equal(there.extras[theirs].tensors()["value"], weight.T)
    plain = "text_encoders.clip_g.transformer.text_projection.weight"
    comfy = translate(adapter, sdxl, "comfyui").extras
    assert torch.equal(comfy[plain].tensors()["value"], weight)


def test_unknown_full_tensors_are_refused() -> None:
    adapter = Adapter({}, extras={"strange.weight": Replacement(torch.ones(1))}, naming="original")
    with pytest.raises(MatchError, match=r"strange\.weight"):
        translate(adapter, SMALL, "diffusers")


# ── speed ────────────────────────────────────────────────────────────────────────────────────


def test_two_thousand_modules_take_a_fraction_of_a_second() -> None:
    flux = find_architecture("flux1")
    layers: dict[str, LayerDelta] = {}
    delta = lora(1, 4, 4)
    for block in range(250):
        for leaf in (
            "img_mlp.0",
            "img_mlp.2",
            "txt_mlp.0",
            "txt_mlp.2",
            "img_attn.proj",
            "txt_attn.proj",
            "img_mod.lin",
            "txt_mod.lin",
        ):
            layers[f"diffusion_model.double_blocks.{block}.{leaf}"] = delta
    adapter = Adapter(layers, naming="original")
    translate(whole(flux, "kohya"), flux, "kohya")  # compile
    start = time.perf_counter()
    result = translate(adapter, flux, "kohya")
    assert len(result.layers) == 2000
    # 0.06 s here; the limit leaves room for a busy machine.
    assert time.perf_counter() - start < 1.0
