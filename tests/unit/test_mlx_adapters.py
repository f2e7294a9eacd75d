"""Adapters of mlx-lm's: what its files say, in loops, and what it fuses them to (golden files)."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import loratools
from loratools.adapter import Adapter
from loratools.adapter_io import load_adapter, save_adapter
from loratools.deltas import DoRA, ExpertLoRA, LayerDelta, LoRA, Replacement
from loratools.deltas.one_scale import scale_of
from loratools.errors import (
    InputError,
    MalformedAdapterError,
    MatchError,
    OutputError,
    UnsupportedError,
)
from loratools.formats import get_format
from tests.strategies import make_tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "mlx"
CASES = ("lora", "lora-keys", "dora", "mixture")
WORDS = {"fine_tune_type": "lora", "num_layers": -1, "model": "someone/base"}
Q, DOWN = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"
SWITCH = "model.layers.0.mlp.switch_mlp"


def write_folder(folder: Path, tensors: dict[str, Any], **words: Any) -> Path:
    """Write an adapter as mlx-lm's trainer leaves it."""
    folder.mkdir()
    parameters = words.pop("parameters", {"rank": 2, "scale": 20.0, "dropout": 0.0})
    save_file(tensors, folder / "adapters.safetensors")
    config = {**WORDS, "lora_parameters": parameters, **words}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def product(a: np.ndarray, b: np.ndarray, scale: float) -> np.ndarray:
    """Return ΔW of a linear layer, (out, in), element by element in float64."""
    inner, rank = a.shape
    out = b.shape[1]
    change = np.zeros((out, inner))
    for o in range(out):
        for i in range(inner):
            for r in range(rank):
                change[o, i] += scale * float(a[i, r]) * float(b[r, o])
    return change


def change_of(delta: LayerDelta) -> np.ndarray:
    assert isinstance(delta, (LoRA, ExpertLoRA))
    return delta.materialize().double().numpy()


# ── what a file means ────────────────────────────────────────────────────────────────────────


def test_a_layer_is_the_scaled_product(tmp_path: Path) -> None:
    a, b = numbers(1, 5, 2), numbers(2, 2, 3)
    path = write_folder(tmp_path / "a", {f"{Q}.lora_a": a, f"{Q}.lora_b": b})
    delta = load_adapter(path).layers[Q]
    np.testing.assert_allclose(change_of(delta), product(a, b, 20.0), rtol=1e-6)
    assert delta.weight_shape == (3, 5)


@pytest.mark.parametrize("flat", [False, True], ids=["three axes", "experts in one matrix"])
def test_a_stack_is_a_product_for_each_expert(flat: bool, tmp_path: Path) -> None:
    a, b = numbers(1, 3, 2, 5), numbers(2, 3, 4, 2)
    stored = a.reshape(6, 5) if flat else a
    tensors = {f"{SWITCH}.up_proj.lora_a": stored, f"{SWITCH}.up_proj.lora_b": b}
    path = write_folder(tmp_path / "a", tensors)
    change = change_of(load_adapter(path).layers[f"{SWITCH}.up_proj"])
    for expert in range(3):
        wanted = product(a[expert].T, b[expert].T, 20.0)
        np.testing.assert_allclose(change[expert], wanted, rtol=1e-5)


def test_tables_have_a_linear_layers_shapes(tmp_path: Path) -> None:
    a, b = numbers(1, 7, 2), numbers(2, 2, 3)
    name = "model.embed_tokens"
    path = write_folder(tmp_path / "a", {f"{name}.lora_a": a, f"{name}.lora_b": b})
    delta = load_adapter(path).layers[name]
    assert isinstance(delta, LoRA)
    assert (delta.role, delta.stored_transposed) == ("embedding", True)
    np.testing.assert_allclose(change_of(delta), product(a, b, 20.0), rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("back", [False, True], ids=["as it is", "through PEFT"])
def test_merges_as_mlx_lm_fuses(case: str, back: bool, tmp_path: Path) -> None:
    """The checkpoint with the adapter merged holds what mlx-lm's own ``fuse`` made of it."""
    source, adapter = GOLDEN / "sources" / case, GOLDEN / case
    if back:
        if case == "dora":
            pytest.skip("PEFT's DoRA sets lengths of a table's columns")
        loratools.convert_adapter(adapter, tmp_path / "peft", to="peft", base=source)
        adapter = tmp_path / "peft"
    loratools.merge_into_base(source, adapter, tmp_path / "merged")
    base, found = (load_file(f / "model.safetensors") for f in (source, tmp_path / "merged"))
    wanted = {**base, **apart(load_file(source / "expected.safetensors"))}
    assert found.keys() == wanted.keys()
    changed = {name for name in base if not np.array_equal(found[name], base[name])}
    assert changed == {n for n in base if not np.array_equal(wanted[n], base[n])}
    for name, value in wanted.items():
        # mlx adds in another order: a few units of float32 at the size of the products.
        np.testing.assert_allclose(found[name], value, atol=2e-5, rtol=2e-5, err_msg=name)


def apart(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return stacks as one matrix an expert."""
    found = {}
    for name, value in tensors.items():
        matrices = enumerate(value) if ".switch_mlp." in name else [(None, value)]
        for number, matrix in matrices:
            found[name.replace("switch_mlp", f"experts.{number}")] = matrix
    return found


def test_whole_tensors_replace_those_of_the_base(tmp_path: Path) -> None:
    source = GOLDEN / "sources" / "full"
    adapter = load_adapter(GOLDEN / "full")
    assert not adapter.layers
    assert all(isinstance(extra, Replacement) for extra in adapter.extras.values())
    loratools.merge_into_base(source, GOLDEN / "full", tmp_path / "merged")
    found = load_file(tmp_path / "merged" / "model.safetensors")
    for name, value in load_file(source / "expected.safetensors").items():
        np.testing.assert_array_equal(found[name], value)


def test_a_checkpoint_of_training_is_named_by_itself(tmp_path: Path) -> None:
    path = write_folder(tmp_path / "a", {f"{Q}.lora_a": numbers(1, 5, 2)})
    pair = {f"{Q}.lora_a": numbers(3, 5, 2), f"{Q}.lora_b": numbers(4, 2, 3)}
    save_file(pair, path / "0000100_adapters.safetensors")
    delta = load_adapter(path / "0000100_adapters.safetensors").layers[Q]
    assert np.allclose(change_of(delta), product(*pair.values(), 20.0))


# ── what is written ──────────────────────────────────────────────────────────────────────────


def mixed() -> Adapter:
    """Layers of several ranks, scales and float types."""
    return Adapter(
        {
            Q: LoRA(make_tensor(1, 4, 5), make_tensor(2, 3, 4), 8.0),
            "model.layers.0.self_attn.k_proj": LoRA(
                make_tensor(3, 4, 5), make_tensor(4, 3, 4), 8.0
            ),
            DOWN: LoRA(make_tensor(5, 2, 5, dtype=torch.bfloat16), make_tensor(6, 3, 2), 5.0),
            "lm_head": LoRA(make_tensor(7, 1, 5), make_tensor(8, 9, 1), 0.3),
        }
    )


def written(adapter: Adapter, folder: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    save_adapter(replace(adapter, naming="mlx"), folder, format="mlx")
    bundle = get_format("mlx").write(replace(adapter, naming="mlx"))
    tensors = {name: tensor.float().numpy() for name, tensor in bundle.tensors.items()}
    return tensors, json.loads((folder / "adapter_config.json").read_text())


def test_one_rank_and_one_scale_say_all_layers(tmp_path: Path) -> None:
    """Zeros fill the smaller ranks, quotients of scales are in ``lora_b``: the same ΔW."""
    tensors, config = written(mixed(), tmp_path / "a")
    parameters = config["lora_parameters"]
    assert (parameters["rank"], parameters["scale"]) == (4, 2.0)
    for path, delta in mixed().layers.items():
        a, b = tensors[f"{path}.lora_a"], tensors[f"{path}.lora_b"]
        assert a.shape[1] == b.shape[0] == 4
        wanted = change_of(delta)
        np.testing.assert_allclose(product(a, b, 2.0), wanted, rtol=1e-5, atol=1e-6)
    # The usual scale's factors are untouched.
    assert np.array_equal(tensors[f"{Q}.lora_a"].T, make_tensor(1, 4, 5).numpy())


@pytest.mark.parametrize(("alpha", "rank"), [(16.0, 8), (1.0, 49), (0.1 * 3, 3), (2.5, 7)])
def test_alpha_comes_back_exactly(alpha: float, rank: int) -> None:
    assert scale_of(alpha, rank) * rank == alpha


SELECTIONS: dict[str, tuple[list[str], list[str], int, dict[str, Any]]] = {
    # paths, keys, num_layers, config that was read
    "every block alike": (
        ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj", "lm_head"],
        ["lm_head", "mlp.up_proj"], -1, {},
    ),
    "blocks that differ": (
        ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"],
        ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.down_proj"], -1, {},
    ),
    "last blocks, as read": (["model.layers.6.q", "model.layers.7.q"], ["q"], 2, {"num_layers": 2}),
    "last blocks, unknown": (
        ["model.layers.6.q", "model.layers.7.q"], ["model.layers.6.q", "model.layers.7.q"], -1, {},
    ),
    "one of two is gone": (["model.layers.7.q"], ["model.layers.7.q"], -1, {"num_layers": 2}),
}  # fmt: skip


@pytest.mark.parametrize(("paths", "keys", "layers", "read"), SELECTIONS.values(), ids=SELECTIONS)
def test_keys_select_the_modules(
    paths: list[str], keys: list[str], layers: int, read: dict[str, Any]
) -> None:
    lora = LoRA(make_tensor(1, 2, 4), make_tensor(2, 4, 2), 4.0)
    metadata = {"adapter_config.json": json.dumps(read)}
    bundle = get_format("mlx").write(
        Adapter(dict.fromkeys(paths, lora), naming="mlx", metadata=metadata)
    )
    config = json.loads(bundle.sidecars["adapter_config.json"])
    assert (config["lora_parameters"]["keys"], config["num_layers"]) == (keys, layers)


def test_levelling_is_reported(tmp_path: Path) -> None:
    save_adapter(mixed(), tmp_path / "peft")
    report = loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    said = " ".join(note.message for note in report.notes)
    assert "zeros up to 4" in said
    assert "one scale" in said


def test_the_base_is_named_on_both_sides(tmp_path: Path) -> None:
    loratools.convert_adapter(GOLDEN / "lora", tmp_path / "peft", to="peft")
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "example/tiny"
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    config = json.loads((tmp_path / "mlx" / "adapter_config.json").read_text())
    assert (config["model"], config["fine_tune_type"]) == ("example/tiny", "lora")
    assert config["lora_parameters"]["scale"] == 20.0
    for name, value in load_file(GOLDEN / "lora" / "adapters.safetensors").items():
        found = load_file(tmp_path / "mlx" / "adapters.safetensors")[name]
        assert np.array_equal(found, value)


def test_dora_of_a_layer_goes_to_peft_and_back(tmp_path: Path) -> None:
    a, b, m = numbers(1, 5, 2), numbers(2, 2, 3), numbers(3, 3)
    tensors = {f"{Q}.lora_a": a, f"{Q}.lora_b": b, f"{Q}.m": m}
    path = write_folder(tmp_path / "a", tensors, fine_tune_type="dora")
    loratools.convert_adapter(path, tmp_path / "peft", to="peft")
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "back", to="mlx")
    found = load_file(tmp_path / "back" / "adapters.safetensors")
    assert found.keys() == tensors.keys()
    assert all(np.array_equal(found[name], tensors[name]) for name in tensors)
    assert json.loads((tmp_path / "back" / "adapter_config.json").read_text())[
        "fine_tune_type"
    ] == ("dora")


# ── experts ──────────────────────────────────────────────────────────────────────────────────


def test_experts_by_one_become_stacks(tmp_path: Path) -> None:
    """Mixtral's w1, w2, w3; an expert that the adapter leaves alone is zeros."""
    owner = "model.layers.0.block_sparse_moe"
    layers: dict[str, LayerDelta] = {
        f"{owner}.experts.{e}.w1": LoRA(make_tensor(e, 2, 5), make_tensor(e + 9, 3, 2), 4.0)
        for e in (0, 2)
    }
    save_adapter(Adapter(layers), tmp_path / "peft")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 4}')
    base = tmp_path / "config.json"
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    stack = load_adapter(tmp_path / "mlx").layers[f"{owner}.switch_mlp.gate_proj"]
    change = change_of(stack)
    assert change.shape == (4, 3, 5)
    assert not change[[1, 3]].any()
    for e in (0, 2):
        wanted = change_of(layers[f"{owner}.experts.{e}.w1"])
        np.testing.assert_allclose(change[e], wanted, rtol=1e-6)


@pytest.mark.parametrize("woven", [False, True], ids=["qwen3_moe", "gpt_oss"])
def test_fused_gates_and_ups_are_taken_apart(woven: bool, tmp_path: Path) -> None:
    owner = "model.layers.0.mlp"
    fused = ExpertLoRA(make_tensor(1, 3, 2, 4), make_tensor(2, 3, 6, 2), 4.0)
    save_adapter(Adapter({f"{owner}.experts.gate_up_proj": fused}), tmp_path / "peft")
    words = {"model_type": "gpt_oss" if woven else "qwen3_moe", "hidden_size": 4, "num_experts": 3}
    base = tmp_path / "config.json"
    base.write_text(json.dumps(words))
    with pytest.raises(InputError, match="type of model") as caught:
        loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx")
    assert "--base" in (caught.value.hint or "")
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    layers = load_adapter(tmp_path / "mlx").layers
    stack = "experts" if woven else "switch_mlp"
    gate, up = (change_of(layers[f"{owner}.{stack}.{n}_proj"]) for n in ("gate", "up"))
    whole = change_of(fused)
    parts = (whole[:, 0::2], whole[:, 1::2]) if woven else (whole[:, :3], whole[:, 3:])
    np.testing.assert_allclose(gate, parts[0], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(up, parts[1], rtol=1e-5, atol=1e-6)
    loratools.convert_adapter(tmp_path / "mlx", tmp_path / "back", to="peft", base=base)
    again = load_adapter(tmp_path / "back").layers[f"{owner}.experts.gate_up_proj"]
    np.testing.assert_allclose(change_of(again), whole, rtol=1e-5, atol=1e-6)
    same = loratools.compare_adapters(tmp_path / "peft", tmp_path / "mlx", base=base)
    assert same.facts["same"]


def test_more_experts_than_the_base_has_are_refused(tmp_path: Path) -> None:
    path = "model.layers.0.mlp.experts.7.up_proj"
    save_adapter(
        Adapter({path: LoRA(make_tensor(1, 1, 2), make_tensor(2, 3, 1), 1.0)}), tmp_path / "a"
    )
    base = tmp_path / "config.json"
    base.write_text('{"model_type": "qwen3_moe", "num_experts": 4}')
    with pytest.raises(MatchError, match="expert 7"):
        loratools.convert_adapter(tmp_path / "a", tmp_path / "mlx", to="mlx", base=base)
    assert not (tmp_path / "mlx").exists()


def test_an_adapter_goes_into_stacked_and_separate_experts_alike(tmp_path: Path) -> None:
    """mlx-lm's own conversion of a base, float, and the checkpoint that it was made from."""
    source = GOLDEN / "sources" / "mixture"
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    (stacked / "config.json").write_text((source / "config.json").read_text())
    base = load_file(source / "model.safetensors")
    save_file(stack_experts(base), stacked / "model.safetensors", {"format": "mlx"})
    loratools.convert_adapter(GOLDEN / "mixture", tmp_path / "peft", to="peft", base=source)
    for adapter in (GOLDEN / "mixture", tmp_path / "peft"):
        loratools.merge_into_base(stacked, adapter, tmp_path / "merged", overwrite=True)
        found = load_file(tmp_path / "merged" / "model.safetensors")
        for name, value in load_file(source / "expected.safetensors").items():
            np.testing.assert_allclose(found[name], value, atol=2e-5, rtol=2e-5)
        loratools.unmerge_from_base(
            tmp_path / "merged", adapter, tmp_path / "restored", overwrite=True
        )
        restored = load_file(tmp_path / "restored" / "model.safetensors")
        for name, value in stack_experts(base).items():
            np.testing.assert_allclose(restored[name], value, atol=2e-5, rtol=2e-5)


def stack_experts(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    found = {name: value for name, value in tensors.items() if ".experts." not in name}
    for name in tensors:
        if ".experts.0." in name:
            each = [tensors[name.replace(".experts.0.", f".experts.{e}.")] for e in range(3)]
            found[name.replace("experts.0", "switch_mlp")] = np.stack(each)
    return found


# ── names that differ ────────────────────────────────────────────────────────────────────────

RENAMED = {
    "gpt2": ("transformer.h.1.attn.c_attn", "model.h.1.attn.c_attn"),
    "gpt_neox": ("gpt_neox.layers.1.mlp.dense_h_to_4h", "model.h.1.mlp.dense_h_to_4h"),
    "qwen2_vl": (
        "model.language_model.layers.1.mlp.up_proj", "language_model.model.layers.1.mlp.up_proj",
    ),
    "phi3": ("model.layers.1.self_attn.qkv_proj", "model.layers.1.self_attn.qkv_proj"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "names"), RENAMED.items(), ids=RENAMED)
@pytest.mark.parametrize("known", [True, False], ids=["base", "no base on the way back"])
def test_names_go_there_and_back(
    kind: str, names: tuple[str, str], known: bool, tmp_path: Path
) -> None:
    base = tmp_path / "config.json"
    base.write_text(json.dumps({"model_type": kind}))
    lora = LoRA(make_tensor(1, 2, 4), make_tensor(2, 4, 2), 4.0)
    save_adapter(Adapter({names[0]: lora}), tmp_path / "peft")
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    assert list(load_adapter(tmp_path / "mlx").layers) == [names[1]]
    loratools.convert_adapter(
        tmp_path / "mlx", tmp_path / "back", to="peft", base=base if known else None
    )
    assert list(load_adapter(tmp_path / "back").layers) == [names[0]]


# ── refusals ─────────────────────────────────────────────────────────────────────────────────

GOOD = {f"{Q}.lora_a": numbers(1, 5, 2), f"{Q}.lora_b": numbers(2, 2, 3)}
BROKEN: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a key of another kind": ({**GOOD, f"{Q}.lora_c": numbers(1, 2)}, {}, "unexpected key"),
    "half a pair": ({f"{Q}.lora_b": numbers(2, 2, 3)}, {}, "has no lora_a"),
    "ranks that differ": ({**GOOD, f"{Q}.lora_b": numbers(2, 3, 3)}, {}, "do not belong together"),
    "a magnitude without DoRA": ({**GOOD, f"{Q}.m": numbers(3, 3)}, {}, "unexpected m"),
    "DoRA without magnitudes": (GOOD, {"fine_tune_type": "dora"}, "has no m"),
    "a magnitude too long": (
        {**GOOD, f"{Q}.m": numbers(3, 5)}, {"fine_tune_type": "dora"}, "do not belong together",
    ),
    "no scale": (GOOD, {"parameters": {"rank": 2, "alpha": 16}}, "for a scale"),
    "a scale that is no number": (GOOD, {"parameters": {"scale": "big"}}, "for a scale"),
    "another type": (GOOD, {"fine_tune_type": "qlora"}, "fine_tune_type"),
}  # fmt: skip


@pytest.mark.parametrize(("tensors", "words", "match"), BROKEN.values(), ids=BROKEN)
def test_contradictions_are_refused(
    tensors: dict[str, Any], words: dict[str, Any], match: str, tmp_path: Path
) -> None:
    with pytest.raises(MalformedAdapterError, match=match) as caught:
        load_adapter(write_folder(tmp_path / "a", tensors, **words))
    assert caught.value.hint


def test_a_file_without_its_config_is_refused(tmp_path: Path) -> None:
    save_file(GOOD, tmp_path / "adapters.safetensors")
    with pytest.raises(MalformedAdapterError, match="scale is unknown"):
        load_adapter(tmp_path)


def test_what_mlx_lm_would_refuse_is_told(tmp_path: Path) -> None:
    parameters = {"rank": 8, "scale": 20.0, "dropout": 0.0, "keys": ["mlp.down_proj"]}
    notes = load_adapter(write_folder(tmp_path / "a", GOOD, parameters=parameters)).notes
    assert [word for note in notes for word in ("rank 8", "keys") if word in note] == [
        "rank 8", "keys",
    ]  # fmt: skip


CANNOT: dict[str, tuple[dict[str, LayerDelta], str]] = {
    "DoRA beside LoRA": (
        {
            Q: LoRA(make_tensor(1, 2, 4), make_tensor(2, 6, 2), 4.0),
            DOWN: DoRA(LoRA(make_tensor(1, 2, 4), make_tensor(2, 6, 2), 4.0), make_tensor(3, 6)),
        },
        "all layers or none",
    ),
    "a table's DoRA as PEFT has it": (
        {
            "model.embed_tokens": DoRA(
                LoRA(make_tensor(1, 2, 4), make_tensor(2, 6, 2), 4.0, role="embedding"),
                make_tensor(3, 6),
            )
        },
        "a table's rows",
    ),
    "a convolution": (
        {"conv": LoRA(make_tensor(1, 2, 4, 3), make_tensor(2, 6, 2, 1), 4.0)}, "convolution",
    ),
    "a trained bias": (
        {Q: LoRA(make_tensor(1, 2, 4), make_tensor(2, 6, 2), 4.0, make_tensor(3, 6))}, "bias",
    ),
    "an image tower": (
        {"model.visual.blocks.0.attn.qkv": LoRA(make_tensor(1, 2, 4), make_tensor(2, 6, 2), 4.0)},
        "language model",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layers", "match"), CANNOT.values(), ids=CANNOT)
def test_what_mlx_lm_cannot_load_is_not_written(
    layers: dict[str, LayerDelta], match: str, tmp_path: Path
) -> None:
    with pytest.raises((UnsupportedError, OutputError), match=match) as caught:
        save_adapter(Adapter(layers, naming="mlx"), tmp_path / "out", format="mlx")
    assert "merge" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_an_image_adapter_is_refused(tmp_path: Path) -> None:
    source = GOLDEN.parent / "kohya"
    path = next(source.glob("*.safetensors"))
    with pytest.raises(UnsupportedError, match="image"):
        loratools.convert_adapter(path, tmp_path / "out", to="mlx")


# ── the other commands ───────────────────────────────────────────────────────────────────────


def test_composed_with_peft_it_is_the_sum(tmp_path: Path) -> None:
    loratools.convert_adapter(GOLDEN / "lora", tmp_path / "peft", to="peft")
    loratools.compose_adapters(
        [(GOLDEN / "lora", 1.0), (tmp_path / "peft", 0.5)], tmp_path / "sum", to="mlx"
    )
    one, total = load_adapter(GOLDEN / "lora"), load_adapter(tmp_path / "sum")
    assert total.naming == "mlx"
    for path, delta in one.layers.items():
        wanted = 1.5 * change_of(delta)
        np.testing.assert_allclose(change_of(total.layers[path]), wanted, rtol=1e-4, atol=1e-5)


def test_resized_it_is_of_one_rank(tmp_path: Path) -> None:
    loratools.resize_adapter(GOLDEN / "lora", tmp_path / "small", rank=2)
    config = json.loads((tmp_path / "small" / "adapter_config.json").read_text())
    assert config["lora_parameters"]["rank"] == 2
    one, small = load_adapter(GOLDEN / "lora"), load_adapter(tmp_path / "small")
    for path, delta in one.layers.items():
        change = change_of(delta)
        values = np.linalg.svd(change, compute_uv=False)
        error = np.linalg.norm(change - change_of(small.layers[path]))
        np.testing.assert_allclose(error, values[2], rtol=1e-3)


def test_it_goes_to_gguf_and_back(tmp_path: Path) -> None:
    source = GOLDEN / "sources" / "mixture"
    loratools.convert_adapter(GOLDEN / "mixture", tmp_path / "a.gguf", to="gguf", base=source)
    loratools.convert_adapter(tmp_path / "a.gguf", tmp_path / "back", to="mlx", base=source)
    one, back = load_adapter(GOLDEN / "mixture"), load_adapter(tmp_path / "back")
    assert one.layers.keys() == back.layers.keys()
    for path, delta in one.layers.items():
        found = change_of(back.layers[path])
        np.testing.assert_allclose(found, change_of(delta), rtol=1e-4, atol=1e-5)


def test_inspect_says_what_it_is() -> None:
    facts = loratools.summarize(GOLDEN / "lora").facts
    assert (facts["format"], facts["base_model"]) == ("mlx", "example/tiny")
    assert facts["ranks"] == {"3": facts["layers"]}


# ── tied embeddings ──────────────────────────────────────────────────────────────────────────


def tied_base(folder: Path) -> Path:
    folder.mkdir()
    words = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**words, "tie_word_embeddings": True}))
    table = {"model.embed_tokens.weight": numbers(5, 7, 3), "model.norm.weight": numbers(6, 3)}
    save_file(table, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_tied_table_stays_tied(tmp_path: Path) -> None:
    """mlx-lm's output head is the changed table; PEFT's is not, unless it is changed too."""
    base, name = tied_base(tmp_path / "base"), "model.embed_tokens"
    a, b = numbers(1, 7, 2), numbers(2, 2, 3)
    path = write_folder(tmp_path / "mlx", {f"{name}.lora_a": a, f"{name}.lora_b": b})
    loratools.convert_adapter(path, tmp_path / "peft", to="peft", base=base)
    head = load_adapter(tmp_path / "peft").layers["lm_head"]
    np.testing.assert_allclose(change_of(head), product(a, b, 20.0).T, rtol=1e-6)
    for adapter in (path, tmp_path / "peft"):
        loratools.merge_into_base(base, adapter, tmp_path / "merged", overwrite=True)
        found = load_file(tmp_path / "merged" / "model.safetensors")
        assert found.keys() == {"model.embed_tokens.weight", "model.norm.weight"}
        wanted = numbers(5, 7, 3) + product(a, b, 20.0).T
        np.testing.assert_allclose(found["model.embed_tokens.weight"], wanted, rtol=1e-5, atol=1e-5)
    loratools.convert_adapter(tmp_path / "peft", tmp_path / "back", to="mlx", base=base)
    assert list(load_adapter(tmp_path / "back").layers) == [name]


@pytest.mark.parametrize("path", ["model.embed_tokens", "lm_head"])
def test_a_change_of_one_of_two_tied_is_refused(path: str, tmp_path: Path) -> None:
    base, table = tied_base(tmp_path / "base"), path != "lm_head"
    sizes = (7, 3) if table else (3, 7)
    factors = make_tensor(1, 2, sizes[0]), make_tensor(2, sizes[1], 2)
    lora = LoRA(*factors, 4.0, role="embedding" if table else "linear")
    save_adapter(Adapter({path: lora}), tmp_path / "peft")
    with pytest.raises(UnsupportedError, match="ties its embeddings") as caught:
        loratools.convert_adapter(tmp_path / "peft", tmp_path / "mlx", to="mlx", base=base)
    assert "merge" in (caught.value.hint or "")
