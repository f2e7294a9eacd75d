"""Changing a rank, in terms of ΔW: against the dense SVD in float64, for every kind."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loratools.adapter import Adapter
from loratools.compute import Compute
from loratools.deltas import AdditiveDelta, ExpertLoRA, FullDelta, LoRA, SumDelta
from loratools.deltas.resizing import resized_delta, squared_error
from loratools.deltas.spectra import spectra_of_layers
from loratools.deltas.spectral import delta_svd
from loratools.formats import get_format
from loratools.resizing.ranks import RankRule
from loratools.svd_resize import resize_value
from tests.resize_cases import NAMES, SEEDS, Case, dense_of, make_case
from tests.strategies import make_tensor

every_kind = pytest.mark.parametrize("name", NAMES)
few = settings(max_examples=12)
ROUNDING = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def spectrum_of(case: Case):  # type: ignore[no-untyped-def]
    return spectra_of_layers({"layer": case.delta})["layer"]


def norm(tensor: torch.Tensor) -> float:
    return float(tensor.norm())


def stored_dtype(case: Case) -> torch.dtype:
    return next(iter(case.delta.tensors().values())).dtype


# ── spectra ──────────────────────────────────────────────────────────────────────────────────


@every_kind
@given(seed=SEEDS)
@few
def test_values_are_those_of_the_dense_matrix(name: str, seed: int) -> None:
    case = make_case(name, seed)
    found = spectrum_of(case).values
    dense = torch.linalg.svdvals(case.dense)
    if dense.dim() > 1:
        dense = dense.square().sum(0).sqrt()
    largest = float(dense[0])
    rest = dense[len(found) :]
    assert float(rest.sum()) <= 1e-6 * largest
    # Dense matrices are decomposed in float32: an absolute error, as any float32 SVD has.
    slack = 1e-6 if name == "loha dense" else 1e-7
    assert torch.allclose(found, dense[: len(found)], rtol=1e-5, atol=slack * largest)


@every_kind
def test_the_svd_of_a_layer_is_that_of_its_change(name: str) -> None:
    case = make_case(name, 3)
    if isinstance(case.delta, ExpertLoRA):
        return
    spectrum = spectrum_of(case)
    for found in (delta_svd(case.delta), spectrum.leading(len(spectrum.values))):
        rebuilt = (found.left.double() * found.values.double()) @ found.right.double()
        assert norm(rebuilt - case.dense) <= 1e-6 * norm(case.dense)


def test_layers_of_one_shape_are_taken_together_and_kept_apart() -> None:
    """Groups, chunks and threads give each layer the spectrum it has alone."""
    layers = {f"{name} {seed}": make_case(name, seed).delta for name in NAMES for seed in range(5)}
    together = spectra_of_layers(layers, Compute("cpu", 3))
    assert list(together) == list(layers)
    for path, delta in layers.items():
        alone = spectra_of_layers({"": delta})[""]
        assert torch.allclose(alone.values, together[path].values, rtol=1e-12, atol=1e-12)


# ── one layer ────────────────────────────────────────────────────────────────────────────────


@every_kind
@given(seed=SEEDS, rank=st.integers(1, 9), balanced=st.booleans())
@few
def test_truncation_is_optimal_and_its_error_true(
    name: str, seed: int, rank: int, balanced: bool
) -> None:
    case = make_case(name, seed)
    spectrum = spectrum_of(case)
    new = resized_delta(spectrum, rank, balanced=balanced)
    assert new.rank == rank
    assert new.weight_shape == case.delta.weight_shape
    assert {t.dtype for t in new.tensors().values()} == {stored_dtype(case)}
    true = norm(dense_of(new) - case.dense)
    whole = norm(case.dense)
    tail = norm(torch.linalg.svdvals(case.dense)[..., rank:])
    assert true <= tail + ROUNDING[stored_dtype(case)] * whole
    reported = math.sqrt(squared_error(spectrum, new))
    assert reported == pytest.approx(true, rel=1e-5, abs=3e-7 * whole)


@every_kind
@given(seed=SEEDS)
@few
def test_full_rank_is_the_identity(name: str, seed: int) -> None:
    case = make_case(name, seed)
    spectrum = spectrum_of(case)
    new = resized_delta(spectrum, max(1, len(spectrum.values)), dtype=torch.float32)
    assert norm(dense_of(new) - case.dense) <= 1e-6 * norm(case.dense)


@every_kind
def test_zeros_are_padding(name: str) -> None:
    """A larger rank than there is changes nothing, to the rounding of one product."""
    case = make_case(name, 8)
    new = resized_delta(spectrum_of(case), 60, dtype=torch.float64)
    assert new.rank == 60
    assert norm(dense_of(new) - case.dense) <= 2e-6 * norm(case.dense)
    old = case.delta
    if isinstance(old, (LoRA, ExpertLoRA)):
        assert torch.equal(new.up[..., : old.rank] if old.up.dim() == 3 else new.up[:, : old.rank],
                           old.up.double())  # fmt: skip
        assert new.alpha / new.rank == pytest.approx(old.alpha / old.rank)


@every_kind
def test_the_scale_is_kept(name: str) -> None:
    case = make_case(name, 2)
    scale = getattr(case.delta, "scale", None)
    new = resized_delta(spectrum_of(case), 2)
    assert new.alpha / 2 == pytest.approx(new.scale)
    if scale is not None:
        assert new.scale == pytest.approx(scale)
    assert not any(bool(torch.isnan(tensor).any()) for tensor in new.tensors().values())


def test_singular_values_are_shared_or_stay_above() -> None:
    case = make_case("linear", 5)
    spectrum = spectrum_of(case)
    even = resized_delta(spectrum, 2, balanced=True)
    above = resized_delta(spectrum, 2, balanced=False)
    assert torch.allclose(even.up.norm(dim=0), even.down.norm(dim=1), rtol=1e-5)
    assert torch.allclose(above.down.norm(dim=1), torch.ones(2), rtol=1e-5)


# ── whole adapters ───────────────────────────────────────────────────────────────────────────

KOHYA = get_format("kohya")


def adapter_of(layers: dict[str, AdditiveDelta]) -> Adapter:
    return Adapter(layers, naming="kohya", metadata={"ss_network_dim": "4"})


def errors(adapter: Adapter, rule: RankRule, **options: object) -> tuple[float, float, Adapter]:
    """Return the reported and the true relative error over all layers, and the result."""
    done = resize_value(adapter, rule, KOHYA, **options)  # type: ignore[arg-type]
    squares = sum(one.squared_error for one in done.layers)
    energy = sum(one.layer.energy for one in done.layers)
    pairs = [(adapter.layers[path], done.adapter.layers[path]) for path in adapter.layers]
    lost = sum(norm(whole_of(a) - whole_of(b)) ** 2 for a, b in pairs)
    whole = sum(norm(whole_of(a)) ** 2 for a, _ in pairs)
    return math.sqrt(squares / energy), math.sqrt(lost / whole), done.adapter


def whole_of(delta: object) -> torch.Tensor:
    assert isinstance(delta, LoRA)
    return dense_of(delta)


@st.composite
def plain_layers(draw: st.DrawFn) -> dict[str, AdditiveDelta]:
    count, seed = draw(st.integers(1, 4)), draw(SEEDS)
    kinds = ("linear", "square", "half", "convolution", "deficient", "wide rank")
    names = [draw(st.sampled_from(kinds)) for _ in range(count)]
    return {f"lora_unet_{n}": make_case(k, seed + 7 * n).delta for n, k in enumerate(names)}


RULES = st.one_of(
    st.integers(1, 4).map(lambda n: RankRule(rank=n)),
    st.floats(0.05, 1).map(lambda f: RankRule(energy=f)),
    st.floats(0.05, 1).map(lambda f: RankRule(energy=f, everywhere=True)),
    st.floats(1, 50).map(lambda x: RankRule(sv_ratio=x)),
    st.floats(0.05, 1).map(lambda f: RankRule(sv_cumulative=f)),
    st.floats(0.05, 1).map(lambda f: RankRule(sv_fro=f)),
    st.floats(1, 5).map(lambda f: RankRule(mean_rank=f)),
    st.integers(3000, 6000).map(lambda n: RankRule(max_size=n)),
)


@given(plain_layers(), RULES)
@settings(max_examples=60)
def test_the_overall_error_is_the_true_one(
    layers: dict[str, AdditiveDelta], rule: RankRule
) -> None:
    reported, true, _ = errors(adapter_of(layers), rule)
    assert reported == pytest.approx(true, rel=1e-5, abs=3e-7)


@given(plain_layers(), st.integers(200, 4000))
@settings(max_examples=40)
def test_a_size_is_never_exceeded_and_well_used(
    layers: dict[str, AdditiveDelta], spare: int
) -> None:
    adapter = adapter_of(layers)
    least = _nbytes(resize_value(adapter, RankRule(rank=1), KOHYA).adapter)
    limit = least + spare
    found = resize_value(adapter, RankRule(max_size=limit), KOHYA)
    assert _nbytes(found.adapter) <= limit
    # No layer that could have another step has room for it (four bytes for each alpha).
    room = limit - _nbytes(found.adapter) - 4 * len(layers)
    for one in found.layers:
        values = one.layer.spectrum.values
        if one.rank < len(values) and float(values[one.rank]) > 0:
            step = sum(t.nbytes for t in one.delta.tensors().values()) // one.rank
            assert step > room


def test_an_alpha_that_needs_more_bytes_is_counted() -> None:
    """1 + 2⁻¹⁰ is a half-precision number and three times it is not: its alpha takes four bytes."""
    case = make_case("half", 3).delta
    assert isinstance(case, LoRA)
    delta = replace(case, alpha=4 * (1 + 2.0**-10))
    one = resize_value(adapter_of({"lora_unet_a": delta}), RankRule(rank=1), KOHYA)
    step = sum(delta.weight_shape) * 2
    limit = _nbytes(one.adapter) + 2 * step
    tight = resize_value(adapter_of({"lora_unet_a": delta}), RankRule(max_size=limit), KOHYA)
    loose = resize_value(adapter_of({"lora_unet_a": delta}), RankRule(max_size=limit + 2), KOHYA)
    assert [tight.layers[0].rank, loose.layers[0].rank] == [2, 3]
    assert _nbytes(tight.adapter) <= limit
    assert _nbytes(loose.adapter) == limit + 2


def _nbytes(adapter: Adapter) -> int:
    return sum(tensor.nbytes for tensor in KOHYA.write(adapter).tensors.values())


def test_biases_and_sums_keep_what_is_not_a_product() -> None:
    product = make_case("linear", 1).delta
    bias = FullDelta(bias=make_tensor(9, 12))
    layers: dict[str, AdditiveDelta] = {"lora_unet_a": SumDelta((product, bias))}
    new = resize_value(adapter_of(layers), RankRule(rank=2), KOHYA).adapter.layers["lora_unet_a"]
    assert isinstance(new, SumDelta)
    assert new.parts[1] is bias
    several = SumDelta((product, make_case("linear", 6).delta, bias))
    joint = resize_value(adapter_of({"lora_unet_a": several}), RankRule(rank=2), KOHYA).adapter
    change = joint.layers["lora_unet_a"].bias_change
    assert change is not None
    assert torch.allclose(change, make_tensor(9, 12), rtol=1e-6)
    assert getattr(new.parts[0], "rank", None) == 2
    trained = replace(product, bias=make_tensor(4, 12))  # type: ignore[type-var]
    layers = {"lora_unet_a": trained}
    alone = resize_value(adapter_of(layers), RankRule(rank=2), KOHYA).adapter.layers["lora_unet_a"]
    assert alone.bias_change is not None
    assert trained.bias_change is not None
    assert torch.allclose(alone.bias_change, trained.bias_change)
