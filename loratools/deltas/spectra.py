"""The singular values of every layer of an adapter at once, and changes of any rank from them.

Layers of equal shape are decomposed together, and several such groups by several threads. What is
kept of a layer is its values and r×r cores; vectors are formed when a rank has been chosen.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from loratools.compute import Compute, one_thread_kernels
from loratools.deltas.base import AdditiveDelta
from loratools.deltas.experts import ExpertLoRA
from loratools.deltas.lokr import LoKr
from loratools.deltas.lora import LoRA
from loratools.deltas.spectral import delta_svd, factored_view, matrix_shape
from loratools.errors import NonFiniteError
from loratools.linalg.factored import SVD, CoreSVD, core_svd
from loratools.linalg.finite import is_finite

_CHUNK: Mapping[str, int] = {"cpu": 1 << 19}
"""Elements of the factors decomposed at once, by device: 4 MiB of float64 stay near a core."""
_WIDE_CHUNK = 1 << 26

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, eq=False)
class LayerSpectrum(ABC):
    """What one layer's change is made of.

    Attributes:
        delta: the change.
        values: (k,), float64, descending: the singular values of ΔW, scale included. Those of a
            stack of experts are √Σσ² over the experts, so that energies add up.
    """

    delta: AdditiveDelta
    values: Tensor

    @property
    def scale(self) -> float:
        """Alpha / rank that a smaller change should keep."""
        return float(getattr(self.delta, "scale", 1.0))

    @abstractmethod
    def leading(self, rank: int) -> SVD:
        """Return the first ``rank`` triplets of ΔW: (out, k), (k,), (k, in·k...)."""


@dataclass(frozen=True, slots=True, eq=False)
class FactoredSpectrum(LayerSpectrum):
    """Of a low-rank product, or a stack of them: vectors are made of the factors' columns."""

    core: CoreSVD
    device: str

    @property
    def scale(self) -> float:
        own = getattr(self.delta, "scale", None)
        if own is None:
            plain = factored_view(self.delta)
            assert plain is not None
            own = plain.scale
        return float(own)

    def leading(self, rank: int) -> SVD:
        """Return the first triplets; those of experts stand in a batch."""
        up, down, scale = wide_factors(self.delta, self.device)
        found = self.core.leading(up, down, rank)
        sign = -1.0 if scale < 0 else 1.0
        return SVD(found.left * sign, found.values * abs(scale), found.right)


@dataclass(frozen=True, slots=True, eq=False)
class KroneckerSpectrum(LayerSpectrum):
    """Of w1 ⊗ w2: the products of the sides' values, the Kronecker products of their vectors."""

    first: SVD
    second: SVD

    def leading(self, rank: int) -> SVD:
        """Return the triplets of the largest products."""
        one, two = _largest_pairs(self.first, self.second)
        one, two = one[:rank], two[:rank]
        left = _columns_kron(self.first.left[:, one], self.second.left[:, two])
        right = _columns_kron(self.first.right[one].mT, self.second.right[two].mT).mT
        sign = -1.0 if self.scale < 0 else 1.0
        return SVD(left * sign, self.values[:rank], right)


@dataclass(frozen=True, slots=True, eq=False)
class DenseSpectrum(LayerSpectrum):
    """Of a matrix without useful factors: decomposed again for its vectors, to save memory."""

    device: str

    def leading(self, rank: int) -> SVD:
        """Return the first triplets, in float32."""
        return delta_svd(self.delta, self.device).leading(rank)


def spectra_of_layers(
    layers: Mapping[str, AdditiveDelta], compute: Compute | None = None
) -> dict[str, LayerSpectrum]:
    """Return the spectrum of every layer, in the order given.

    Args:
        layers: path → a change that is a matrix, a convolution or a stack of experts.
        compute: the device, and how many groups of layers are decomposed at a time.

    Raises:
        NonFiniteError: naming the layer.
    """
    where = compute or Compute()
    found: dict[str, LayerSpectrum] = {}
    for part in in_threads(partial(_decompose, where.device), _jobs(layers, where.device), where):
        found |= part
    return {path: found[path] for path in layers}


def in_threads(
    function: Callable[[Item], Result], items: Iterable[Item], compute: Compute
) -> Iterator[Result]:
    """Yield ``function`` of each item in order, as many at a time as there are workers.

    Each keeps to its own thread; on another device than the CPU, one thread gives all the work.
    """
    workers = compute.workers if compute.device == "cpu" else 1
    with one_thread_kernels(), ThreadPoolExecutor(workers) as pool:
        yield from pool.map(function, items)


Job = Sequence[tuple[str, AdditiveDelta]]


def _jobs(layers: Mapping[str, AdditiveDelta], device: str) -> list[Job]:
    """Return layers of one shape and rank in groups of bounded size, any others alone."""
    groups: dict[tuple[object, ...], list[tuple[str, AdditiveDelta]]] = {}
    for path, delta in layers.items():
        alike = (delta.up.shape, delta.down.shape) if isinstance(delta, LoRA) else (path,)
        groups.setdefault(alike, []).append((path, delta))
    jobs: list[Job] = []
    for group in groups.values():
        first = group[0][1]
        size = sum(tensor.numel() for tensor in first.tensors().values())
        count = max(1, _CHUNK.get(device, _WIDE_CHUNK) // max(1, size))
        jobs += [group[start : start + count] for start in range(0, len(group), count)]
    # The long ones first, so that the threads end together.
    return sorted(jobs, key=lambda job: -sum(map(_elements, job)))


def _elements(one: tuple[str, AdditiveDelta]) -> int:
    return sum(tensor.numel() for tensor in one[1].tensors().values())


def _decompose(device: str, job: Job) -> dict[str, LayerSpectrum]:
    try:
        if all(isinstance(delta, LoRA) for _, delta in job):
            return _factored_together(job, device)
        return {path: _spectrum(delta, device) for path, delta in job}
    except NonFiniteError as error:
        paths = ", ".join(path for path, delta in job if not _is_finite(delta))
        raise NonFiniteError(f"{paths}: {error.message}", error.hint) from error


def _is_finite(delta: AdditiveDelta) -> bool:
    return all(is_finite(tensor) for tensor in delta.tensors().values())


def wide_factors(delta: AdditiveDelta, device: str) -> tuple[Tensor, Tensor, float]:
    """Return float64 (…, out, r) and (…, r, in·k...) of a factored change, and its scale."""
    plain = delta if isinstance(delta, ExpertLoRA) else factored_view(delta)
    assert plain is not None
    up, down = plain.up.to(device, torch.float64), plain.down.to(device, torch.float64)
    if isinstance(plain, LoRA):
        up, down = up.flatten(1), down.flatten(1)
    return up, down, plain.scale


def _factored_together(job: Job, device: str) -> dict[str, LayerSpectrum]:
    factors = [wide_factors(delta, device) for _, delta in job]
    whole = core_svd(torch.stack([f[0] for f in factors]), torch.stack([f[1] for f in factors]))
    found: dict[str, LayerSpectrum] = {}
    for position, (path, delta) in enumerate(job):
        core = CoreSVD(
            whole.left_core[position], whole.values[position], whole.right_core[position]
        )
        values = core.values * abs(factors[position][2])
        found[path] = FactoredSpectrum(delta, values, core, device)
    return found


def _spectrum(delta: AdditiveDelta, device: str) -> LayerSpectrum:
    if isinstance(delta, LoKr):
        return _kronecker(delta)
    if isinstance(delta, ExpertLoRA) or factored_view(delta) is not None:
        up, down, scale = wide_factors(delta, device)
        core = core_svd(up, down)
        values = core.values * abs(scale)
        if values.dim() > 1:
            values = values.square().sum(0).sqrt()
        return FactoredSpectrum(delta, values, core, device)
    if not _is_finite(delta):
        raise NonFiniteError("NaN or infinity in its tensors", "repair or retrain the adapter")
    dense = delta.materialize().to(device).reshape(matrix_shape(delta))
    values = torch.linalg.svdvals(dense).to("cpu", torch.float64)
    return DenseSpectrum(delta, values, device)


def _kronecker(delta: LoKr) -> KroneckerSpectrum:
    if not _is_finite(delta):
        raise NonFiniteError("NaN or infinity in its tensors", "repair or retrain the adapter")
    first, second = (
        SVD(*torch.linalg.svd(side.to(torch.float64), full_matrices=False))
        for side in delta.sides()
    )
    one, two = _largest_pairs(first, second)
    values = first.values[one] * second.values[two] * abs(delta.scale)
    return KroneckerSpectrum(delta, values, first, second)


def _largest_pairs(first: SVD, second: SVD) -> tuple[Tensor, Tensor]:
    """Return the positions in both spectra of every product, the largest first."""
    products = torch.outer(first.values, second.values).flatten()
    order = products.sort(descending=True, stable=True).indices
    count = len(second.values)
    return order // count, order % count


def _columns_kron(first: Tensor, second: Tensor) -> Tensor:
    """Return (m₁·m₂, k): column j is first[:, j] ⊗ second[:, j]."""
    return (first[:, None, :] * second[None, :, :]).flatten(0, 1)
