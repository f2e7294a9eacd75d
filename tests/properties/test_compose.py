"""Composing is linear in ΔW, whatever ranks, alphas, formats and parameterisations meet.

The oracle is Σ wᵢ·alphaᵢ/rankᵢ·upᵢ·downᵢ in float64, from tensors drawn here.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from loratools.adapter import Adapter, in_natural_order
from loratools.adapter_io import load_adapter, save_adapter
from loratools.compose import compose_adapters
from loratools.deltas import AdditiveDelta, LayerDelta, LoRA, SumDelta
from tests.contracts.diffusion_kinds import change_of, fulls, lohas, tuckers
from tests.strategies import dtypes, loras, make_tensor, ranks

# Every example writes and syncs several files.
FEWER = settings(max_examples=max(1, settings().max_examples // 4))
PATHS = ("model.layers.0.self_attn.q_proj", "model.layers.2.mlp.up_proj", "model.layers.10.fc1")
weights = st.sampled_from((1.0, 0.7, -0.3, 2.5, -1.0, 1e-3))

Changes = dict[str, Tensor]


def formula(lora: LoRA) -> Tensor:
    """alpha/rank · up · down in float64, flattened to two axes."""
    scale = lora.alpha / lora.down.shape[0]
    return scale * lora.up.double().flatten(1) @ lora.down.double().flatten(1)


def changes(path: Path) -> Changes:
    """Every ΔW of a file; PEFT's reading of alpha and rank is tested elsewhere."""
    found = {}
    for name, delta in load_adapter(path).layers.items():
        found[name] = formula(delta) if isinstance(delta, LoRA) else dense(delta)
    return found


def dense(delta: LayerDelta) -> Tensor:
    shape = delta.weight_shape
    return change_of(delta, torch.zeros(shape)).double().reshape(shape[0], -1)


def assert_sum(found: Changes, terms: list[Changes], tolerance: float = 1e-6) -> None:
    """Assert that every layer is the sum of the terms that have it."""
    assert found.keys() == {path for term in terms for path in term}
    for path, change in found.items():
        there = [term[path] for term in terms if path in term]
        size = sum(float(term.norm()) for term in there)
        assert float((change - sum(there)).norm()) <= tolerance * size


def scaled(change: Changes, weight: float) -> Changes:
    return {path: weight * tensor for path, tensor in change.items()}


# ── PEFT ─────────────────────────────────────────────────────────────────────────────────────


@st.composite
def peft_adapters(draw: st.DrawFn, folder: Path, shapes: Mapping[str, tuple[int, int]]) -> Changes:
    """Write an adapter by hand, with its own rank, alpha, rsLoRA and dtype; return its ΔW."""
    rank, alpha, stabilised = draw(ranks), draw(st.sampled_from((1, 3, 16.5))), draw(st.booleans())
    dtype, seed = draw(dtypes), draw(st.integers(0, 2**20))
    chosen = [*draw(st.lists(st.sampled_from(PATHS[1:]), unique=True)), PATHS[0]]
    tensors, exact = {}, {}
    for place, path in enumerate(chosen):
        out, inner = shapes[path]
        up = make_tensor(seed + 2 * place, out, rank, dtype=dtype)
        down = make_tensor(seed + 2 * place + 1, rank, inner, dtype=dtype)
        tensors[f"base_model.model.{path}.lora_A.weight"] = down
        tensors[f"base_model.model.{path}.lora_B.weight"] = up
        scale = alpha / (rank**0.5 if stabilised else rank)
        exact[path] = scale * up.double() @ down.double()
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "use_rslora": stabilised,
        "target_modules": chosen,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return exact


@FEWER
@given(data=st.data(), shared=st.tuples(weights, weights))
def test_a_weighted_sum_of_peft_adapters(data: st.DataObject, shared: tuple[float, float]) -> None:
    side = st.integers(1, 12)
    shapes = {path: (data.draw(side), data.draw(side)) for path in PATHS}
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        first = data.draw(peft_adapters(folder / "a", shapes))
        second = data.draw(peft_adapters(folder / "b", shapes))
        inputs = [(folder / "a", shared[0]), (folder / "b", shared[1])]
        terms = [scaled(first, shared[0]), scaled(second, shared[1])]
        for method in ("linear", "svd"):
            compose_adapters(inputs, folder / method, method=method)
            assert_sum(changes(folder / method), terms)


# ── every parameterisation that can be added ─────────────────────────────────────────────────

SHAPES = {"lora_unet_one": (6, 4), "lora_unet_two": (5, 3, 3, 3), "lora_unet_three": (7, 7)}


@st.composite
def with_differences(draw: st.DrawFn, *, shape: tuple[int, ...]) -> SumDelta:
    """A low-rank change beside a full one."""
    return SumDelta((draw(loras(shape=shape)), draw(fulls(shape=shape))))


@st.composite
def additive(draw: st.DrawFn, shape: tuple[int, ...]) -> AdditiveDelta:
    kinds = [loras, lohas, with_differences, fulls] + ([tuckers] if len(shape) > 2 else [])
    delta = draw(draw(st.sampled_from(kinds))(shape=shape))
    return delta.reshaped(shape)


@st.composite
def mixed(draw: st.DrawFn) -> Adapter:
    chosen = [*draw(st.lists(st.sampled_from(list(SHAPES)[1:]), unique=True)), "lora_unet_one"]
    layers = {path: draw(additive(SHAPES[path])) for path in chosen}
    return Adapter(in_natural_order(layers), naming="kohya")


@FEWER
@given(adapters=st.tuples(mixed(), mixed()), shares=st.tuples(weights, weights))
def test_a_weighted_sum_of_mixed_parameterisations(
    adapters: tuple[Adapter, Adapter], shares: tuple[float, float]
) -> None:
    with tempfile.TemporaryDirectory() as text:
        paths = [Path(text) / name for name in ("a.safetensors", "b.safetensors")]
        for adapter, path in zip(adapters, paths, strict=True):
            save_adapter(adapter, path, format="kohya")
        out = Path(text) / "out.safetensors"
        compose_adapters(list(zip(paths, shares, strict=True)), out)
        terms = [scaled(changes(p), w) for p, w in zip(paths, shares, strict=True)]
        assert_sum(changes(out), terms, 2e-6)
        assert_biases(out, paths, shares)


def assert_biases(out: Path, paths: list[Path], shares: tuple[float, float]) -> None:
    """Biases add up too."""
    read = [load_adapter(path).layers for path in paths]
    for name, delta in load_adapter(out).layers.items():
        terms = [
            w * layers[name].bias_change.double()  # type: ignore[union-attr]
            for w, layers in zip(shares, read, strict=True)
            if name in layers and layers[name].bias_change is not None
        ]
        if terms:
            assert delta.bias_change is not None
            torch.testing.assert_close(delta.bias_change.double(), sum(terms), rtol=1e-5, atol=1e-4)
        else:
            assert delta.bias_change is None


def item_size(terms: list[Changes], path: str) -> float:
    return sum(float(term[path].norm()) for term in terms if path in term)


# ── what the report says ─────────────────────────────────────────────────────────────────────


@FEWER
@given(data=st.data(), shares=st.tuples(weights, weights), rank=st.integers(1, 3))
def test_the_reported_error_is_the_true_error_and_no_rank_is_better(
    data: st.DataObject, shares: tuple[float, float], rank: int
) -> None:
    shapes = dict.fromkeys(PATHS, (9, 7))
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        terms = [
            scaled(data.draw(peft_adapters(folder / name, shapes)), weight)
            for name, weight in zip("ab", shares, strict=True)
        ]
        inputs = [(folder / name, weight) for name, weight in zip("ab", shares, strict=True)]
        report = compose_adapters(inputs, folder / "out", rank=rank)
        made = changes(folder / "out")
        for item in report.items:
            exact = sum(term[item["module"]] for term in terms if item["module"] in term)
            values = torch.linalg.svdvals(exact)
            missed = float((made[item["module"]] - exact).norm())
            assert missed <= float(values[rank:].norm()) + 1e-5 * item_size(terms, item["module"])
            if float(exact.norm()) > 1e-3 * item_size(terms, item["module"]):
                assert abs(item["relative_error"] - missed / float(exact.norm())) <= 1e-5
