"""The contract of every merging method: one that is listed in ``METHODS`` is tested here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from loratools.errors import OptionError
from loratools.merge_methods import METHODS, get_method, load_function
from loratools.merge_methods.combining import Combined, Layer, combine
from loratools.merge_methods.method import Factors, Method, Settings

from .method_oracles import ORACLES, Case, Matrix

# Changes below the result's smaller side, and beyond it (there TSV-M keeps fewer than the ranks).
SHAPES = ((12, 9), (5, 6))
EVERY = pytest.mark.parametrize("method", METHODS, ids=lambda row: row.name)


def make_case(
    method: Method, shape: tuple[int, int], *, seed: int = 3, density: float | None = None
) -> Case:
    """Return changes of several ranks and scales, with a negative weight where it may be."""
    rng = np.random.default_rng(seed)
    count = method.inputs or 3
    ranks = [2] * count if method.equal_ranks else [2, 3, 1][:count]
    rows, columns = shape
    weights = [0.7, 0.4, 1.2] if method.shares else [0.7, -0.4, 1.2]
    return Case(
        [rng.standard_normal((rows, rank)) for rank in ranks],
        [rng.standard_normal((rank, columns)) for rank in ranks],
        [2.0, 0.5, 1.25][:count],
        weights[:count],
        density or method.density or 1.0,
        seed,
    )


def run(method: Method, case: Case, rank: int | None = None) -> Combined:
    parts = [
        Factors(torch.from_numpy(up), torch.from_numpy(down), scale)
        for up, down, scale in zip(case.ups, case.downs, case.scales, strict=True)
    ]
    generator = torch.Generator().manual_seed(case.seed)
    if rank is None and method.needs_rank:
        rank = min(case.deltas[0].shape)
    weights = torch.tensor(case.weights, dtype=torch.float64)
    return combine(method, Layer(parts, weights, Settings(case.density, generator), rank))


def product(done: Combined) -> Matrix:
    return done.up.double().numpy() @ done.down.double().numpy()


def assert_near(found: Matrix, wanted: Matrix, tolerance: float = 1e-5) -> None:
    assert np.linalg.norm(found - wanted) <= tolerance * np.linalg.norm(wanted)


def changed(case: Case, **changes: object) -> Case:
    return dataclasses.replace(case, **changes)  # type: ignore[arg-type]


# ── the table ────────────────────────────────────────────────────────────────────────────────


def test_every_method_has_an_oracle_and_no_oracle_is_left_over() -> None:
    assert [row.name for row in METHODS] == sorted(ORACLES, key=[r.name for r in METHODS].index)


@EVERY
def test_a_row_says_where_the_method_comes_from_and_is_documented(method: Method) -> None:
    assert re.match(r"(arXiv:\d{4}\.\d{5}|doi:10\.\S+|https://\S+)$", method.paper)
    assert load_function(method).__doc__
    assert method.density is None or 0 < method.density <= 1
    assert method.density is not None or not (method.seeded or method.identity_at_full_density)
    page = Path(__file__).parents[2] / "docs" / "methods.md"
    assert f"| `{method.name}` |" in page.read_text("utf-8")


def test_a_wrong_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(OptionError) as caught:
        get_method("tsvm")
    assert "did you mean tsv-m" in (caught.value.hint or "")


# ── against the dense formula ────────────────────────────────────────────────────────────────


@EVERY
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("density", [None, 0.45, 1.0])
def test_equals_its_dense_oracle(
    method: Method, shape: tuple[int, int], density: float | None
) -> None:
    if density is not None and method.density is None:
        pytest.skip("has no density")
    case = make_case(method, shape, density=density)
    done = run(method, case)
    assert_near(product(done), ORACLES[method.name](case))
    assert done.error <= 1e-3


@EVERY
def test_inner_products_are_those_of_the_changes(method: Method) -> None:
    case = make_case(method, SHAPES[0])
    flat = np.stack([delta.ravel() for delta in case.deltas])
    np.testing.assert_allclose(run(method, case).gram.numpy(), flat @ flat.T, rtol=1e-6, atol=1e-5)


@EVERY
def test_truncation_is_the_best_and_its_error_is_true(method: Method) -> None:
    case = make_case(method, SHAPES[0], density=None if method.density is None else 0.6)
    exact = ORACLES[method.name](case)
    done = run(method, case, rank=2)
    left, values, right = np.linalg.svd(exact, full_matrices=False)
    best = np.linalg.norm(exact - left[:, :2] * values[:2] @ right[:2])
    missed = np.linalg.norm(exact - product(done))
    assert done.down.shape[0] == min(2, int((values > 1e-7 * values[0]).sum()))
    assert missed <= 1.001 * best + 1e-5 * values[0]
    assert done.error == pytest.approx(missed / np.linalg.norm(exact), rel=1e-3, abs=1e-4)


# ── what holds whatever the formula ──────────────────────────────────────────────────────────


@EVERY
def test_weights_scale_the_result_or_are_shares(method: Method) -> None:
    case = make_case(method, SHAPES[0])
    doubled = run(method, changed(case, weights=[3 * w for w in case.weights]))
    factor = 1 if method.shares else 3
    assert_near(product(doubled), factor * product(run(method, case)))


@EVERY
def test_the_order_of_the_adapters_does_not_matter(method: Method) -> None:
    if method.seeded:
        pytest.skip("chance is drawn adapter by adapter")
    case = make_case(method, SHAPES[0])
    turned = changed(
        case,
        **{name: getattr(case, name)[::-1] for name in ("ups", "downs", "scales", "weights")},
    )
    assert_near(product(run(method, turned)), product(run(method, case)))


@EVERY
def test_the_same_seed_gives_the_same_bytes_and_another_one_another_result(method: Method) -> None:
    case = make_case(method, SHAPES[0], density=None if method.density is None else 0.5)
    first, again = run(method, case), run(method, case)
    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
    other = product(run(method, changed(case, seed=case.seed + 1)))
    assert np.allclose(other, product(first)) != method.seeded


@EVERY
def test_an_adapter_alone_comes_out_as_it_went_in(method: Method) -> None:
    if not (method.identity or method.identity_at_full_density):
        pytest.skip("changes even a single adapter")
    case = make_case(method, SHAPES[0], density=1.0)
    if method.inputs:
        twice = {name: [getattr(case, name)[0]] * 2 for name in ("ups", "downs", "scales")}
        alone = changed(case, **twice)
    else:
        first = {name: getattr(case, name)[:1] for name in ("ups", "downs", "scales")}
        alone = changed(case, **first, weights=[1.0])
    assert_near(product(run(method, alone)), case.deltas[0])


@EVERY
def test_does_not_depend_on_how_a_change_is_split_into_factors(method: Method) -> None:
    if method.equal_ranks:
        pytest.skip("works on the factors themselves")
    case = make_case(method, SHAPES[0])
    rng = np.random.default_rng(9)
    gauges = [rng.standard_normal((up.shape[1], up.shape[1])) for up in case.ups]
    ups = [up @ gauge * 3 for up, gauge in zip(case.ups, gauges, strict=True)]
    downs = [np.linalg.solve(g, down) for g, down in zip(gauges, case.downs, strict=True)]
    other = changed(case, ups=ups, downs=downs, scales=[s / 3 for s in case.scales])
    assert_near(product(run(method, other)), product(run(method, case)))


def with_a_missing_layer(case: Case, place: int) -> Case:
    ups, downs = list(case.ups), list(case.downs)
    ups[place], downs[place] = ups[place][:, :0], downs[place][:0]
    return changed(case, ups=ups, downs=downs)


@EVERY
def test_a_layer_that_an_adapter_lacks_counts_as_zero(method: Method) -> None:
    case = with_a_missing_layer(make_case(method, SHAPES[0]), 1)
    found = product(run(method, case))
    if method.equal_ranks:
        kept = [0, 2]
        fields = ("ups", "downs", "scales", "weights")
        there = changed(case, **{n: [getattr(case, n)[i] for i in kept] for n in fields})
        wanted = ORACLES[method.name](there)
    elif method.inputs:
        # No direction: linear.
        share = case.weights[0] / sum(case.weights)
        wanted = share * case.deltas[0]
    elif method.name == "karcher":
        wanted = karcher_without(case, 1)
    else:
        wanted = ORACLES[method.name](case)
    assert_near(found, wanted)


def karcher_without(case: Case, place: int) -> Matrix:
    """The direction is that of the others; the length counts the zero."""
    kept = [i for i in range(len(case.ups)) if i != place]
    fields = ("ups", "downs", "scales", "weights")
    there = changed(case, **{n: [getattr(case, n)[i] for i in kept] for n in fields})
    share = sum(there.weights) / sum(case.weights)
    return share * ORACLES["karcher"](there)


@EVERY
def test_nothing_but_zeros_gives_zero(method: Method) -> None:
    case = make_case(method, SHAPES[0])
    still = changed(case, ups=[np.zeros_like(up) for up in case.ups])
    done = run(method, still)
    assert float(done.up.abs().max()) * float(done.down.abs().max()) == 0
    assert done.error == 0


# ── single points of single methods ──────────────────────────────────────────────────────────


def coefficients(name: str, gram: Sequence[Sequence[float]], weights: Sequence[float]) -> Matrix:
    made = load_function(get_method(name))(
        torch.tensor(gram, dtype=torch.float64), torch.tensor(weights, dtype=torch.float64)
    )
    found: Matrix = made.numpy()
    return found


def test_slerp_goes_straight_where_mergekit_does_and_nuslerp_later() -> None:
    gram = [[1.0, 0.9997], [0.9997, 1.0]]
    assert coefficients("slerp", gram, [3, 1]) == pytest.approx([0.75, 0.25], abs=1e-15)
    bent = coefficients("nuslerp", gram, [3, 1])
    assert bent != pytest.approx([0.75, 0.25], abs=1e-6)
    assert bent == pytest.approx([0.75, 0.25], abs=1e-3)
    parallel = [[1.0, 2.0], [2.0, 4.0]]
    assert coefficients("nuslerp", parallel, [3, 1]) == pytest.approx([0.75, 0.25])


def test_slerp_at_right_angles_is_on_the_circle() -> None:
    found = coefficients("slerp", [[1, 0], [0, 1]], [1, 1])
    assert found == pytest.approx([np.sqrt(0.5)] * 2)


def test_karcher_of_opposites_keeps_to_the_first() -> None:
    found = coefficients("karcher", [[4, -4], [-4, 4]], [1, 1])
    # Both are multiples of one direction: 2·u₁ = c₁ΔW₁ + c₂ΔW₂ with ΔW₂ = −ΔW₁.
    assert abs(found[0] - found[1]) == pytest.approx(1.0)


def test_karcher_mean_is_where_the_logarithms_cancel() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((4, 6)) + 1
    weights = np.array([1.0, 2.0, 0.5, 1.0])
    found = coefficients("karcher", (vectors @ vectors.T).tolist(), weights.tolist())
    mean = found @ vectors
    assert np.linalg.norm(mean) == pytest.approx(
        (weights / weights.sum()) @ np.linalg.norm(vectors, axis=1)
    )
    mean /= np.linalg.norm(mean)
    units = vectors / np.linalg.norm(vectors, axis=1)[:, None]
    near = units @ mean
    logs = (np.arccos(near) / np.sin(np.arccos(near)))[:, None] * (units - near[:, None] * mean)
    assert np.linalg.norm(weights @ logs) < 1e-9


def test_tsv_m_of_changes_in_each_others_way_is_not_their_sum() -> None:
    method = get_method("tsv-m")
    case = make_case(method, SHAPES[0])
    overlapping = changed(case, ups=[case.ups[0][:, :1]] * 3, downs=[d[:1] for d in case.downs])
    found = product(run(method, overlapping))
    assert np.linalg.norm(found - ORACLES["linear"](overlapping)) > 0.1 * np.linalg.norm(found)


def test_dare_keeps_the_expected_value() -> None:
    method = get_method("dare-linear")
    case = make_case(method, SHAPES[0], density=0.5)
    mean = np.mean([product(run(method, changed(case, seed=seed))) for seed in range(400)], axis=0)
    wanted = ORACLES["linear"](case)
    assert np.linalg.norm(mean - wanted) < 0.1 * np.linalg.norm(wanted)


@pytest.mark.parametrize("name", ["core-ties", "core-dare-ties", "core-sce", "knots-ties"])
def test_adapters_in_separate_subspaces_do_not_vote_on_each_other(name: str) -> None:
    """Zeros in a common basis are zeros only up to rounding, and rounding has a sign."""
    rng = np.random.default_rng(1)
    left = np.linalg.qr(rng.standard_normal((12, 4)))[0]
    right = np.linalg.qr(rng.standard_normal((9, 4)))[0]
    case = Case(
        [left[:, :2] * [3, 2], left[:, 2:] * [5, 1]],
        [right[:, :2].T.copy(), right[:, 2:].T.copy()],
        [1.0, 1.0],
        [1.0, 1.0],
        1.0,
        0,
    )
    assert_near(product(run(get_method(name), case)), ORACLES["linear"](case))
