"""Merging into quantised checkpoints: in 16 bits, and again in every scheme."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.codecs.bnb4_weight import quantise_bnb4
from loratools.codecs.ggml import GGML_TYPES
from loratools.codecs.ggml_grids import GGML_GRIDS
from loratools.codecs.mlx_affine import quantise_mlx
from loratools.codecs.packed import PackedWeight
from loratools.errors import CorruptFileError, MatchError, OptionError, UnsupportedError
from loratools.merge import merge_into_base, unmerge_from_base
from loratools.quantize import dequantize_base
from loratools.streaming import blocks
from loratools.tensorfiles.gguf import read_gguf_header
from loratools.tensorfiles.gguf_tensors import block_entry
from loratools.tensorfiles.gguf_writing import save_gguf

from ..gguf_models import words
from .packed.checkpoints import ENTRIES, OTHER, TOUCHED, Base, write_adapter, write_base


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def written(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def config(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


# ── in 16 bits ──


@pytest.mark.parametrize("name", list(ENTRIES))
def test_the_default_is_the_dequantised_sum(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", name)
    change = write_adapter(tmp_path / "adapter", base)
    report = merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out")
    found = written(tmp_path / "out")
    modules = {f"{TOUCHED}.weight", f"{OTHER}.weight", "model.norm.weight"}
    assert found.keys() == modules
    exact = {"rtol": 2**-10, "atol": 1e-7}
    wanted = base.dense(TOUCHED) + change
    torch.testing.assert_close(found[f"{TOUCHED}.weight"].double(), wanted, **exact)
    torch.testing.assert_close(found[f"{OTHER}.weight"].double(), base.dense(OTHER), **exact)
    norm = "model.norm.weight"
    assert torch.equal(found[norm], written(base.path)[norm])
    assert found[f"{TOUCHED}.weight"].dtype == torch.float16
    assert config(tmp_path / "out") == {"model_type": "llama", "torch_dtype": "float16"}
    assert any("dequantised" in n.message and "trained on" in n.message for n in report.notes)
    assert [item["tensor"] for item in report.items] == [f"{TOUCHED}.weight"]
    assert report.facts["tensors"] == 3
    assert report.facts["tensors_touched"] == 1


def test_dtype_decides_and_the_config_follows(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "nf4")
    change = write_adapter(tmp_path / "adapter", base)
    merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out", dtype="fp32")
    found = written(tmp_path / "out")[f"{TOUCHED}.weight"]
    torch.testing.assert_close(found.double(), base.dense(TOUCHED) + change, rtol=1e-5, atol=1e-7)
    assert config(tmp_path / "out")["torch_dtype"] == "float32"


def test_the_state_tells_the_dtype_where_the_config_does_not(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "nf4", torch_dtype=None)
    write_adapter(tmp_path / "adapter", base)
    merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out")
    assert written(tmp_path / "out")[f"{TOUCHED}.weight"].dtype == torch.bfloat16


def test_words_of_quantisation_are_left_behind(tmp_path: Path) -> None:
    words = {"bits": 4, "group_size": 32}
    base = write_base(tmp_path / "base", "mlx", quantization=words)
    (base.path / "hf_quant_config.json").write_text("{}")
    write_adapter(tmp_path / "adapter", base)
    report = merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out")
    assert not {"quantization", "quantization_config"} & config(tmp_path / "out").keys()
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    assert any("hf_quant_config.json" in note.message for note in report.notes)


def test_scales_of_activations_go_with_the_weights_scales(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "fp8 rows")
    tensors = written(base.path) | {f"{TOUCHED}.input_scale": torch.tensor(0.5)}
    save_file(tensors, base.path / "model.safetensors")
    write_adapter(tmp_path / "adapter", base)
    merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out")
    assert f"{TOUCHED}.input_scale" not in written(tmp_path / "out")
    merge_into_base(base.path, tmp_path / "adapter", tmp_path / "kept", quant="keep")
    assert f"{TOUCHED}.input_scale" in written(tmp_path / "kept")


# ── in the same scheme ──


def retained(base: Base, out: Path, change: Tensor) -> tuple[float, Tensor]:
    """⟨Δ', Δ⟩/‖Δ‖² and Δ' − Δ of what a checkpoint stores."""
    weight = base.stored(out, TOUCHED)
    made = weight.decode(0, weight.rows).double() - base.dense(TOUCHED)
    return float((made * change).sum() / change.square().sum()), made - change


@pytest.mark.parametrize("name", list(ENTRIES))
@pytest.mark.parametrize("rounding", ["nearest", "adapter-aware"])
def test_keep_changes_codes_and_nothing_else(tmp_path: Path, name: str, rounding: str) -> None:
    base = write_base(tmp_path / "base", name)
    change = write_adapter(tmp_path / "adapter", base, size=0.2)
    report = merge_into_base(
        base.path, tmp_path / "adapter", tmp_path / "out", quant="keep", rounding=rounding
    )
    before, after = written(base.path), written(tmp_path / "out")
    assert list(after) == list(before)
    assert config(tmp_path / "out") == config(base.path)
    changed = {n for n in before if not torch.equal(bits(before[n]), bits(after[n]))}
    codes = {"weight", "qweight", "weight_packed", "W_q", "blocks"}
    (code_part,) = codes & base.cases[TOUCHED].weight.parts.keys()
    assert changed == {TOUCHED + base.entry.names[code_part]}
    (item,) = report.items
    share, error = retained(base, tmp_path / "out", change)
    assert item["retained"] == pytest.approx(share, abs=2e-3)
    weight = base.dense(TOUCHED) + change
    assert item["added_error"] == pytest.approx(float(error.norm() / weight.norm()), rel=1e-2)
    down = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    rows = next(t for n, t in down.items() if "lora_A" in n).double()
    basis = torch.linalg.qr(rows.T).Q
    inside = float((error @ basis).norm() / (change @ basis).norm())
    assert item["subspace_error"] == pytest.approx(inside, rel=2e-2, abs=2e-3)
    old, new = base.cases[TOUCHED].weight, base.stored(tmp_path / "out", TOUCHED)
    moved = float((old.codes(0, old.rows) != new.codes(0, old.rows)).float().mean())
    assert item["codes_changed"] == pytest.approx(moved, abs=1e-6)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("name", list(ENTRIES))
def test_nearest_is_the_nearest_of_what_the_scales_allow(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", name)
    change = write_adapter(tmp_path / "adapter", base, size=0.3)
    merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out", quant="keep")
    weight = base.cases[TOUCHED].weight
    grid, wanted = weight.grid(0, weight.rows), base.dense(TOUCHED) + change
    every = torch.stack(
        [
            grid.values(torch.full(wanted.shape, code, dtype=torch.uint8)).double()
            for code in range(len(grid.levels))
        ]
    )
    least = (every - wanted).abs().amin(0)
    found = base.stored(tmp_path / "out", TOUCHED).decode(0, weight.rows).double()
    scale = float(wanted.abs().max())
    torch.testing.assert_close((found - wanted).abs(), least, rtol=1e-3, atol=2e-6 * scale)


@pytest.mark.parametrize("name", ["nf4", "gptq", "awq", "mlx", "pack-quantized", "hqq", "nvfp4"])
def test_adapter_aware_keeps_more_where_the_adapter_looks(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", name)
    write_adapter(tmp_path / "adapter", base, size=0.02, rank=1)
    item = {}
    for rounding in ("nearest", "adapter-aware"):
        report = merge_into_base(
            base.path,
            tmp_path / "adapter",
            tmp_path / rounding,
            quant="keep",
            rounding=rounding,
        )
        (item[rounding],) = report.items
    assert item["adapter-aware"]["subspace_error"] < 0.5 * item["nearest"]["subspace_error"]


def test_several_adapters_are_all_protected(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "fp8 blocks")
    changes = [write_adapter(tmp_path / name, base, size=0.002, rank=4) for name in "ab"]
    merge_into_base(
        base.path,
        [(tmp_path / "a", 1.0), (tmp_path / "b", -0.5)],
        tmp_path / "out",
        rounding="adapter-aware",
    )
    _, error = retained(base, tmp_path / "out", changes[0] - 0.5 * changes[1])
    for change in changes:
        basis = torch.linalg.svd(change, full_matrices=False).Vh[:4]
        assert float((error @ basis.T).norm() / (change @ basis.T).norm()) < 0.2


def test_what_is_lost_is_warned_of_with_the_choices(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "nf4")
    write_adapter(tmp_path / "adapter", base, size=0.02)
    report = merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out", quant="keep")
    (note,) = [n.message for n in report.notes if "less than half" in n.message]
    assert "--rounding adapter-aware" in note
    assert "--quant dequantize" in note


def test_the_same_bytes_every_time_and_for_any_number_of_blocks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = write_base(tmp_path / "base", "fp8 blocks")
    write_adapter(tmp_path / "adapter", base, size=0.1)
    for name, size in (("one", 1 << 22), ("many", 1000)):
        monkeypatch.setitem(blocks._SHAPED_BLOCK, "cpu", size)
        merge_into_base(base.path, tmp_path / "adapter", tmp_path / name, rounding="adapter-aware")
    one, many = (written(tmp_path / name)[f"{TOUCHED}.weight"] for name in ("one", "many"))
    assert float((bits(one) != bits(many)).float().mean()) < 0.01


# ── the figures: a change of 1 % in four grids of 4 bits ──


def large(*shape: int) -> Tensor:
    return 0.02 * torch.randn(shape)


def write_lora(folder: Path, weight: Tensor, module: str = TOUCHED) -> Tensor:
    """Write a rank-16 LoRA of a hundredth of the weight's norm; returns ΔW in float64."""
    down, up = torch.randn(16, weight.shape[1]), torch.randn(weight.shape[0], 16)
    up *= 0.01 * weight.norm() / (up @ down).norm()
    folder.mkdir()
    names = {f"base_model.model.{module}.lora_{x}.weight": t for x, t in (("A", down), ("B", up))}
    save_file(names, folder / "adapter_model.safetensors")
    leaf = module.rpartition(".")[2]
    words = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": [leaf]}
    (folder / "adapter_config.json").write_text(json.dumps(words))
    return up.double() @ down.double()


def packed_base(folder: Path, weight: PackedWeight, config: dict) -> None:
    folder.mkdir()
    parts = {"weight": ".weight", "scales": ".scales", "biases": ".biases"}
    parts |= {part: f".weight.{part}" for part in ("absmax", "quant_map")}
    tensors = {TOUCHED + parts[part]: tensor.clone() for part, tensor in weight.parts.items()}
    if "absmax" in weight.parts:
        words = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [*weight.shape]}
        state = torch.tensor(list(json.dumps(words).encode()), dtype=torch.uint8)
        tensors[f"{TOUCHED}.weight.quant_state.bitsandbytes__nf4"] = state
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))


@pytest.mark.parametrize("name", ["nf4", "mlx"])
def test_a_small_change_survives_in_packed_grids(tmp_path: Path, name: str) -> None:
    weight = large(512, 1024)
    packed = quantise_bnb4(weight, "nf4") if name == "nf4" else quantise_mlx(weight, 4, 64)
    config = {"quant_method": "bitsandbytes"} if name == "nf4" else {"bits": 4, "group_size": 64}
    packed_base(tmp_path / "base", packed, config)
    start = packed.decode(0, 512).double()
    change = write_lora(tmp_path / "adapter", weight)
    with pytest.raises(MatchError, match="undoes every change"):
        merge_into_base(tmp_path / "base", tmp_path / "adapter", tmp_path / "no", quant="keep")
    out = tmp_path / "out"
    merge_into_base(tmp_path / "base", tmp_path / "adapter", out, rounding="adapter-aware")
    found, before = written(out), written(tmp_path / "base")
    assert all(torch.equal(found[n], before[n]) for n in found if n != f"{TOUCHED}.weight")
    parts = {**packed.parts, "weight": found[f"{TOUCHED}.weight"]}
    made = replace(packed, parts=parts).decode(0, 512).double() - start
    assert float((made * change).sum() / change.square().sum()) >= 0.97


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_K", "Q6_K", "IQ4_NL", "Q5_1", "Q2_K"])
def test_a_small_change_survives_in_ggml_blocks(tmp_path: Path, kind: str) -> None:
    weight, name = large(256, 1024), "blk.0.ffn_up.weight"
    codec, grids = GGML_TYPES[kind].codec, GGML_GRIDS[kind]
    raw = codec.encode(weight)
    save_gguf(tmp_path / "base.gguf", words(), [block_entry(name, kind, (256, 1024), raw)])
    change = write_lora(tmp_path / "adapter", weight, "model.layers.0.mlp.up_proj")
    items = {}
    for rounding in ("nearest", "adapter-aware"):
        out = tmp_path / f"{rounding}.gguf"
        report = merge_into_base(
            tmp_path / "base.gguf", tmp_path / "adapter", out, rounding=rounding
        )
        (items[rounding],) = report.items
        tensor = read_gguf_header(out).tensors[name]
        stored = torch.frombuffer(
            bytearray(out.read_bytes()[tensor.start : tensor.stop]), dtype=torch.uint8
        )
        found = stored.view(256, -1)
        made = codec.decode(found).double() - codec.decode(raw).double()
        share = float((made * change).sum() / change.square().sum())
        assert items[rounding]["retained"] == pytest.approx(share, abs=2e-3)
        if rounding == "adapter-aware":
            (_, before), (_, after) = grids.read(raw), grids.read(found)
            assert torch.equal(before.scale, after.scale)
            assert share >= 0.97
        elif kind in ("Q4_0", "Q4_K"):
            assert share < 0.05


def test_another_type_is_shaped_on_the_scales_it_gets(tmp_path: Path) -> None:
    weight, name = large(256, 1024), "blk.0.ffn_up.weight"
    raw = GGML_TYPES["Q8_0"].codec.encode(weight)
    save_gguf(tmp_path / "base.gguf", words(), [block_entry(name, "Q8_0", (256, 1024), raw)])
    write_lora(tmp_path / "adapter", weight, "model.layers.0.mlp.up_proj")
    out = tmp_path / "out.gguf"
    report = merge_into_base(
        tmp_path / "base.gguf", tmp_path / "adapter", out, quant="q4_0", rounding="adapter-aware"
    )
    (item,) = report.items
    assert item["dtype"] == "Q4_0"
    assert item["subspace_error"] < 0.2


def test_types_without_a_grid_are_rounded_to_nearest_and_said_so(tmp_path: Path) -> None:
    weight, name = large(64, 256), "blk.0.ffn_up.weight"
    raw = GGML_TYPES["IQ4_XS"].codec.encode(weight)
    save_gguf(tmp_path / "base.gguf", words(), [block_entry(name, "IQ4_XS", (64, 256), raw)])
    write_lora(tmp_path / "adapter", 10 * weight, "model.layers.0.mlp.up_proj")
    notes = {}
    for rounding in ("nearest", "adapter-aware"):
        out = tmp_path / f"{rounding}.gguf"
        report = merge_into_base(
            tmp_path / "base.gguf", tmp_path / "adapter", out, rounding=rounding
        )
        notes[rounding] = [n.message for n in report.notes if "no grid of IQ4_XS" in n.message]
    assert notes == {
        "nearest": [],
        "adapter-aware": [
            "1 tensors are rounded to nearest, since adapter-aware rounding has no grid of IQ4_XS: "
            + name
        ],
    }
    assert (tmp_path / "nearest.gguf").stat().st_size > 0


# ── scales at the ends of float32 ──


def scaled_base(tmp_path: Path, scales: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """An NF4 base with these scales; returns its tensors and the largest of its weights."""
    packed = quantise_bnb4(torch.randn(64, 64), "nf4")
    packed = replace(packed, parts={**packed.parts, "absmax": scales})
    packed_base(tmp_path / "base", packed, {"quant_method": "bitsandbytes"})
    return written(tmp_path / "base"), packed.decode(0, 64)


@pytest.mark.parametrize("size", [1e-33, 1e-25, 1e25, 1e33])
def test_the_report_is_right_where_squares_leave_float32(tmp_path: Path, size: float) -> None:
    _, weight = scaled_base(tmp_path, torch.full((64,), size))
    # Everything in units of size, so that the squares here are at hand.
    change = write_lora(tmp_path / "adapter", 30 * (weight.double() / size).float())
    adapter = tmp_path / "adapter" / "adapter_model.safetensors"
    factors = load_file(adapter)
    save_file({n: t * (size if "lora_B" in n else 1) for n, t in factors.items()}, adapter)
    report = merge_into_base(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quant="keep"
    )
    (item,) = report.items
    codes = written(tmp_path / "out")[f"{TOUCHED}.weight"].flatten()
    table = torch.tensor(written(tmp_path / "base")[f"{TOUCHED}.weight.quant_map"].tolist())
    nibbles = torch.stack([codes >> 4, codes & 15], dim=1).flatten().long()
    start = weight.double() / size
    made = table.double()[nibbles].view(64, 64) - start
    error = made - change
    share = float((made * change).sum() / change.square().sum())
    assert item["retained"] == pytest.approx(share, rel=1e-3)
    norm = float((start + change).norm())
    assert item["added_error"] == pytest.approx(float(error.norm()) / norm, rel=1e-3)
    assert item["change_norm"] == pytest.approx(size * float(change.norm()), rel=1e-3)
    assert report.facts["retained"] == pytest.approx(share, rel=1e-3)
    assert item["subspace_error"] > 0


@pytest.mark.parametrize("rounding", ["nearest", "adapter-aware"])
def test_codes_under_a_scale_of_zero_stay(tmp_path: Path, rounding: str) -> None:
    scales = torch.ones(64)
    scales[:32] = 0.0
    before, weight = scaled_base(tmp_path, scales)
    write_lora(tmp_path / "adapter", 30 * weight)
    merge_into_base(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", quant="keep", rounding=rounding
    )
    name = f"{TOUCHED}.weight"
    old, new = before[name].flatten(), written(tmp_path / "out")[name].flatten()
    assert torch.equal(old[: 32 * 32], new[: 32 * 32])
    assert not torch.equal(old, new)


# ── experts that are stored turned over (gpt-oss) ──


def write_experts(folder: Path) -> Base:
    from .packed.checkpoints import Entry
    from .packed.loops import CASES

    module = "model.layers.0.mlp.experts.gate_up_proj"
    case = CASES["mxfp4"]()
    folder.mkdir()
    tensors = {f"{module}_{part}": tensor for part, tensor in case.weight.parts.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = {
        "model_type": "gpt_oss", "torch_dtype": "bfloat16",
        "quantization_config": {"quant_method": "mxfp4"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(words))
    return Base(folder, Entry("mxfp4", {}, {}), {module: case})


def write_expert_adapter(folder: Path, *, size: float) -> Tensor:
    """PEFT's ParamWrapper on (2, in 96, out 6), rank 2; returns ΔW (2, out 6, in 96)."""
    module = "base_model.model.model.layers.0.mlp.experts"
    down, up = torch.randn(2 * 2, 96), size * torch.randn(6, 2 * 2)
    folder.mkdir()
    tensors = {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
    save_file(tensors, folder / "adapter_model.safetensors")
    words = {
        "peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [],
        "target_parameters": ["mlp.experts.gate_up_proj"],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(words))
    # Expert e has rows e·r … of A and columns e, e + E, ... of B: PEFT 0.21's reshaping.
    ups = up.reshape(6, 2, 2).permute(2, 0, 1)
    return torch.stack(
        [u.double() @ d.double() for u, d in zip(ups, down.view(2, 2, 96), strict=True)]
    )


def test_experts_come_out_as_transformers_holds_them(tmp_path: Path) -> None:
    base = write_experts(tmp_path / "base")
    (module,) = base.cases
    change = write_expert_adapter(tmp_path / "adapter", size=0.05)
    merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out")
    found = written(tmp_path / "out")[module].double()
    dense = base.dense(module).view(2, 6, 96)
    assert found.shape == (2, 96, 6)
    torch.testing.assert_close(found.mT, dense + change, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("rounding", ["nearest", "adapter-aware"])
def test_experts_are_coded_again(tmp_path: Path, rounding: str) -> None:
    base = write_experts(tmp_path / "base")
    (module,) = base.cases
    change = write_expert_adapter(tmp_path / "adapter", size=0.05)
    report = merge_into_base(
        base.path, tmp_path / "adapter", tmp_path / "out", quant="keep", rounding=rounding
    )
    before, after = written(base.path), written(tmp_path / "out")
    assert torch.equal(before[f"{module}_scales"], after[f"{module}_scales"])
    weight = base.cases[module].weight
    parts = {part: after[f"{module}_{part}"] for part in ("blocks", "scales")}
    made = type(weight)(weight.shape, parts).decode(0, 12).double() - base.dense(module)
    wanted = change.view(12, 96)
    share = float((made * wanted).sum() / wanted.square().sum())
    (item,) = report.items
    assert item["retained"] == pytest.approx(share, abs=2e-3)
    assert item["subspace_error"] is not None


# ── what is refused ──


@pytest.mark.parametrize(("part", "word"), [("absmax", "nf4"), ("quant_map", "nf4")])
def test_a_missing_scale_is_named(tmp_path: Path, part: str, word: str) -> None:
    base = write_base(tmp_path / "base", word)
    write_adapter(tmp_path / "adapter", base)
    tensors = written(base.path)
    del tensors[f"{OTHER}.weight.{part}"]
    save_file(tensors, base.path / "model.safetensors")
    with pytest.raises(CorruptFileError, match=rf"{OTHER}: .*4-bit.*{part}"):
        merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out")


def test_an_unknown_scheme_is_named(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "int8")
    write_adapter(tmp_path / "adapter", base)
    tensors = {n: t for n, t in written(base.path).items() if not n.endswith("SCB")}
    save_file(tensors, base.path / "model.safetensors")
    words = {"model_type": "llama", "quantization_config": {"quant_method": "quanto"}}
    (base.path / "config.json").write_text(json.dumps(words))
    with pytest.raises(UnsupportedError, match="quanto"):
        merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out")
    words["quantization_config"] = {"quant_method": "compressed-tensors"}
    (base.path / "config.json").write_text(json.dumps(words))
    with pytest.raises(CorruptFileError, match=rf"{TOUCHED}: .*int-quantized.* no .weight_scale"):
        merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out")


def test_types_of_gguf_are_for_gguf(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "nf4")
    write_adapter(tmp_path / "adapter", base)
    with pytest.raises(UnsupportedError, match="bitsandbytes 4-bit, not as GGUF"):
        merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out", quant="q8_0")


@pytest.mark.parametrize(
    "options",
    [
        {"rounding": "random"},
        {"rounding_strength": 3.0},
        {"rounding": "adapter-aware", "rounding_strength": -1.0},
        {"rounding": "adapter-aware", "rounding_strength": float("nan")},
    ],
)
def test_words_that_mean_nothing_are_refused(tmp_path: Path, options: dict) -> None:
    base = write_base(tmp_path / "base", "nf4")
    write_adapter(tmp_path / "adapter", base)
    with pytest.raises(OptionError, match="rounding"):
        merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out", **options)


def test_rounding_everything_away_is_an_error(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "nf4")
    write_adapter(tmp_path / "adapter", base, size=1e-5)
    given = (base.path, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(MatchError, match="few bits") as nearest:
        merge_into_base(*given, quant="keep")
    assert "adapter-aware" in str(nearest.value.hint)
    with pytest.raises(MatchError, match="few bits") as shaped:
        merge_into_base(*given, rounding="adapter-aware", rounding_strength=1e-3)
    assert "--rounding-strength" in str(shaped.value.hint)


# ── taken out again ──


@pytest.mark.parametrize("rounding", ["nearest", "adapter-aware"])
@pytest.mark.parametrize("name", list(ENTRIES))
def test_the_base_gives_its_codes_back(tmp_path: Path, name: str, rounding: str) -> None:
    base = write_base(tmp_path / "base", name)
    write_adapter(tmp_path / "adapter", base, size=0.3)
    out, adapter = tmp_path / "out", tmp_path / "adapter"
    merge_into_base(base.path, adapter, out, quant="keep", rounding=rounding)
    before, merged = ((p / "model.safetensors").read_bytes() for p in (base.path, out))
    assert merged != before
    assert len(merged) == len(before)
    for number, given in enumerate(([adapter], [])):
        unmerge_from_base(out, given, tmp_path / f"{number}", base=base.path)
        assert (tmp_path / f"{number}" / "model.safetensors").read_bytes() == before


def test_experts_give_their_codes_back(tmp_path: Path) -> None:
    base = write_experts(tmp_path / "base")
    write_expert_adapter(tmp_path / "adapter", size=0.05)
    merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out", quant="keep")
    unmerge_from_base(tmp_path / "out", tmp_path / "adapter", tmp_path / "back", base=base.path)
    before, merged, back = (
        (p / "model.safetensors").read_bytes()
        for p in (base.path, tmp_path / "out", tmp_path / "back")
    )
    assert merged != before == back
    assert len(merged) == len(before)


def test_subtraction_from_codes_is_refused(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "gptq")
    write_adapter(tmp_path / "adapter", base, size=0.3)
    merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out", quant="keep")
    with pytest.raises(UnsupportedError, match="few bits"):
        unmerge_from_base(tmp_path / "out", tmp_path / "adapter", tmp_path / "no")


# ── plain numbers ──


@pytest.mark.parametrize("name", list(ENTRIES))
def test_dequantize_writes_the_floats(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", name)
    report = dequantize_base(base.path, tmp_path / "out", dtype="fp32")
    found = written(tmp_path / "out")
    assert found.keys() == {f"{TOUCHED}.weight", f"{OTHER}.weight", "model.norm.weight"}
    for module in (TOUCHED, OTHER):
        torch.testing.assert_close(
            found[f"{module}.weight"].double(), base.dense(module), rtol=1e-5, atol=1e-7
        )
    assert config(tmp_path / "out") == {"model_type": "llama", "torch_dtype": "float32"}
    assert report.facts["dtype"] == "F32"


@pytest.mark.parametrize("name", ["torchao int8", "torchao int4"])
def test_plain_numbers_have_no_word_of_torchao(tmp_path: Path, name: str) -> None:
    base = write_base(tmp_path / "base", name)
    dequantize_base(base.path, tmp_path / "out")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}


# ── what rounding left out, beside the model ──


def test_the_residual_and_the_stored_weights_are_the_sum(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "nf4")
    change = write_adapter(tmp_path / "adapter", base, size=1e-3)
    out = tmp_path / "out"
    report = merge_into_base(base.path, tmp_path / "adapter", out, quant="keep", residual_rank=6)
    weight = base.stored(out, TOUCHED)
    factors = load_file(tmp_path / "out-residual" / "adapter_model.safetensors")
    down, up = (factors[f"base_model.model.{TOUCHED}.lora_{x}.weight"].double() for x in ("A", "B"))
    both = weight.decode(0, weight.rows).double() + up @ down
    torch.testing.assert_close(both, base.dense(TOUCHED) + change, rtol=1e-4, atol=1e-5)
    assert any("out-residual" in note.message for note in report.notes)


def test_a_residual_needs_rounding(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "nf4")
    write_adapter(tmp_path / "adapter", base)
    with pytest.raises(OptionError, match="nothing is left out"):
        merge_into_base(base.path, tmp_path / "adapter", tmp_path / "out", residual_rank=4)
    assert not (tmp_path / "out").exists()


def test_scaled_float8_of_comfyui_is_one_file(tmp_path: Path) -> None:
    weight = 0.02 * torch.randn(64, 32)
    scale = weight.abs().max() / 448
    name = "model.diffusion_model.double_blocks.0.img_attn.proj"
    stored = {
        f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn),
        f"{name}.scale_weight": scale.reshape(()),
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
        f"{name}.bias": torch.zeros(64, dtype=torch.bfloat16),
    }
    save_file(stored, tmp_path / "base.safetensors")
    down, up = torch.randn(2, 32), 0.01 * torch.randn(64, 2)
    path = f"base_model.model.{name}"
    (tmp_path / "adapter").mkdir()
    save_file(
        {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    words = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": ["proj"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(words))
    dense = stored[f"{name}.weight"].double() * float(scale)
    out = tmp_path / "out.safetensors"
    merge_into_base(tmp_path / "base.safetensors", tmp_path / "adapter", out)
    found = load_file(out)
    assert found.keys() == {f"{name}.weight", f"{name}.bias"}
    wanted = dense + (up @ down).double()
    torch.testing.assert_close(found[f"{name}.weight"].double(), wanted, rtol=2**-8, atol=1e-6)
    merge_into_base(
        tmp_path / "base.safetensors", tmp_path / "adapter", out, quant="keep", overwrite=True
    )
    kept = load_file(out)
    assert kept.keys() == stored.keys()
    again = kept[f"{name}.weight"].double() * float(scale)
    clipped = wanted.clamp(-448 * float(scale), 448 * float(scale))
    assert float((again - clipped).norm() / wanted.norm()) < 0.03


def test_changes_without_input_directions_are_rounded_to_nearest(tmp_path: Path) -> None:
    base = write_base(tmp_path / "base", "mlx")
    write_adapter(tmp_path / "adapter", base)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(file)
    rows = base.cases[TOUCHED].weight.rows
    tensors[f"base_model.model.{TOUCHED}.lora_magnitude_vector"] = torch.rand(rows)
    save_file(tensors, file)
    words = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    text = json.dumps({**words, "use_dora": True})
    (tmp_path / "adapter" / "adapter_config.json").write_text(text)
    report = merge_into_base(
        base.path, tmp_path / "adapter", tmp_path / "out", rounding="adapter-aware"
    )
    assert any("rounded to nearest" in note.message for note in report.notes)
    assert report.items[0]["subspace_error"] is None
