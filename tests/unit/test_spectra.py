"""Spectra of adapters against the SVD of the dense float64 matrix that each formula gives."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Adapter
from loratools.deltas import (
    BOFT,
    IA3,
    OFT,
    AdditiveDelta,
    DoRA,
    ExpertLoRA,
    FullDelta,
    LayerDelta,
    LoRA,
    MovedBase,
)
from loratools.spectra.figures import common_rank, group_layers, spectrum_facts
from loratools.spectra.layers import AdapterSpectrum, LayerSpectrum, measure_spectrum
from loratools.spectra.places import Place, place_of, short_names
from tests.contracts.diffusion_kinds import change_of, diffusion_kinds
from tests.strategies import loras, make_tensor

ADDITIVE = {**diffusion_kinds, "lora": loras()}


def lora(seed: int, out: int = 6, width: int = 5, rank: int = 3, alpha: float = 2.0) -> LoRA:
    return LoRA(make_tensor(seed, rank, width), make_tensor(seed + 1, out, rank), alpha)


def dense_values(delta: LayerDelta) -> np.ndarray:
    """Return the singular values of ΔW, by the formula, in float64."""
    change = change_of(delta, torch.zeros(delta.weight_shape)).numpy()
    return np.linalg.svd(change.reshape(len(change), -1), compute_uv=False)


def one(delta: LayerDelta) -> LayerSpectrum:
    (layer,) = measure_spectrum(Adapter({"a": delta})).layers
    return layer


def of_values(*rows: list[float]) -> AdapterSpectrum:
    layers = (
        LayerSpectrum(f"h.{n}.q", "lora", (9, 9), torch.tensor(row, dtype=torch.float64))
        for n, row in enumerate(rows)
    )
    return AdapterSpectrum(tuple(layers), {})


# ── values ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("kind", ["lora", "tucker", "loha", "lokr", "full", "sparse", "sum"])
@settings(max_examples=30)
@given(data=st.data())
def test_values_are_those_of_the_dense_matrix(kind: str, data: st.DataObject) -> None:
    delta: AdditiveDelta = data.draw(ADDITIVE[kind])
    wanted, layer = dense_values(delta), one(delta)
    found = layer.values.numpy()
    largest = max(wanted[0], 1e-30)
    count = min(len(wanted), len(found))
    # Sums and LoHa products are rounded to float32 on their way.
    assert np.abs(found[:count] - wanted[:count]).max() <= 2e-6 * largest * math.sqrt(len(wanted))
    assert max([0.0, *wanted[count:], *found[count:]]) <= 1e-5 * largest
    assert layer.norm == pytest.approx(float(np.linalg.norm(wanted)), rel=1e-5, abs=1e-30)


def test_each_expert_has_a_spectrum() -> None:
    stack = ExpertLoRA(make_tensor(1, 3, 2, 5), make_tensor(2, 3, 6, 2), 4.0)
    found = measure_spectrum(Adapter({"h.0.experts.up": stack})).layers
    assert [layer.module for layer in found] == [f"h.0.experts.up[{n}]" for n in range(3)]
    for number, layer in enumerate(found):
        change = 2.0 * stack.up[number].double() @ stack.down[number].double()
        wanted = np.linalg.svd(change.numpy(), compute_uv=False)[:2]
        assert layer.values.numpy() == pytest.approx(wanted, rel=1e-6)


def test_inner_changes_of_what_depends_on_the_base() -> None:
    inner = lora(3)
    dora = one(DoRA(inner, torch.ones(6)))
    moved = one(MovedBase(inner, "pissa"))
    for layer, kind in ((dora, "dora"), (moved, "moved_base")):
        assert layer.kind == kind
        assert layer.part is not None
        assert layer.values[:3].numpy() == pytest.approx(dense_values(inner)[:3], rel=1e-6)


def test_what_has_no_spectrum_is_listed_with_the_reason() -> None:
    broken = lora(5)
    broken.up[0, 0] = math.inf
    bias = FullDelta(None, torch.ones(4))
    layers: dict[str, LayerDelta] = {
        "oft": OFT(make_tensor(1, 2, 3, 3), 0.0, shape=(6, 4)),
        "boft": BOFT(make_tensor(1, 1, 2, 2, 2), shape=(4, 4)),
        "ia3": IA3(make_tensor(1, 4), True, shape=(6, 4)),
        "broken": broken,
        "bias": bias,
        "sound": lora(7),
    }
    found = measure_spectrum(Adapter(layers))
    assert [layer.module for layer in found.layers] == ["sound"]
    assert found.uncovered.keys() == layers.keys() - {"sound"}
    assert "NaN or infinity" in found.uncovered["broken"]
    assert "base" in found.uncovered["oft"]


# ── measures ─────────────────────────────────────────────────────────────────────────────────

spectra = st.lists(st.floats(1e-3, 10), min_size=1, max_size=6).map(
    lambda values: sorted(values, reverse=True)
)


@given(spectra, st.sampled_from((0.95, 0.99)))
def test_ranks_by_their_formulas(values: list[float], share: float) -> None:
    (layer,) = of_values(values).layers
    total = sum(values)
    entropy = -sum(v / total * math.log(v / total) for v in values)
    assert layer.effective_rank == pytest.approx(math.exp(entropy), rel=1e-12)
    energy = sum(v * v for v in values)
    assert layer.stable_rank == pytest.approx(energy / values[0] ** 2, rel=1e-12)
    kept = layer.energy_rank(share)
    assert sum(v * v for v in values[:kept]) >= share * energy * (1 - 1e-12)
    assert sum(v * v for v in values[: kept - 1]) < share * energy


@given(st.lists(spectra, min_size=1, max_size=4), st.sampled_from((0.5, 0.95, 0.99)))
def test_one_rank_for_all_layers(rows: list[list[float]], share: float) -> None:
    """The least rank at which the layers together keep the share, by trying every rank."""
    found = common_rank(of_values(*rows).layers, share)
    whole = sum(v * v for row in rows for v in row)

    def keeps(rank: int) -> float:
        return sum(v * v for row in rows for v in row[:rank]) / whole

    assert keeps(found) >= share - 1e-12
    assert found == 1 or keeps(found - 1) < share + 1e-12


def test_a_change_that_is_zero() -> None:
    still = LoRA(make_tensor(1, 2, 4), torch.zeros(6, 2), 2.0)
    spectrum = measure_spectrum(Adapter({"h.0.q": still, "h.1.q": lora(3)}))
    layer = spectrum.layers[0]
    assert (layer.norm, layer.effective_rank, layer.stable_rank) == (0, 0, 0)
    assert layer.energy_rank(0.95) == 0
    alone = spectrum_facts(measure_spectrum(Adapter({"h.0.q": still})), "transformers")
    assert alone["suggested_ranks"]["0.99"] == {
        "all_layers": 0,
        "by_layer": {"min": 0, "median": 0, "max": 0},
    }


# ── facts ────────────────────────────────────────────────────────────────────────────────────


def test_facts() -> None:
    """Shares, spreads and energies, from values that can be reckoned by hand."""
    facts = spectrum_facts(of_values([3.0, 1.0], [2.0, 2.0], [1.0]), "transformers")
    whole = 9 + 1 + 4 + 4 + 1
    assert facts["layers_covered"] == 3
    assert facts["energy_at_rank"] == pytest.approx({"1": 14 / whole, "2": 1.0})
    assert facts["suggested_ranks"]["0.95"] == {
        "all_layers": 2,
        "by_layer": {"min": 1, "median": 2, "max": 2},
    }
    assert facts["stable_rank"] == pytest.approx({"min": 1.0, "median": 10 / 9, "max": 2.0})
    (kind,) = facts["by_module"]
    assert (kind["module"], kind["layers"], kind["network"]) == ("q", 3, None)
    assert kind["norm"] == pytest.approx(math.sqrt(whole))
    rows = facts["by_layer"]
    assert [row["share_of_energy"] for row in rows] == pytest.approx(
        [10 / whole, 8 / whole, 1 / whole]
    )
    assert [row["singular_values"] for row in rows] == [[3.0, 1.0], [2.0, 2.0], [1.0]]
    assert rows[0]["energy_at_rank"] == pytest.approx({"1": 0.9, "2": 1.0})


def test_the_schema_of_the_facts() -> None:
    """What scripts rely on; a change of these names is a change of the schema."""
    facts = spectrum_facts(measure_spectrum(Adapter({"h.0.q": lora(1)})), "transformers")
    json.dumps(facts, allow_nan=False)
    assert list(facts) == [
        "layers_covered", "not_covered", "covered_in_part", "rule", "suggested_ranks",
        "energy_at_rank", "effective_rank", "stable_rank", "by_module", "by_layer",
    ]  # fmt: skip
    assert list(facts["by_layer"][0]) == [
        "module", "kind", "part", "shape", "norm", "share_of_energy", "effective_rank",
        "stable_rank", "suggested_ranks", "energy_at_rank", "singular_values",
    ]  # fmt: skip
    assert list(facts["by_module"][0]) == [
        "network", "module", "layers", "norm", "share_of_energy", "effective_rank",
        "stable_rank", "suggested_ranks",
    ]  # fmt: skip


def test_nothing_to_measure() -> None:
    facts = spectrum_facts(measure_spectrum(Adapter({})), "transformers")
    assert (facts["layers_covered"], facts["by_layer"], facts["effective_rank"]) == (0, [], None)


# ── places ───────────────────────────────────────────────────────────────────────────────────

_ATTENTION = "attentions.1.transformer_blocks.7"
PLACES: Mapping[str, tuple[str, str, str]] = {
    "model.layers.3.self_attn.q_proj": ("", "model.layers.3", "self_attn.q_proj"),
    "lm_head": ("", "", "lm_head"),
    "transformer.h.10.attn.c_attn": ("", "transformer.h.10", "attn.c_attn"),
    "encoder.layer.2.attention.self.query": ("", "encoder.layer.2", "attention.self.query"),
    "encoder.block.4.layer.0.SelfAttention.q": ("", "encoder.block.4", "layer.0.SelfAttention.q"),
    "model.layers.1.mlp.experts.17.w1": ("", "model.layers.1", "mlp.experts.w1"),
    "model.layers.1.mlp.experts.up[3]": ("", "model.layers.1", "mlp.experts.up"),
    f"unet.down_blocks.2.{_ATTENTION}.ff.net.0.proj": (
        "unet", f"down_blocks.2.{_ATTENTION}", "ff.net.0.proj"
    ),
    f"unet.down_blocks.2.{_ATTENTION}.attn1.to_out.0": (
        "unet", f"down_blocks.2.{_ATTENTION}", "attn1.to_out.0"
    ),
    "unet.mid_block.attentions.0.proj_in": ("unet", "mid_block.attentions.0", "proj_in"),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (
        "lora_unet", "input_blocks_4_1_transformer_blocks_0", "attn1_to_q"
    ),
    "lora_te1_text_model_encoder_layers_11_mlp_fc1": (
        "lora_te1", "text_model_encoder_layers_11", "mlp_fc1"
    ),
    "lora_unet_double_blocks_0_img_mlp_2": ("lora_unet", "double_blocks_0", "img_mlp_2"),
    "oft_unet_img_in": ("oft_unet", "", "img_in"),
    "diffusion_model.single_blocks.37.linear2": ("diffusion_model", "single_blocks.37", "linear2"),
    "unet.time_embedding.linear_1": ("unet", "", "time_embedding.linear_1"),
}  # fmt: skip
"""Path → network, block, module; paths without a network are PEFT's."""


@pytest.mark.parametrize("path", PLACES)
def test_places(path: str) -> None:
    network, block, module = PLACES[path]
    assert place_of(path, networks=bool(network)) == Place(network, block, module)


def test_short_names_tell_modules_apart() -> None:
    names = ["self_attn.q_proj", "cross_attn.q_proj", "mlp.fc1", "attn.to_out.0", "ff.to_out.0"]
    assert short_names(names) == {
        "self_attn.q_proj": "self_attn.q_proj",
        "cross_attn.q_proj": "cross_attn.q_proj",
        "mlp.fc1": "fc1",
        "attn.to_out.0": "attn.to_out.0",
        "ff.to_out.0": "ff.to_out.0",
    }


def test_groups_are_networks_and_kinds() -> None:
    layers: dict[str, LayerDelta] = {
        f"{network}.blocks.{n}.{module}": lora(n)
        for network in ("unet", "text_encoder")
        for n in range(2)
        for module in ("q", "k")
    }
    groups = group_layers(measure_spectrum(Adapter(layers)), "diffusers")
    assert {(g.network, g.module): len(g.layers) for g in groups} == {
        (network, module): 2 for network in ("unet", "text_encoder") for module in ("q", "k")
    }
