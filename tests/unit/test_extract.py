"""Extraction: every tensor's change ends factored, whole or reported, and the numbers are true.

The oracles are dense differences and singular values in float64.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from loratools.adapter_io import load_adapter
from loratools.compute import Compute
from loratools.demo import make_adapter, make_base
from loratools.errors import (
    LoratoolsError,
    MatchError,
    NonFiniteError,
    OptionError,
    OutputError,
    UnsupportedError,
)
from loratools.extract import extract_adapter
from loratools.merge import merge_into_base
from loratools.streaming.differences import Job, in_threads

Tensors = dict[str, Tensor]
BLOCK = "model.layers.0"
LLAMA: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (50, 24),
    f"{BLOCK}.self_attn.q_proj.weight": (24, 24),
    f"{BLOCK}.self_attn.q_proj.bias": (24,),
    f"{BLOCK}.mlp.up_proj.weight": (40, 24),
    f"{BLOCK}.input_layernorm.weight": (24,),
    "model.norm.weight": (24,),
    "lm_head.weight": (50, 24),
}
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def drawn(shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def write(folder: Path, tensors: Tensors, config: Any = CONFIG) -> Path:
    """Write a Hugging Face folder, or a single file where there is no config."""
    if config is None:
        path = folder.with_suffix(".safetensors")
        save_file(tensors, path)
        return path
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def moved(tensors: Tensors, *names: str, size: float = 0.1, seed: int = 1) -> Tensors:
    """Return the tensors with noise on those named, or on all."""
    noise = drawn({name: tuple(tensor.shape) for name, tensor in tensors.items()}, seed)
    chosen = names or tuple(tensors)
    return {n: t + size * noise[n] if n in chosen else t for n, t in tensors.items()}


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    """A small Llama and the same with every tensor moved."""
    tensors = drawn(LLAMA)
    return write(tmp_path / "base", tensors), write(tmp_path / "tuned", moved(tensors))


def rows(report: Any) -> dict[str, Any]:
    return {row["tensor"]: row for row in report.items}


def product(lora: Any) -> Tensor:
    """Return ΔW by the definition, in float64."""
    up, down = (t.double().flatten(1) for t in (lora.up, lora.down))
    return (up @ down * lora.alpha / lora.rank).reshape(lora.weight_shape)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("exact", [False, True])
def test_the_report_tells_what_was_captured(pair: tuple[Path, Path], exact: bool) -> None:
    base = pair[0]
    report = extract_adapter(*pair, base.parent / "out", rank=5, exact=exact)
    before, after = (load_file(path / "model.safetensors") for path in pair)
    found = rows(report)
    assert found.keys() == before.keys()
    lost = whole = 0.0
    for name, row in found.items():
        change = after[name].double() - before[name].double()
        assert row["norm"] == pytest.approx(float(change.norm()), rel=1e-6)
        assert row["relative_change"] == pytest.approx(
            float(change.norm() / before[name].double().norm()), rel=1e-6
        )
        square = float(change.norm()) ** 2
        whole += square
        if row["rank"] is None:
            assert row["share_captured"] == 1
            continue
        values = torch.linalg.svdvals(change)
        captured = float(values[:5].square().sum()) / square
        assert row["rank"] == 5
        assert row["share_captured"] == pytest.approx(captured, abs=0.01)
        assert row["relative_error"] == pytest.approx((1 - captured) ** 0.5, rel=0.02)
        lost += square - float(values[:5].square().sum())
    assert report.facts["share_captured"] == pytest.approx(1 - lost / whole, abs=0.01)
    assert report.facts["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=0.02)
    assert report.facts["factored"] == 4


def test_the_reported_error_is_that_of_what_was_written(pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    report = extract_adapter(*pair, base.parent / "out", rank=5)
    merge_into_base(base, base.parent / "out", base.parent / "merged")
    merged, wanted = (load_file(p / "model.safetensors") for p in (base.parent / "merged", tuned))
    for name, row in rows(report).items():
        left = float((wanted[name].double() - merged[name].double()).norm())
        assert left == pytest.approx((row["relative_error"] or 0.0) * row["norm"], abs=2e-5), name


@pytest.mark.parametrize("shape", [(60, 40), (30, 70), (20, 6, 3, 3), (24, 16, 1, 1), (18, 7, 3)])
def test_planted_factors_are_found(shape: tuple[int, ...], tmp_path: Path) -> None:
    out, *rest = shape
    base = drawn({"block.conv.weight": shape, "block.other.weight": (4, 4)})
    factors = drawn({"up": (out, 3), "down": (3, torch.Size(rest).numel())}, seed=2)
    change = (factors["up"] @ factors["down"]).reshape(shape)
    tuned = {**base, "block.conv.weight": base["block.conv.weight"] + 0.1 * change}
    one, two = write(tmp_path / "a", base), write(tmp_path / "b", tuned)
    report = extract_adapter(one, two, tmp_path / "out", rank=3)
    assert report.facts["share_captured"] > 1 - 1e-9
    assert (report.facts["tensors"], report.facts["unchanged"]) == (2, 1)
    layers = load_adapter(tmp_path / "out").layers
    assert list(layers) == ["block.conv"]
    expected = 0.1 * change.double()
    error = (product(layers["block.conv"]) - expected).norm() / expected.norm()
    assert error < 1e-5
    assert layers["block.conv"].scale == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.97])
def test_energy(pair: tuple[Path, Path], energy: float) -> None:
    base = pair[0]
    report = extract_adapter(*pair, base.parent / "out", energy=energy)
    before, after = (load_file(path / "model.safetensors") for path in pair)
    for name, row in rows(report).items():
        if row["rank"] is not None:
            squares = torch.linalg.svdvals(after[name].double() - before[name].double()) ** 2
            sums = squares.cumsum(0) / squares.sum()
            assert row["rank"] == int((sums < energy).sum()) + 1, name
            assert row["share_captured"] >= energy


def test_energy_with_a_largest_rank(pair: tuple[Path, Path]) -> None:
    report = extract_adapter(*pair, pair[0].parent / "out", energy=0.99, rank=4)
    assert report.facts["rank"] == 4
    assert any("only" in note.message for note in report.warnings)


@pytest.mark.parametrize(("dtype", "step"), [("fp32", 0.0), ("bf16", 2**-9), ("fp16", 2**-12)])
def test_an_adapter_that_was_merged_is_found_again(dtype: str, step: float, tmp_path: Path) -> None:
    """Up to what rounding the merged weights changes: half a unit in the last place of each."""
    make_base(tmp_path / "base")
    make_adapter(tmp_path / "adapter")
    merge_into_base(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged", dtype=dtype)
    extract_adapter(tmp_path / "base", tmp_path / "merged", tmp_path / "out", rank=4)
    wanted, found = (load_adapter(tmp_path / name).layers for name in ("adapter", "out"))
    assert found.keys() >= wanted.keys()
    weights = load_file(tmp_path / "base" / "model.safetensors")
    for path, delta in wanted.items():
        exact = product(delta)
        size = float((weights[f"{path}.weight"].double() + exact).norm())
        # Rounding errors are spread evenly up to half a unit; a factor for the cut to rank 4.
        allowed = 2 * step * size + 2e-6 * float(exact.norm())
        assert float((product(found[path]) - exact).norm()) <= allowed, path


def test_rounding_of_the_factors(pair: tuple[Path, Path]) -> None:
    base = pair[0]
    report = extract_adapter(*pair, base.parent / "out", rank=3, dtype="bf16")
    assert {t.dtype for _, t in load_adapter(base.parent / "out").named_tensors()} == {
        torch.bfloat16
    }
    assert any("bf16" in note.message for note in report.notes)


# ── where each change goes ───────────────────────────────────────────────────────────────────


def test_every_tensor_has_its_place_in_peft(pair: tuple[Path, Path]) -> None:
    base, tuned = pair
    extract_adapter(*pair, base.parent / "out", rank=4)
    found = load_adapter(base.parent / "out")
    assert list(found.layers) == [
        "lm_head",
        "model.embed_tokens",
        f"{BLOCK}.mlp.up_proj",
        f"{BLOCK}.self_attn.q_proj",
    ]
    assert found.layers["model.embed_tokens"].role == "embedding"  # type: ignore[attr-defined]
    wanted = load_file(tuned / "model.safetensors")
    assert found.extras.keys() == {
        f"{BLOCK}.self_attn.q_proj.bias",
        f"{BLOCK}.input_layernorm.weight",
        "model.norm.weight",
    }
    for name, extra in found.extras.items():
        assert torch.equal(extra.value, wanted[name])  # type: ignore[union-attr]
    config = json.loads((base.parent / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["task_type"] == "CAUSAL_LM"


def test_include_exclude_full(pair: tuple[Path, Path]) -> None:
    base = pair[0]
    report = extract_adapter(
        *pair,
        base.parent / "out",
        rank=4,
        include=["self_attn", "mlp", "head"],
        exclude=["up_"],
        full=["head$"],
    )
    found = load_adapter(base.parent / "out")
    assert list(found.layers) == [f"{BLOCK}.self_attn.q_proj"]
    assert set(found.extras) == {"lm_head.weight", f"{BLOCK}.self_attn.q_proj.bias"}
    assert report.facts["excluded"] == 4


def test_tied_tables_stay_tied(tmp_path: Path) -> None:
    config = {**CONFIG, "tie_word_embeddings": True}
    tensors = drawn({k: v for k, v in LLAMA.items() if k != "lm_head.weight"})
    after = moved(tensors, "model.embed_tokens.weight")
    one, two = (write(tmp_path / n, t, config) for n, t in (("a", tensors), ("b", after)))
    report = extract_adapter(one, two, tmp_path / "out", rank=24)
    table, head = (
        product(load_adapter(tmp_path / "out").layers[name])
        for name in ("model.embed_tokens", "lm_head")
    )
    assert torch.equal(table, head.T)
    assert any("shares the table" in note.message for note in report.notes)
    merge_into_base(one, tmp_path / "out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert merged.keys() == after.keys()
    assert (
        merged["model.embed_tokens.weight"] - after["model.embed_tokens.weight"]
    ).abs().max() < (1e-5)


def test_a_head_that_training_untied(tmp_path: Path) -> None:
    tied = {**CONFIG, "tie_word_embeddings": True}
    tensors = drawn({k: v for k, v in LLAMA.items() if k != "lm_head.weight"})
    after = {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 0.1}
    one = write(tmp_path / "a", tensors, tied)
    two = write(tmp_path / "b", after, {**CONFIG, "tie_word_embeddings": False})
    extract_adapter(one, two, tmp_path / "out", rank=1)
    found = load_adapter(tmp_path / "out").layers
    assert list(found) == ["lm_head"]
    assert (product(found["lm_head"]) - 0.1).abs().max() < 1e-5


def test_names_with_and_without_a_prefix(tmp_path: Path) -> None:
    """GPT-2 from the Hub, and as transformers saves it after training; its buffers are passed."""
    shapes = {"wte.weight": (30, 8), "h.0.attn.c_attn.weight": (8, 24), "ln_f.weight": (8,)}
    config = {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}
    tensors = drawn(shapes)
    after = {f"transformer.{name}": t for name, t in moved(tensors).items()}
    one = write(tmp_path / "a", {**tensors, "h.0.attn.bias": torch.ones(1, 1, 4, 4)}, config)
    two = write(tmp_path / "b", after, config)
    report = extract_adapter(one, two, tmp_path / "out", rank=8)
    found = load_adapter(tmp_path / "out")
    assert set(found.layers) == {"transformer.h.0.attn.c_attn", "transformer.wte", "lm_head"}
    name = "transformer.h.0.attn.c_attn"
    change = (after[f"{name}.weight"] - tensors["h.0.attn.c_attn.weight"]).double()
    assert (product(found.layers[name]) - change.T).abs().max() < 1e-6
    assert any("buffer" in note.message for note in report.notes)


def test_stacked_experts(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.gate_up_proj"
    tensors = drawn({name: (3, 20, 8), "model.norm.weight": (8,)})
    after = moved(tensors, name)
    after[name][1] = tensors[name][1]  # an expert that did not change
    one, two = (write(tmp_path / n, t) for n, t in (("a", tensors), ("b", after)))
    report = extract_adapter(one, two, tmp_path / "out", rank=8)
    assert report.facts["share_captured"] > 1 - 1e-9
    merge_into_base(one, tmp_path / "out", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    assert (merged[name] - after[name]).abs().max() < 1e-5
    assert torch.equal(merged[name][1], after[name][1])


def test_what_has_no_words_is_left_out_with_its_size(tmp_path: Path) -> None:
    tensors = drawn({"layers.0.mixer.A_log": (6, 4), "layers.0.mixer.in_proj.weight": (9, 6)})
    after = moved(tensors)
    one, two = (write(tmp_path / n, t) for n, t in (("a", tensors), ("b", after)))
    report = extract_adapter(one, two, tmp_path / "out", rank=6)
    squares = {n: float((after[n].double() - t.double()).norm()) ** 2 for n, t in tensors.items()}
    share = squares["layers.0.mixer.A_log"] / sum(squares.values())
    assert report.facts["left_out"] == 1
    assert report.facts["share_captured"] == pytest.approx(1 - share, rel=1e-5)
    assert rows(report)["layers.0.mixer.A_log"]["written"] == "left out"
    (warning,) = report.warnings
    assert "A_log" in warning.message
    assert f"{share:.2%}" in warning.message


def test_depthwise_convolutions_are_not_factored(tmp_path: Path) -> None:
    tensors = drawn({"conv.depth.weight": (8, 1, 3, 3), "conv.point.weight": (8, 8, 1, 1)})
    one, two = (write(tmp_path / n, t) for n, t in (("a", tensors), ("b", moved(tensors))))
    report = extract_adapter(one, two, tmp_path / "out", rank=8)
    assert rows(report)["conv.depth.weight"]["written"] == "left out"
    assert rows(report)["conv.point.weight"]["rank"] == 8


def test_conv_rank(tmp_path: Path) -> None:
    shapes = {
        "a.conv.weight": (16, 8, 3, 3),
        "a.point.weight": (16, 8, 1, 1),
        "a.fc.weight": (9, 9),
    }
    tensors = drawn(shapes)
    one, two = (write(tmp_path / n, t) for n, t in (("a", tensors), ("b", moved(tensors))))
    report = extract_adapter(one, two, tmp_path / "out", rank=6, conv_rank=2)
    found = {name: row["rank"] for name, row in rows(report).items()}
    assert found == {"a.conv.weight": 2, "a.point.weight": 6, "a.fc.weight": 6}


def test_layers_smaller_than_the_rank_are_kept_whole(pair: tuple[Path, Path]) -> None:
    report = extract_adapter(*pair, pair[0].parent / "out", rank=24)
    assert {row["rank"] for row in report.items} == {None, 24}
    assert report.facts["share_captured"] > 1 - 1e-9


# ── files ────────────────────────────────────────────────────────────────────────────────────


def test_a_pickled_checkpoint_and_mixed_dtypes(tmp_path: Path) -> None:
    tensors = drawn({"fc.weight": (12, 10)})
    after = {"fc.weight": (tensors["fc.weight"] + 1).half()}
    torch.save(tensors, tmp_path / "a.bin")
    save_file(after, tmp_path / "b.safetensors")
    extract_adapter(tmp_path / "a.bin", tmp_path / "b.safetensors", tmp_path / "out", energy=1)
    change = after["fc.weight"].double() - tensors["fc.weight"].double()
    assert (product(load_adapter(tmp_path / "out").layers["fc"]) - change).abs().max() < 1e-5


def test_dry_run_writes_nothing(pair: tuple[Path, Path]) -> None:
    out = pair[0].parent / "out"
    dry = extract_adapter(*pair, out, rank=3, dry_run=True)
    assert not out.exists()
    assert dry.facts == extract_adapter(*pair, out, rank=3).facts


def test_the_same_bytes_every_time(pair: tuple[Path, Path]) -> None:
    folder = pair[0].parent
    for name in ("one", "two"):
        extract_adapter(*pair, folder / name, rank=3)
    first, second = (
        (folder / name / "adapter_model.safetensors").read_bytes() for name in ("one", "two")
    )
    assert first == second


@pytest.mark.gpu
def test_the_same_on_an_accelerator(pair: tuple[Path, Path]) -> None:
    folder = pair[0].parent
    reports = [
        extract_adapter(*pair, folder / device, rank=5, device=device) for device in ("cpu", "auto")
    ]
    assert reports[1].facts["share_captured"] == pytest.approx(reports[0].facts["share_captured"])
    one, two = (load_adapter(folder / device).layers for device in ("cpu", "auto"))
    for path, delta in one.items():
        assert (product(two[path]) - product(delta)).norm() < 1e-3 * product(delta).norm()


# ── failures ─────────────────────────────────────────────────────────────────────────────────

WRONG: dict[str, tuple[dict[str, Any], type[LoratoolsError], str]] = {
    "nothing said": ({}, OptionError, "--rank"),
    "rank 0": ({"rank": 0}, OptionError, "rank 0"),
    "rank beyond": ({"rank": 25}, OptionError, "25 is beyond"),
    "energy 0": ({"energy": 0.0}, OptionError, "energy 0"),
    "energy above": ({"energy": 1.5}, OptionError, "energy 1.5"),
    "energy nan": ({"energy": float("nan")}, OptionError, "energy nan"),
    "format": ({"rank": 2, "to": "pefd"}, OptionError, "pefd"),
    "only read": ({"rank": 2, "to": "xlabs"}, OptionError, "read, not written"),
    "no such names": ({"rank": 2, "to": "kohya"}, UnsupportedError, "no names"),
    "pattern": ({"rank": 2, "include": ["("]}, OptionError, "regular expression"),
    "nothing chosen": ({"rank": 2, "include": ["nowhere"]}, OptionError, "no module"),
    "device": ({"rank": 2, "device": "abacus"}, OptionError, "abacus"),
    "dtype": ({"rank": 2, "dtype": "int3"}, OptionError, "int3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_options(pair: tuple[Path, Path], name: str) -> None:
    options, kind, words = WRONG[name]
    out = pair[0].parent / "out"
    with pytest.raises(kind) as caught:
        extract_adapter(*pair, out, **options)
    assert not out.exists()
    assert words in caught.value.message + (caught.value.hint or "")


def test_models_that_are_not_two_versions_of_one(tmp_path: Path) -> None:
    tensors = drawn(LLAMA)
    one = write(tmp_path / "a", tensors)
    other = {n: t for n, t in tensors.items() if n != "model.norm.weight"}
    other["lm_head.weight"] = torch.zeros(51, 24)
    other["model.layers.1.mlp.up_proj.weight"] = torch.zeros(2, 2)
    two = write(tmp_path / "b", other)
    with pytest.raises(MatchError) as caught:
        extract_adapter(one, two, tmp_path / "out", rank=2)
    for words in (
        "lm_head.weight: 50x24 and 51x24",
        f"model.norm.weight: only in {one}",
        f"model.layers.1.mlp.up_proj.weight: only in {two}",
    ):
        assert words in caught.value.message


def test_identical_models(pair: tuple[Path, Path], tmp_path: Path) -> None:
    copy = write(tmp_path / "copy", load_file(pair[0] / "model.safetensors"))
    with pytest.raises(MatchError, match="nothing changed"):
        extract_adapter(pair[0], copy, tmp_path / "out", rank=2)
    with pytest.raises(MatchError, match=r"outside the 3 excluded"):
        extract_adapter(
            pair[0],
            write(tmp_path / "t", moved(drawn(LLAMA), "lm_head.weight")),
            tmp_path / "out",
            rank=2,
            exclude=["head", "norm"],
        )


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_named(tmp_path: Path, value: float) -> None:
    tensors = drawn(LLAMA)
    after = moved(tensors)
    after[f"{BLOCK}.mlp.up_proj.weight"][3, 4] = value
    one, two = (write(tmp_path / n, t) for n, t in (("a", tensors), ("b", after)))
    with pytest.raises(NonFiniteError, match=r"up_proj.weight.*tuned"):
        extract_adapter(one, two, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


QUANTISED: dict[str, tuple[dict[str, Any], Tensors]] = {
    "by the config": ({**CONFIG, "quantization_config": {"quant_method": "awq"}}, {}),
    "by its scales": (CONFIG, {f"{BLOCK}.mlp.up_proj.weight_scale": torch.ones(1)}),
    "by its type": (CONFIG, {f"{BLOCK}.mlp.packed": torch.zeros(4, 4, dtype=torch.uint8)}),
}


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_weights_are_refused(pair: tuple[Path, Path], name: str) -> None:
    config, more = QUANTISED[name]
    folder = write(pair[0].parent / "q", {**drawn(LLAMA), **more}, config)
    with pytest.raises(UnsupportedError, match="quantised") as caught:
        extract_adapter(pair[0], folder, pair[0].parent / "out", rank=2)
    assert "dequantise" in (caught.value.hint or "")


def test_an_output_that_exists_or_is_an_input(pair: tuple[Path, Path]) -> None:
    out = pair[0].parent / "out"
    out.mkdir()
    with pytest.raises(OutputError, match="exists"):
        extract_adapter(*pair, out, rank=2)
    with pytest.raises(OutputError, match="input"):
        extract_adapter(*pair, pair[1], rank=2, overwrite=True)
    extract_adapter(*pair, out, rank=2, overwrite=True)
    assert (out / "adapter_config.json").exists()


# ── memory ───────────────────────────────────────────────────────────────────────────────────


def test_no_more_than_two_large_items_are_held_at_a_time() -> None:
    sizes = [9, 2, 10, 3, 3, 10, 1, 8, 10, 2]
    lock, held, peaks = threading.Lock(), [0], [0]

    def work(size: int) -> int:
        with lock:
            held[0] += size
            peaks.append(held[0])
        time.sleep(0.005)
        with lock:
            held[0] -= size
        return size

    jobs = [Job(size, size) for size in sizes]
    assert list(in_threads(jobs, work, Compute(workers=6))) == sizes
    assert 10 < max(peaks) <= 20


def test_a_failure_stops_the_others() -> None:
    seen = []

    def work(item: int) -> int:
        seen.append(item)
        time.sleep(0.002)
        if item == 3:
            raise ValueError(item)
        return item

    jobs = [Job(item, 1) for item in range(200)]
    with pytest.raises(ValueError, match="3"):
        list(in_threads(jobs, work, Compute(workers=1)))
    assert len(seen) < 200
