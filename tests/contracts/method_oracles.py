"""Every method again, from its paper's formula: dense matrices, float64, loops over elements.

An oracle takes a Case and returns the merged ΔW. Chance is drawn from the same generator in the
order that the methods promise (adapter by adapter, uniform numbers in float32), so that the masks
agree; what is done with them is written out here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Case:
    """Changes as scale · up @ down, with what a method is told."""

    ups: Sequence[Matrix]
    downs: Sequence[Matrix]
    scales: Sequence[float]
    weights: Sequence[float]
    density: float
    seed: int

    @property
    def deltas(self) -> list[Matrix]:
        parts = zip(self.ups, self.downs, self.scales, strict=True)
        return [scale * (up @ down) for up, down, scale in parts]


class Chance:
    """Uniform numbers as the methods draw them."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, shape: tuple[int, ...]) -> Matrix:
        drawn = torch.rand(shape, generator=self.generator, dtype=torch.float32)
        return drawn.double().numpy()


# ── one matrix ───────────────────────────────────────────────────────────────────────────────


def top(matrix: Matrix, density: float) -> Matrix:
    """Keep the ⌊density·N⌋ largest."""
    count = math.floor(density * matrix.size) if density < 1 else matrix.size
    order = sorted(np.ndindex(matrix.shape), key=lambda at: -abs(matrix[at]))
    kept = np.zeros_like(matrix)
    for at in order[:count]:
        kept[at] = matrix[at]
    return kept


def middle(matrix: Matrix, density: float) -> Matrix:
    """Leave out the largest 1 %, keep the ⌊density·N⌋ next ones."""
    if density >= 1:
        return matrix
    kept_count = math.floor(density * matrix.size)
    out = min(math.floor(0.01 * matrix.size), matrix.size - kept_count)
    order = sorted(np.ndindex(matrix.shape), key=lambda at: -abs(matrix[at]))
    kept = np.zeros_like(matrix)
    for at in order[out : out + kept_count]:
        kept[at] = matrix[at]
    return kept


def dare(matrix: Matrix, density: float, chance: Chance) -> Matrix:
    if density >= 1:
        return matrix
    kept = np.zeros_like(matrix)
    drawn = chance.uniform(matrix.shape)
    for at in np.ndindex(matrix.shape):
        kept[at] = matrix[at] / density if drawn[at] < np.float32(density) else 0.0
    return kept


def magprune(matrix: Matrix, density: float, chance: Chance) -> Matrix:
    if density >= 1:
        return matrix
    epsilon = min(0.1, density, 1 - density)
    kept = np.zeros_like(matrix)
    drawn = chance.uniform(matrix.shape)
    for i, row in enumerate(matrix):
        order = sorted(range(len(row)), key=lambda j: -abs(row[j]))
        for rank, j in enumerate(order):
            drop = (1 - density) - epsilon / 2 + rank * epsilon / len(row)
            if drawn[i, j] < 1 - drop:
                kept[i, j] = row[j] / (1 - drop)
    return kept


def weighted(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    return sum(w * m for w, m in zip(weights, matrices, strict=True))  # type: ignore[return-value]


def elected(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Mean of the weighted elements that have the sign of their sum."""
    scaled = [w * m for w, m in zip(weights, matrices, strict=True)]
    merged = np.zeros_like(scaled[0])
    for at in np.ndindex(merged.shape):
        sign = math.copysign(1, total) if (total := sum(m[at] for m in scaled)) else 0
        agreeing = [m[at] for m in scaled if m[at] * sign > 0]
        merged[at] = sum(agreeing) / len(agreeing) if agreeing else 0.0
    return merged


def elected_as_peft(matrices: Sequence[Matrix], weights: Sequence[float]) -> Matrix:
    """Signs of the unweighted sum, zero counting as positive; divided by the contributors."""
    merged = np.zeros_like(matrices[0])
    for at in np.ndindex(merged.shape):
        sign = 1 if sum(m[at] for m in matrices) >= 0 else -1
        agreeing = [w * m[at] for w, m in zip(weights, matrices, strict=True) if m[at] * sign > 0]
        merged[at] = sum(agreeing) / max(len(agreeing), 1)
    return merged


# ── elementwise methods, on any matrices ─────────────────────────────────────────────────────

Elementwise = Callable[[Sequence[Matrix], Sequence[float], float, Chance], Matrix]


def sce(matrices: Sequence[Matrix], weights: Sequence[float], density: float) -> Matrix:
    scaled = [w * m for w, m in zip(weights, matrices, strict=True)]
    variance = np.var(np.stack(scaled), axis=0)
    chosen = top(variance, density) > 0 if density < 1 else np.ones_like(variance, dtype=bool)
    scaled = [m * chosen for m in scaled]
    energy = [float((m**2).sum()) for m in scaled]
    merged = np.zeros_like(scaled[0])
    for at in np.ndindex(merged.shape):
        sign = 1 if sum(m[at] for m in scaled) >= 0 else -1
        left = [(e, m[at]) for e, m in zip(energy, scaled, strict=True) if m[at] * sign > 0]
        merged[at] = sum(e * v for e, v in left) / sum(e for e, _ in left) if left else 0.0
    return merged


ELEMENTWISE: Mapping[str, Elementwise] = {
    "ties": lambda m, w, d, _: elected([top(x, d) for x in m], w),
    "dare-linear": lambda m, w, d, c: weighted([dare(x, d, c) for x in m], w),
    "dare-ties": lambda m, w, d, c: elected([dare(x, d, c) for x in m], w),
    "della": lambda m, w, d, c: elected([magprune(x, d, c) for x in m], w),
    "della-linear": lambda m, w, d, c: weighted([magprune(x, d, c) for x in m], w),
    "breadcrumbs": lambda m, w, d, _: weighted([middle(x, d) for x in m], w),
    "sce": lambda m, w, d, _: sce(m, w, d),
    "magnitude-prune": lambda m, w, d, _: weighted([top(x, d) for x in m], w),
    "peft-linear": lambda m, w, d, _: weighted(m, w),
    "peft-ties": lambda m, w, d, _: elected_as_peft([top(x, d) for x in m], w),
    "peft-dare-linear": lambda m, w, d, c: weighted([dare(x, d, c) for x in m], w),
    "peft-dare-ties": lambda m, w, d, c: elected_as_peft([dare(x, d, c) for x in m], w),
    "peft-magnitude-prune": lambda m, w, d, _: weighted([top(x, d) for x in m], w),
}


def on_delta(name: str) -> Callable[[Case], Matrix]:
    """The method on ΔW."""
    rule = ELEMENTWISE[name]
    return lambda case: rule(case.deltas, case.weights, case.density, Chance(case.seed))


def rounded(matrix: Matrix) -> Matrix:
    """What is zero but for rounding has no vote."""
    return np.where(np.abs(matrix) < 1e-11, 0.0, matrix)


def in_core(name: str) -> Callable[[Case], Matrix]:
    """The method in the singular bases of [Δ₁ ... Δ_T] and [Δ₁; ...; Δ_T]."""

    def merged(case: Case) -> Matrix:
        wide = np.linalg.svd(np.hstack(case.deltas), full_matrices=False)
        tall = np.linalg.svd(np.vstack(case.deltas), full_matrices=False)
        left = wide[0][:, wide[1] > 1e-7 * wide[1][0]]
        right = tall[2][tall[1] > 1e-7 * tall[1][0]]
        cores = [rounded(left.T @ delta @ right.T) for delta in case.deltas]
        core = ELEMENTWISE[name](cores, case.weights, case.density, Chance(case.seed))
        return left @ core @ right

    return merged


def on_factors(name: str) -> Callable[[Case], Matrix]:
    """PEFT: the method on all A, then on all B, weighted by √|w·s|, the sign on A."""
    rule = ELEMENTWISE[name]

    def merged(case: Case) -> Matrix:
        chance = Chance(case.seed)
        scaled = [w * s for w, s in zip(case.weights, case.scales, strict=True)]
        signed = [math.copysign(math.sqrt(abs(v)), v) for v in scaled]
        down = rule(case.downs, signed, case.density, chance)
        up = rule(case.ups, [abs(v) for v in signed], case.density, chance)
        return up @ down

    return merged


# ── methods with linear algebra ──────────────────────────────────────────────────────────────


def total(case: Case) -> Matrix:
    return weighted(case.deltas, case.weights)


def slerp(case: Case) -> Matrix:
    first, second = (delta.ravel() for delta in case.deltas)
    share = case.weights[1] / sum(case.weights)
    cosine = first @ second / (np.linalg.norm(first) * np.linalg.norm(second))
    angle = math.acos(cosine)
    assert abs(cosine) < 0.9995
    arc = math.sin((1 - share) * angle) * first + math.sin(share * angle) * second
    return (arc / math.sin(angle)).reshape(case.deltas[0].shape)


def karcher(case: Case) -> Matrix:
    lengths = [float(np.linalg.norm(delta)) for delta in case.deltas]
    shares = [w / sum(case.weights) for w in case.weights]
    units = [d.ravel() / length for d, length in zip(case.deltas, lengths, strict=True)]
    mean = weighted(units, shares)
    mean /= np.linalg.norm(mean)
    for _ in range(500):
        tangent = np.zeros_like(mean)
        for share, unit in zip(shares, units, strict=True):
            near = float(np.clip(mean @ unit, -1, 1))
            across = unit - near * mean
            if np.linalg.norm(across) > 1e-14:
                tangent += share * math.acos(near) * across / np.linalg.norm(across)
        step = float(np.linalg.norm(tangent))
        if step < 1e-14:
            break
        mean = math.cos(step) * mean + math.sin(step) * tangent / step
    size = sum(s * length for s, length in zip(shares, lengths, strict=True))
    return size * mean.reshape(case.deltas[0].shape)


def nearest_orthogonal(matrix: Matrix) -> Matrix:
    """X(XᵀX)^(-1/2), by eigenvalues; the pseudo-inverse root where X is short of rank."""
    values, vectors = np.linalg.eigh(matrix.T @ matrix)
    root = np.array([1 / math.sqrt(v) if v > 1e-12 else 0.0 for v in values])
    return matrix @ (vectors * root) @ vectors.T


def tsv_m(case: Case) -> Matrix:
    keep = min(case.deltas[0].shape) // len(case.deltas)
    lefts, sizes, rights = [], [], []
    for weight, delta in zip(case.weights, case.deltas, strict=True):
        left, values, right = np.linalg.svd(delta, full_matrices=False)
        for place in range(keep):
            if values[place] > 1e-10 * values[0]:
                lefts.append(left[:, place])
                sizes.append(weight * values[place])
                rights.append(right[place])
    left, right = np.stack(lefts, axis=1), np.stack(rights, axis=1)
    return nearest_orthogonal(left) @ np.diag(sizes) @ nearest_orthogonal(right).T


def iso_c(case: Case) -> Matrix:
    left, values, right = np.linalg.svd(total(case), full_matrices=False)
    rank = int((values > 1e-10 * values[0]).sum())
    return values[:rank].mean() * left[:, :rank] @ right[:rank]


def knots(name: str) -> Callable[[Case], Matrix]:
    def merged(case: Case) -> Matrix:
        left, values, right = np.linalg.svd(np.hstack(case.deltas), full_matrices=False)
        rank = int((values > 1e-10 * values[0]).sum())
        tasks = [rounded(task) for task in np.split(right[:rank], len(case.deltas), axis=1)]
        rows = ELEMENTWISE[name](tasks, case.weights, case.density, Chance(case.seed))
        return left[:, :rank] @ np.diag(values[:rank]) @ rows

    return merged


def robust(case: Case) -> Matrix:
    up, down = np.zeros_like(case.ups[0]), np.zeros_like(case.downs[0])
    shares = np.zeros(down.shape[0])
    for b, a, s, w in zip(case.ups, case.downs, case.scales, case.weights, strict=True):
        kept, grown = top(a, case.density), top(b, case.density)
        root = math.sqrt(abs(w * s))
        for row in range(len(a)):
            before, after = np.abs(a[row]).sum(), np.abs(kept[row]).sum()
            share = before / after if after else 1.0
            up[:, row] += root * share * grown[:, row]
            shares[row] += share
        down += math.copysign(root, w * s) * kept
    return (up / shares) @ down


ORACLES: Mapping[str, Callable[[Case], Matrix]] = {
    "linear": total,
    "svd": total,
    "slerp": slerp,
    "nuslerp": slerp,
    "karcher": karcher,
    "tsv-m": tsv_m,
    "iso-c": iso_c,
    "knots-ties": knots("ties"),
    "knots-dare-ties": knots("dare-ties"),
    "robust": robust,
    "peft-cat": total,
    "peft-svd": total,
    **{name: on_delta(name) for name in ELEMENTWISE if not name.startswith("peft-")},
    **{f"core-{name}": in_core(name) for name in ELEMENTWISE if not name.startswith("peft-")},
    **{name: on_factors(name) for name in ELEMENTWISE if name.startswith("peft-")},
    **{
        f"{name}-svd": on_delta(name)
        for name in ELEMENTWISE
        if name.startswith("peft-") and name != "peft-linear"
    },
}
