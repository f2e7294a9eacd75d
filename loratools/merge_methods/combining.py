"""One layer's changes combined by a method: on coefficients, cores, factors, or the dense layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from loratools.errors import NonFiniteError
from loratools.linalg.factored import SVD, factored_svd
from loratools.linalg.finite import is_finite
from loratools.linalg.randomized import randomized_svd
from loratools.linalg.spectra import truncation_error
from loratools.merge_methods import load_function
from loratools.merge_methods.method import NEGLIGIBLE, Factors, Method, Settings, Space
from loratools.merge_methods.pruning import ROUNDING, without_rounding


@dataclass(frozen=True, slots=True, eq=False)
class Combined:
    """The result of a layer.

    Attributes:
        up: (m, k), float32.
        down: (k, n), float32; up @ down is the result.
        error: ‖exact − result‖/‖exact‖ (Frobenius), what the choice of a rank cost.
        gram: (T, T), ⟨ΔWᵢ, ΔWⱼ⟩ of the inputs, float64.
    """

    up: Tensor
    down: Tensor
    error: float
    gram: Tensor


@dataclass(frozen=True)
class Layer:
    """What is to be combined in one layer.

    Attributes:
        parts: one for each adapter, of equal (m, n); of rank 0 where it lacks the layer.
        weights: (T,), float64.
        settings: density and chance.
        rank: of the best approximation to the exact result; ``None`` for the exact result.
    """

    parts: Sequence[Factors]
    weights: Tensor
    settings: Settings
    rank: int | None = None

    @property
    def sides(self) -> tuple[int, int]:
        """(m, n)."""
        return self.parts[0].up.shape[0], self.parts[0].down.shape[1]

    @cached_property
    def gram(self) -> Tensor:
        """⟨ΔWᵢ, ΔWⱼ⟩ from the Gram matrices of all ups and of all downs, (T, T)."""
        ups = torch.cat([part.up * part.scale for part in self.parts], dim=1)
        downs = torch.cat([part.down for part in self.parts])
        products = (ups.T @ ups) * (downs @ downs.T)
        ranks = [part.rank for part in self.parts]
        rows = torch.stack([block.sum(dim=0) for block in products.split(ranks)])
        return torch.stack([block.sum(dim=1) for block in rows.split(ranks, dim=1)], dim=1)

    def present(self) -> Layer:
        """Return the layer with only the adapters that have it."""
        here = [position for position, part in enumerate(self.parts) if part.rank]
        parts = [self.parts[position] for position in here]
        return replace(self, parts=parts, weights=self.weights[here])


@dataclass(frozen=True)
class Cores:
    """Changes in orthonormal bases of all their columns and rows: ΔWᵢ = left @ cores[i] @ right.

    Attributes:
        left: (m, p).
        cores: (T, p, q).
        right: (q, n).
    """

    left: Tensor
    cores: Tensor
    right: Tensor

    @cached_property
    def gram(self) -> Tensor:
        """⟨ΔWᵢ, ΔWⱼ⟩, (T, T)."""
        flat = self.cores.flatten(1)
        return flat @ flat.T

    def canonical(self) -> Cores:
        """Return the same changes in bases that depend on them alone, not on their factors.

        Left singular vectors of [ΔW₁ ... ΔW_T] and right ones of [ΔW₁; ...; ΔW_T]. Core Space
        takes them from [B₁ ... B_T] and [A₁; ...; A_T] instead: the same spaces, but axes that
        change when a factor is scaled against the other, which elementwise methods would show.
        """
        left, lows = _basis(torch.cat(list(self.cores), dim=1))
        right, highs = _basis(torch.cat(list(self.cores.mT), dim=1))
        left, right = left[:, lows], right[:, highs]
        cores = left.T @ self.cores @ right
        return Cores(self.left @ left, without_rounding(cores), right.T @ self.right)

    def lift(self, core: Tensor) -> SVD:
        """Return the singular triplets of left @ core @ right."""
        _check_finite(core)
        inner, values, outer = torch.linalg.svd(core, full_matrices=False)
        return SVD(self.left @ inner, values, outer @ self.right)


def _basis(stacked: Tensor) -> tuple[Tensor, Tensor]:
    """Return left singular vectors, and which of them are of nonzero values."""
    left, values, _ = torch.linalg.svd(stacked, full_matrices=False)
    return left, values > NEGLIGIBLE * values.max()


def cores_of(parts: Sequence[Factors]) -> Cores:
    """Return the cores of changes given as factors: QR of all ups and of all downs."""
    ups = torch.cat([part.up * part.scale for part in parts], dim=1)
    downs = torch.cat([part.down for part in parts])
    left, left_core = torch.linalg.qr(ups)
    right, right_core = torch.linalg.qr(downs.T)
    ranks = [part.rank for part in parts]
    blocks = zip(left_core.split(ranks, dim=1), right_core.split(ranks, dim=1), strict=True)
    return Cores(left, torch.stack([one @ other.T for one, other in blocks]), right.T)


def combine(method: Method, layer: Layer) -> Combined:
    """Return the method's result for one layer, at most of rank ``layer.rank``."""
    steps: Mapping[Space, Callable[[Method, Layer], Combined]] = {
        "span": _in_span,
        "rotation": _rotated,
        "core": _on_cores,
        "dense": _on_dense,
        "factors": _on_factors,
    }
    return steps[method.space](method, layer)


def _in_span(method: Method, layer: Layer) -> Combined:
    total = sum(part.rank for part in layer.parts)
    if layer.rank is None and not method.reduces and total <= min(layer.sides):
        chosen = load_function(method)(layer.gram, layer.weights)
        return Combined(*_side_by_side(layer, chosen), 0.0, layer.gram)
    cores = cores_of(layer.parts)
    chosen = load_function(method)(cores.gram, layer.weights)
    core = torch.einsum("t,tpq->pq", chosen, cores.cores)
    return _cut(cores.lift(core), layer.rank, cores.gram)


def _side_by_side(layer: Layer, factors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of Σ cᵢΔWᵢ beside each other; changes with cᵢ = 0 take no rank."""
    used = [(c, part) for c, part in zip(factors.tolist(), layer.parts, strict=True) if c]
    if not any(part.rank for _, part in used):
        return _zero(*layer.sides)
    up = torch.cat([part.up * (c * part.scale) for c, part in used], dim=1)
    return up.to(torch.float32), torch.cat([part.down for _, part in used]).to(torch.float32)


def _zero(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Return a product of rank 1 that is zero."""
    return torch.zeros(rows, 1), torch.zeros(1, columns)


def _rotated(method: Method, layer: Layer) -> Combined:
    cores = cores_of(layer.parts)
    core = load_function(method)(cores.cores, layer.weights, min(layer.sides))
    return _cut(cores.lift(core), layer.rank, cores.gram)


def _on_cores(method: Method, layer: Layer) -> Combined:
    if not bool((layer.gram.diagonal() > 0).any()):
        return Combined(*_zero(*layer.sides), 0.0, layer.gram)
    cores = cores_of(layer.parts).canonical()
    core = load_function(method)(cores.cores, layer.weights, layer.settings)
    return _cut(cores.lift(core), layer.rank, cores.gram)


def _on_dense(method: Method, layer: Layer) -> Combined:
    if layer.rank is None:
        raise ValueError(f"{method.name} has no exact low rank: choose one")
    pairs = [(part.up * part.scale, part.down) for part in layer.parts]
    deltas = torch.stack([up.float() @ down.float() for up, down in pairs])
    merged = load_function(method)(deltas, layer.weights, layer.settings)
    del deltas
    _check_finite(merged)
    least = min(layer.rank, *merged.shape)
    found, error = randomized_svd(merged, least, generator=layer.settings.generator)
    return Combined(*_factors(found, least), error, layer.gram)


def _check_finite(combined: Tensor) -> None:
    if not is_finite(combined):
        raise NonFiniteError(
            "the changes, or their sum, are beyond float32",
            hint="give smaller weights, or leave out the adapter of so large a change",
        )


def _on_factors(method: Method, layer: Layer) -> Combined:
    used = layer.present() if method.equal_ranks else layer
    up, down = load_function(method)(used.parts, used.weights, used.settings)
    if up.shape[1] > (min(layer.sides) if layer.rank is None else layer.rank):
        return _cut(factored_svd(up, down), layer.rank, layer.gram)
    return Combined(up.to(torch.float32), down.to(torch.float32), 0.0, layer.gram)


def _cut(found: SVD, rank: int | None, gram: Tensor) -> Combined:
    """Return the leading triplets: as many as allowed, without those of zero values."""
    # What cancels leaves rounding, which only the size of the inputs tells from a small result.
    largest = float(gram.diagonal().max().clamp(min=0).sqrt())
    values = torch.where(found.values > ROUNDING * largest, found.values, 0)
    kept = len(values) if rank is None else min(rank, len(values))
    factors = _factors(replace(found, values=values), kept)
    return Combined(*factors, truncation_error(values, kept), gram)


def _factors(found: SVD, rank: int) -> tuple[Tensor, Tensor]:
    """Return balanced factors, √σ on both sides."""
    values = found.values[:rank]
    kept = int((values > NEGLIGIBLE * values.max()).sum()) if len(values) else 0
    if not kept:
        return _zero(found.left.shape[0], found.right.shape[1])
    root = values[:kept].sqrt()
    up, down = found.left[:, :kept] * root, root[:, None] * found.right[:kept]
    return up.to(torch.float32), down.to(torch.float32)
