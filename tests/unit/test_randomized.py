"""The truncated SVD of dense matrices: its error, its certificate, its rank, on all spectra."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from loratools.linalg import certificates, randomized
from loratools.linalg.factored import SVD
from loratools.linalg.norm_bounds import bound_largest_eigenvalue, energy_missed
from loratools.linalg.randomized import (
    randomized_svd,
    truncated_svd,
    truncated_svd_of_energy,
)

ROWS, COLUMNS = 400, 240
J = torch.arange(1, COLUMNS + 1.0)


def noise(seed: int = 1) -> Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(seed)) / ROWS**0.5


def with_values(values: Tensor, seed: int = 0) -> Tensor:
    """Return a matrix of these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.linalg.qr(torch.randn(n, COLUMNS, generator=generator, dtype=torch.float64)).Q
        for n in (ROWS, COLUMNS)
    )
    return ((left * values.double()) @ right.T).float()


def leading(*values: Tensor) -> Tensor:
    """Return singular values, zeros behind them."""
    given = torch.cat(values)
    return torch.cat([given, torch.zeros(COLUMNS - len(given))])


SPECTRA: dict[str, Tensor] = {
    "flat noise": noise(),
    "all alike": with_values(torch.ones(COLUMNS)),
    "slow decay": with_values(J**-0.3),
    "power law": with_values(1 / J),
    "steep": with_values(J**-2),
    "exponential": with_values(0.8**J),
    "rank 8 under noise": with_values(leading(torch.linspace(9, 3, 8))) + noise(),
    "at the edge of noise": with_values(leading(torch.linspace(2.2, 1.6, 30))) + noise(),
    "a step": with_values(torch.cat([torch.ones(20), torch.full((COLUMNS - 20,), 0.01)])),
    "twenty alike": with_values(leading(torch.ones(20))),
}


def rebuilt(svd: SVD) -> Tensor:
    return (svd.left.double() * svd.values.double()) @ svd.right.double()


def relative_error(matrix: Tensor, svd: SVD) -> float:
    return float((matrix.double() - rebuilt(svd)).norm() / matrix.double().norm())


def least_error(matrix: Tensor, rank: int) -> float:
    values = torch.linalg.svdvals(matrix.double())
    return float(values[rank:].norm() / values.norm())


@pytest.mark.parametrize("turned", [False, True], ids=["tall", "wide"])
@pytest.mark.parametrize("rank", [1, 8, 20])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_is_near_the_least_and_is_the_true_one(
    name: str, rank: int, turned: bool
) -> None:
    matrix = SPECTRA[name].T.contiguous() if turned else SPECTRA[name]
    found = truncated_svd(matrix, rank)
    least, true = least_error(matrix, rank), relative_error(matrix, found.svd)
    assert found.rank == rank
    assert true <= 1.02 * least + 1e-5
    assert found.error == pytest.approx(true, rel=1e-4, abs=1e-6)
    # The certificate: a lower bound that is near.
    assert found.least <= least * (1 + 1e-5)
    assert found.error <= 1.02 * found.least + 4e-5
    assert found.captured == pytest.approx(1 - true**2, abs=1e-6)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_triplets_are_orthonormal_and_descending(name: str) -> None:
    svd = truncated_svd(SPECTRA[name], 12).svd
    eye = torch.eye(12)
    assert (svd.left.T @ svd.left - eye).abs().max() < 1e-4
    assert (svd.right @ svd.right.T - eye).abs().max() < 1e-4
    assert bool((svd.values.diff() <= 1e-6 * svd.values[0]).all())


def test_a_sketch_is_what_was_made() -> None:
    """Unless it is, the tests above speak of the dense SVD alone."""
    dense = {name: truncated_svd(matrix, 8).dense for name, matrix in SPECTRA.items()}
    assert not any(dense[name] for name in dense if name != "steep"), dense


@pytest.mark.parametrize("rank", [3, 8])
def test_planted_factors_are_found(rank: int) -> None:
    generator = torch.Generator().manual_seed(4)
    up, down = (torch.randn(n, 3, generator=generator) for n in (ROWS, COLUMNS))
    found = truncated_svd(up @ down.T, rank)
    assert relative_error(up @ down.T, found.svd) < 1e-5
    assert found.error < 1e-5


def test_small_errors_are_measured_on_the_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the norms would cancel; in several blocks of rows."""
    monkeypatch.setattr(certificates, "_ROWS", 70)
    for size in (3e-2, 1e-3):
        matrix = with_values(leading(torch.linspace(9, 3, 8))) + size * noise()
        found = truncated_svd(matrix, 8)
        true = relative_error(matrix, found.svd)
        assert found.error == pytest.approx(true, rel=1e-3)
        assert true <= 1.02 * least_error(matrix, 8) + 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 40), (40, 1), (7, 5), (300, 4), (97, 97)], ids=str)
def test_small_matrices(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    whole = truncated_svd(matrix, 200)
    assert whole.rank == min(shape)
    assert relative_error(matrix, whole.svd) < 1e-5
    half = truncated_svd(matrix, max(1, min(shape) // 2))
    assert relative_error(matrix, half.svd) <= 1.02 * least_error(matrix, half.rank) + 1e-5


def test_zero() -> None:
    found = truncated_svd(torch.zeros(200, 150), 8)
    assert (found.rank, found.error, found.norm) == (1, 0.0, 0.0)
    assert rebuilt(found.svd).abs().max() == 0


def test_exact_is_the_dense_svd() -> None:
    matrix = SPECTRA["slow decay"]
    found = truncated_svd(matrix, 10, exact=True)
    assert found.dense
    assert torch.allclose(found.svd.values.double(), torch.linalg.svdvals(matrix.double())[:10])
    assert found.error == pytest.approx(least_error(matrix, 10), rel=1e-5)


def test_the_same_every_time() -> None:
    state = torch.get_rng_state()
    one, other = (truncated_svd(SPECTRA["flat noise"], 8).svd for _ in range(2))
    assert torch.equal(one.left, other.left)
    assert torch.equal(one.right, other.right)
    assert torch.equal(torch.get_rng_state(), state)


def test_float64() -> None:
    matrix = SPECTRA["steep"].double()
    found = truncated_svd(matrix, 24)
    assert found.svd.left.dtype == torch.float64
    assert found.error == pytest.approx(least_error(matrix, 24), rel=0.02)


def test_the_short_form() -> None:
    svd, error = randomized_svd(SPECTRA["power law"], 8)
    assert error == pytest.approx(relative_error(SPECTRA["power law"], svd), rel=1e-4)


# ── rank by energy ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("exact", [False, True], ids=["sketch", "dense"])
@pytest.mark.parametrize("energy", [0.05, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("name", SPECTRA)
def test_energy_takes_as_few_as_it_needs(name: str, energy: float, exact: bool) -> None:
    matrix = SPECTRA[name]
    found = truncated_svd_of_energy(matrix, energy, exact=exact)
    squares = torch.linalg.svdvals(matrix.double()).square().cumsum(0)
    needed = int((squares < energy * squares[-1] * (1 - 1e-6)).sum()) + 1
    held = 1 - relative_error(matrix, found.svd) ** 2
    assert held >= energy - 1e-6
    assert needed <= found.rank <= math.ceil(1.05 * needed) + 1


def test_energy_one_is_all_that_float32_can_tell() -> None:
    matrix = SPECTRA["rank 8 under noise"] - noise()
    found = truncated_svd_of_energy(matrix, 1.0)
    assert found.rank <= 12
    assert relative_error(matrix, found.svd) < 5e-5
    assert truncated_svd_of_energy(noise(), 1.0).rank == COLUMNS


def test_the_ceiling_holds() -> None:
    found = truncated_svd_of_energy(noise(), 0.9, ceiling=6)
    assert found.rank == 6
    assert found.error <= 1.02 * least_error(noise(), 6)


# ── the bounds ───────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", SPECTRA)
def test_the_eigenvalue_is_below_every_bound(name: str) -> None:
    matrix = SPECTRA[name].double()
    largest = float(torch.linalg.svdvals(matrix)[0]) ** 2
    probes = torch.randn(
        COLUMNS, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    bounds = []
    for bound in bound_largest_eigenvalue(lambda block: matrix.T @ (matrix @ block), probes):
        bounds.append(bound)
        if len(bounds) == 12:
            break
    assert min(bounds) >= largest * (1 - 1e-9)
    assert bounds[-1] <= 1.5 * largest
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(bounds))


@pytest.mark.parametrize("seed", range(20))
def test_energy_missed_is_never_less_than_what_was_missed(seed: int) -> None:
    """Any subspace of a random operator, good or bad; eigenvalues with and without a gap."""
    generator = torch.Generator().manual_seed(seed)
    size, rank = 40, 6
    frame = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
    values = torch.rand(size, generator=generator).double().sort(descending=True).values
    values[:rank] += seed % 3
    operator = (frame * values) @ frame.T
    tilt = 0.3 ** (seed % 5) * torch.randn(size, rank, generator=generator).double()
    basis = torch.linalg.qr(frame[:, :rank] + tilt).Q
    ritz, turn = torch.linalg.eigh(basis.T @ operator @ basis)
    basis = basis @ turn
    residual = float((operator @ basis - basis * ritz).norm()) ** 2
    outside = torch.eye(size, dtype=torch.float64) - basis @ basis.T
    largest = float(torch.linalg.eigvalsh(outside @ operator @ outside)[-1])
    missed = float(values[:rank].sum() - ritz.sum())
    bound = energy_missed(ritz, residual, largest)
    assert missed <= bound + 1e-12
    if seed % 5 == 4 and seed % 3:
        assert bound <= 2 * missed


def test_the_dense_svd_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no basis is large enough to prove anything, the answer is still right."""
    monkeypatch.setattr(randomized, "certified_least", lambda *_: None)
    found = truncated_svd(SPECTRA["power law"], 8)
    assert found.dense
    assert found.error == pytest.approx(least_error(SPECTRA["power law"], 8), rel=1e-4)
