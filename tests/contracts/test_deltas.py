"""The contract of every parameterisation: a delta that is listed in ``DELTAS`` is tested here."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import math
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import loratools.deltas
from loratools.deltas import (
    DELTAS,
    AdditiveDelta,
    DoRA,
    ExpertLoRA,
    GLoRA,
    LayerDelta,
    LoRA,
    MovedBase,
    Replacement,
    RowFold,
    RowReplacement,
)
from tests.strategies import (
    DTYPES,
    dtypes,
    loras,
    make_tensor,
    strengths,
    tensors,
    weight_shapes,
)
from tests.strategies import deltas_by_kind as plain_kinds

from .diffusion_kinds import (
    CHANGES,
    SHAPES,
    absolute,
    change_of,
    diffusion_kinds,
    formula,
    fulls,
    lohas,
    matrix,
    sums,
    tuckers,
)

Matrix = list[list[float]]
# Every test runs for every kind that is listed, so each may look at fewer examples.
FEWER = settings(max_examples=max(1, settings().max_examples * 2 // 5))


# ── the oracles: W' in float64, written from the papers' formulas, not from the library ─────────


def rows_of(tensor: Tensor) -> Matrix:
    """Return a tensor as rows of Python floats, trailing axes flattened."""
    return tensor.double().reshape(tensor.shape[0], -1).tolist()


def product(delta: LoRA) -> Matrix:
    """Return alpha/r · up · down, one scalar product at a time."""
    up, down = rows_of(delta.up), rows_of(delta.down)
    scale = delta.alpha / len(down)
    columns = list(zip(*down, strict=True))
    return [
        [scale * math.fsum(u * d for u, d in zip(row, column, strict=True)) for column in columns]
        for row in up
    ]


def lora_oracle(delta: LoRA, weight: Tensor) -> Matrix:
    change = product(delta)
    return [
        [w + c for w, c in zip(*rows, strict=True)]
        for rows in zip(rows_of(weight), change, strict=True)
    ]


def dora_oracle(delta: DoRA, weight: Tensor) -> Matrix:
    """Each channel of the axis, its elements in all other axes, gets the length magnitude says."""
    axis = 0 if delta.axis == "out" else 1
    moved = weight.double() + change_of(delta.inner, weight).reshape(weight.shape)
    channels = []
    for channel, magnitude in zip(moved.unbind(axis), delta.magnitude.double(), strict=True):
        norm = math.sqrt(math.fsum(v * v for v in channel.flatten().tolist()))
        # A channel of zeros has no direction: the library leaves it, instead of PEFT's NaN.
        channels.append(channel * magnitude / norm if norm else channel)
    return rows_of(torch.stack(channels, axis))


def experts_oracle(delta: ExpertLoRA, weight: Tensor) -> Matrix:
    stacks = zip(delta.down, delta.up, weight, strict=True)
    return [
        row
        for down, up, matrix in stacks
        for row in lora_oracle(LoRA(down, up, delta.alpha), matrix)
    ]


def moved_base_oracle(delta: MovedBase, weight: Tensor) -> Matrix:
    wide, rank = weight.double(), delta.lora.down.shape[0]
    if delta.start == "olora":
        basis, upper = torch.linalg.qr(wide)
        start = (delta.lora.alpha / rank) * basis[:, :rank] @ upper[:rank]
    else:
        # Eigenvectors of W·Wᵀ in place of an SVD: the projection on the first or last r of them.
        gram = wide @ wide.T if wide.shape[0] <= wide.shape[1] else wide.T @ wide
        _, vectors = torch.linalg.eigh(gram)
        chosen = vectors[:, -rank:] if delta.start == "pissa" else vectors[:, :rank]
        projection = chosen @ chosen.T
        start = projection @ wide if wide.shape[0] <= wide.shape[1] else wide @ projection
    return lora_oracle(delta.lora, wide - start)


def replacement_oracle(delta: Replacement, weight: Tensor) -> Matrix:
    return rows_of(delta.value)


def rows_oracle(delta: RowReplacement, weight: Tensor) -> Matrix:
    result = rows_of(weight)
    for row, index in zip(rows_of(delta.rows), delta.indices, strict=True):
        result[index] = row
    return result


ORACLES: Mapping[type[LayerDelta], Callable[[Any, Tensor], Matrix]] = {
    LoRA: lora_oracle,
    DoRA: dora_oracle,
    ExpertLoRA: experts_oracle,
    MovedBase: moved_base_oracle,
    Replacement: replacement_oracle,
    RowReplacement: rows_oracle,
    **{kind: formula for kind in CHANGES if kind is not LoRA},
}


@st.composite
def doras(draw: st.DrawFn) -> DoRA:
    """In either axis, around any additive change."""
    shape = draw(weight_shapes())
    makers = [loras, lohas, fulls, sums] + ([tuckers] if len(shape) > 2 else [])
    inner = draw(draw(st.sampled_from(makers))(shape=shape)).reshaped(shape)
    axis = draw(st.sampled_from(("out", "in")))
    return DoRA(inner, draw(tensors(shape[axis == "in"], dtype=draw(dtypes))), axis)


deltas_by_kind: Mapping[str, st.SearchStrategy[Any]] = {
    **plain_kinds,
    **diffusion_kinds,
    DoRA.kind: doras(),
}


def expected(delta: LayerDelta, weight: Tensor) -> Tensor:
    """Return W' in float64."""
    return torch.tensor(ORACLES[type(delta)](delta, weight), dtype=torch.float64)


# ── helpers ──────────────────────────────────────────────────────────────────────────────────


def make_weight(delta: LayerDelta, seed: int = 7, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a base weight that the delta fits: a row table may have more rows than it names."""
    shape = delta.weight_shape
    if isinstance(delta, RowReplacement):
        shape = (shape[0] + 2, shape[1])
    return make_tensor(seed, *shape, dtype=dtype)


def assert_near(actual: Tensor, wanted: Tensor, weight: Tensor, tolerance: float = 2e-5) -> None:
    """Assert equality up to float32 rounding, relative to the largest number involved."""
    size = 1 + max(float(wanted.abs().max()), float(weight.double().abs().max()))
    gap = (actual.double().reshape(wanted.shape) - wanted).abs().max()
    assert float(gap) <= tolerance * size


def may_be_transposed(delta: LayerDelta) -> bool:
    """Say whether a base may store the weight the other way round."""
    if isinstance(delta, (Replacement, RowReplacement)):
        return False
    return isinstance(delta, ExpertLoRA) or len(delta.weight_shape) == 2


def tolerance_of(delta: LayerDelta) -> float:
    """Small singular values or row norms magnify float32 rounding."""
    return 2e-3 if isinstance(delta, (MovedBase, DoRA)) else 2e-5


def largest_factor(delta: LayerDelta) -> float:
    """Return a bound on ‖ΔW‖'s terms, which a sum of them may cancel to far less."""
    lora = getattr(delta, "lora", getattr(delta, "inner", delta))
    if type(lora) in CHANGES and lora.additive:
        terms = change_of(absolute(lora), torch.zeros(lora.weight_shape))
    elif isinstance(lora, ExpertLoRA):
        terms = abs(lora.alpha / lora.rank) * (lora.up.double().abs() @ lora.down.double().abs())
    elif isinstance(lora, GLoRA):
        sides = zip((lora.a_left, lora.b_up), (lora.a_right, lora.b_down), strict=True)
        terms = [matrix(left).abs() @ matrix(right).abs() for left, right in sides]
        core = 1.0 if lora.mid is None else float(lora.mid.abs().sum())
        return 1.0 + abs(lora.alpha / lora.rank) * (
            float(terms[0].sum()) * 4 + core * float(terms[1].max())
        )
    else:
        return 1.0
    return 1.0 + float(terms.max())


def as_stored(weight: Tensor, fold: RowFold, *, transposed: bool = False) -> Tensor:
    """Return the matrix whose rows a fold counts: as a base stores it, trailing axes flattened."""
    stored = weight.mT.contiguous() if transposed else weight
    rows = math.prod(stored.shape[: fold.leading])
    return stored.reshape(rows, -1)


def fold_in_blocks(fold: RowFold, stored: Tensor, step: int, *, first: bool = True) -> Tensor:
    """Fold a stored matrix as a merge does, ``step`` rows at a time, and return W + change."""
    step = len(stored) if fold.reach == "whole" else step
    spans = [(start, min(start + step, len(stored))) for start in range(0, len(stored), step)]
    if fold.reach == "two-pass":
        for start, stop in spans:
            fold.measure(substituted(fold, stored, start, stop), start)
    out = torch.empty_like(stored)
    for start, stop in spans:
        block = substituted(fold, stored, start, stop)
        # What a buffer held before must not matter, where the change is written first.
        change = torch.full_like(block, math.nan if first else 1.0)
        fold.add_change(change, block, start, first=first)
        out[start:stop] = block + change
    return out if first else out - 1


def substituted(fold: RowFold, stored: Tensor, start: int, stop: int) -> Tensor:
    block = stored[start:stop].clone()
    fold.substitute(block, start)
    return block


def all_deltas() -> Iterator[type[LayerDelta]]:
    """Yield every concrete parameterisation that a module of the package defines."""
    for found in pkgutil.iter_modules(loratools.deltas.__path__):
        module = importlib.import_module(f"loratools.deltas.{found.name}")
        for value in vars(module).values():
            own = inspect.isclass(value) and value.__module__ == module.__name__
            if own and issubclass(value, LayerDelta) and not inspect.isabstract(value):
                yield value


def test_every_delta_is_listed_and_has_an_oracle() -> None:
    assert set(DELTAS) == set(all_deltas())
    assert set(ORACLES) == set(DELTAS)
    assert set(deltas_by_kind) == {delta.kind for delta in DELTAS}


@pytest.mark.parametrize("kind", [delta.kind for delta in DELTAS])
class TestContract:
    """What every delta keeps."""

    @FEWER
    @given(data=st.data())
    def test_is_frozen(self, kind: str, data: st.DataObject) -> None:
        delta = data.draw(deltas_by_kind[kind])
        for field in dataclasses.fields(delta):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(delta, field.name, None)
        with pytest.raises((AttributeError, TypeError)):
            delta.novelty = 1

    @FEWER
    @given(data=st.data())
    def test_map_tensors(self, kind: str, data: st.DataObject) -> None:
        """The identity gives the same tensors; another function leaves the original alone."""
        delta = data.draw(deltas_by_kind[kind])
        before = {name: tensor.clone() for name, tensor in delta.tensors().items()}
        same = delta.map_tensors(lambda tensor: tensor)
        assert type(same) is type(delta)
        assert all(same.tensors()[name] is tensor for name, tensor in delta.tensors().items())
        doubled = delta.map_tensors(lambda tensor: tensor * 2)
        assert doubled.tensors().keys() == before.keys()
        for name, tensor in before.items():
            assert torch.equal(delta.tensors()[name], tensor)
            assert torch.equal(doubled.tensors()[name], tensor * 2)
        for field in dataclasses.fields(delta):
            if not isinstance(getattr(delta, field.name), (Tensor, LayerDelta, tuple, type(None))):
                assert getattr(doubled, field.name) == getattr(delta, field.name)

    @FEWER
    @given(data=st.data(), seed=st.integers(0, 99))
    def test_strength_zero_is_the_base(self, kind: str, data: st.DataObject, seed: int) -> None:
        delta = data.draw(deltas_by_kind[kind])
        weight = make_weight(delta, seed)
        assert torch.equal(delta.apply(weight, 0.0), weight)

    @FEWER
    @given(data=st.data(), seed=st.integers(0, 99))
    def test_strength_one_is_the_formula(self, kind: str, data: st.DataObject, seed: int) -> None:
        delta = data.draw(deltas_by_kind[kind])
        weight = make_weight(delta, seed)
        wanted = expected(delta, weight)
        tolerance = tolerance_of(delta) * largest_factor(delta)
        actual = delta.apply(weight)
        assert (actual.dtype, actual.shape) == (torch.float32, weight.shape)
        assert_near(actual, wanted, weight, tolerance)

    @FEWER
    @given(data=st.data(), strength=strengths)
    def test_strength_is_the_way_gone(
        self, kind: str, data: st.DataObject, strength: float
    ) -> None:
        """At strength s: W + s·(W' − W), also where the change depends on W."""
        delta = data.draw(deltas_by_kind[kind])
        weight = make_weight(delta)
        formula = expected(delta, weight)
        flat = weight.double().reshape(formula.shape)
        wanted = flat + strength * (formula - flat)
        tolerance = tolerance_of(delta) * largest_factor(delta) * (1 + abs(strength))
        assert_near(delta.apply(weight, strength), wanted, weight, tolerance)

    @FEWER
    @given(data=st.data(), strength=strengths, transposed=st.booleans())
    def test_blocks_add_up(
        self, kind: str, data: st.DataObject, strength: float, transposed: bool
    ) -> None:
        """Every size of block, of the stored matrix either way round, gives what apply gives."""
        delta = data.draw(deltas_by_kind[kind])
        weight = make_weight(delta)
        # Replacements hold the stored tensor itself, whichever way round that is.
        transposed &= may_be_transposed(delta)
        whole = delta.apply(weight, strength)
        tolerance = tolerance_of(delta) * largest_factor(delta) * (1 + abs(strength)) / 10
        rows = len(as_stored(weight, delta.row_fold(1.0), transposed=transposed))
        for step in range(1, rows + 2):
            for first in (True, False):
                fold = delta.row_fold(strength, transposed=transposed)
                stored = as_stored(weight, fold, transposed=transposed)
                result = fold_in_blocks(fold, stored, step, first=first)
                wanted = as_stored(whole, fold, transposed=transposed).double()
                assert_near(result, wanted, weight, tolerance)

    @FEWER
    @given(data=st.data(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 99))
    def test_other_inputs(
        self, kind: str, data: st.DataObject, dtype: torch.dtype, seed: int
    ) -> None:
        """Half-precision and strided weights give what their float32 copies give; none changes."""
        delta = data.draw(deltas_by_kind[kind])
        weight = make_weight(delta, seed, dtype)
        strided = torch.stack([weight, weight + 1], dim=-1)[..., 0]
        before = {name: tensor.clone() for name, tensor in delta.tensors().items()}
        wanted = delta.apply(weight.to(torch.float32).contiguous())
        assert torch.equal(delta.apply(weight), wanted)
        assert torch.equal(delta.apply(strided), wanted)
        assert torch.equal(weight, make_weight(delta, seed, dtype))
        assert all(torch.equal(delta.tensors()[name], tensor) for name, tensor in before.items())

    @FEWER
    @given(data=st.data())
    def test_strided_tensors(self, kind: str, data: st.DataObject) -> None:
        """Stored tensors may be views: sliced, transposed."""
        delta = data.draw(deltas_by_kind[kind])
        weight = make_weight(delta)
        views = delta.map_tensors(lambda t: torch.stack([t, t + 1], dim=-1)[..., 0])
        for transposed in {False, may_be_transposed(delta)}:
            folds = [d.row_fold(0.5, transposed=transposed) for d in (delta, views)]
            stored = as_stored(weight, folds[0], transposed=transposed)
            plain, strided = (fold_in_blocks(fold, stored, 2) for fold in folds)
            torch.testing.assert_close(plain, strided)

    @FEWER
    @given(data=st.data())
    def test_a_fold_may_be_made_again(self, kind: str, data: st.DataObject) -> None:
        """Two folds of one delta do not share what they measured."""
        delta = data.draw(deltas_by_kind[kind])
        weight = as_stored(make_weight(delta), delta.row_fold(1.0))
        once, twice = (fold_in_blocks(delta.row_fold(1.0), weight, 1) for _ in range(2))
        assert torch.equal(once, twice)

    @FEWER
    @given(data=st.data())
    def test_names_and_shapes(self, kind: str, data: st.DataObject) -> None:
        delta = data.draw(deltas_by_kind[kind])
        assert delta.kind == kind
        assert delta.additive == isinstance(delta, AdditiveDelta)
        assert delta.weight_shape == tuple(expected_shape(delta))
        assert delta.parameter_names
        assert delta.obstacle is None
        assert all(isinstance(tensor, Tensor) for tensor in delta.tensors().values())

    @FEWER
    @given(data=st.data())
    def test_norm(self, kind: str, data: st.DataObject) -> None:
        """‖ΔW‖ for what is additive, and no word for the rest."""
        delta = data.draw(deltas_by_kind[kind])
        norm = delta.norm()
        if not isinstance(delta, AdditiveDelta):
            assert norm is None
            return
        change = expected(delta, torch.zeros(delta.weight_shape))
        assert norm == pytest.approx(
            float(change.norm()), rel=1e-5, abs=1e-7 * largest_factor(delta)
        )


def expected_shape(delta: LayerDelta) -> list[int]:
    """Return the weight's shape from the stored tensors."""
    stored = delta.tensors()
    if isinstance(delta, RowReplacement):
        return [max(delta.indices) + 1, stored["rows"].shape[1]]
    if isinstance(delta, Replacement):
        return list(stored["value"].shape)
    if isinstance(delta, ExpertLoRA):
        return [*stored["up"].shape[:2], stored["down"].shape[2]]
    if isinstance(delta, DoRA):
        return expected_shape(delta.inner)
    if type(delta) in SHAPES:
        return list(SHAPES[type(delta)](delta))
    return [stored["up"].shape[0], *stored["down"].shape[1:]]


@pytest.mark.parametrize("kind", [delta.kind for delta in DELTAS if delta.additive])
class TestAdditive:
    """What additive deltas keep besides."""

    @FEWER
    @given(data=st.data(), factor=st.floats(-4, 4))
    def test_algebra(self, kind: str, data: st.DataObject, factor: float) -> None:
        """Materialised, scaled and as a low-rank product: the same ΔW in float64."""
        delta = data.draw(deltas_by_kind[kind])
        zero = torch.zeros(delta.weight_shape)
        change, unit = expected(delta, zero), largest_factor(delta) * 1e-5
        actual = delta.materialize()
        assert (actual.dtype, actual.shape) == (torch.float32, delta.weight_shape)
        assert_near(actual, change, zero, unit)
        assert_near(delta.scaled(factor).materialize(), factor * change, zero, 4 * unit)
        plain = delta.low_rank()
        if plain is not None:
            assert isinstance(plain, LoRA)
            assert_near(expected(plain, zero), change, zero, unit)

    @FEWER
    @given(data=st.data())
    def test_does_not_depend_on_the_weight(self, kind: str, data: st.DataObject) -> None:
        delta = data.draw(deltas_by_kind[kind])
        change = delta.materialize().double()
        for seed in (1, 2):
            weight = make_weight(delta, seed)
            gap = (delta.apply(weight).double() - weight.double() - change).abs().max()
            assert float(gap) <= 1e-5 * largest_factor(delta) * (4 + float(weight.abs().max()))


# ── single kinds ─────────────────────────────────────────────────────────────────────────────


@given(lora=loras(biases=True))
def test_bias_change_is_scaled(lora: LoRA) -> None:
    """PEFT's lora_bias is added to the base's bias times alpha / r."""
    if lora.bias is None:
        assert lora.bias_change is None
    else:
        wanted = [lora.alpha / lora.down.shape[0] * b for b in lora.bias.double().tolist()]
        assert lora.bias_change.tolist() == pytest.approx(wanted, rel=1e-6)


@given(delta=doras())
def test_merged_dora_has_its_magnitudes(delta: DoRA) -> None:
    """Each row, or column, of W' is as long as its magnitude says."""
    merged = delta.apply(make_weight(delta)).double()
    channels = merged.flatten(1) if delta.axis == "out" else merged.transpose(0, 1).flatten(1)
    lengths, wanted = channels.norm(dim=1), delta.magnitude.double().abs()
    torch.testing.assert_close(lengths, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_dora_leaves_zero_rows(transposed: bool) -> None:
    """A padded row, all zero and untouched, stays zero; PEFT's merge gives NaN."""
    up = make_tensor(1, 4, 2)
    up[1] = 0
    weight = make_tensor(2, 4, 3)
    weight[1] = 0
    delta = DoRA(LoRA(make_tensor(3, 2, 3), up, 2.0), make_tensor(4, 4))
    stored = weight.T.contiguous() if transposed else weight
    result = fold_in_blocks(delta.row_fold(1.0, transposed=transposed), stored, 2)
    straight = result.T if transposed else result
    assert not straight[1].any()
    assert_near(straight, expected(delta, weight), weight, 1e-5)


def test_merged_pissa_of_an_untrained_adapter_is_the_base() -> None:
    """The start that was taken out is put back by the factors as they began."""
    weight = make_tensor(5, 6, 5)
    left, values, right = torch.linalg.svd(weight.double())
    up = (left[:, :2] * values[:2].sqrt()).float()
    down = (values[:2].sqrt()[:, None] * right[:2]).float()
    assert_near(MovedBase(LoRA(down, up, 2.0), "pissa").apply(weight), weight.double(), weight)


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "pissa_niter_4", "novelty"])
def test_starts_that_cannot_be_recomputed(start: str) -> None:
    obstacle = MovedBase(LoRA(make_tensor(1, 1, 2), make_tensor(2, 2, 1), 1.0), start).obstacle
    assert obstacle is not None
    assert start in obstacle


def test_replacement_is_exact_at_strength_one() -> None:
    """No float32 arithmetic touches the value: bit for bit, beyond what W + (V − W) would give."""
    value, weight = torch.tensor([[1e-8, 3.0]]), torch.tensor([[1e8, -1e8]])
    assert torch.equal(Replacement(value).apply(weight), value)
    assert torch.equal(RowReplacement(value, (0,)).apply(weight), value)


def test_replacement_of_a_scalar() -> None:
    """A parameter without axes, such as a temperature, is a tensor too."""
    assert float(Replacement(torch.tensor(2.0)).apply(torch.tensor(1.0), 0.5)) == 1.5
