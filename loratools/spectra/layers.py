"""The spectrum of every layer of an adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from loratools.adapter import Adapter
from loratools.compute import resolve_compute
from loratools.deltas import AdditiveDelta, DoRA, ExpertLoRA, LayerDelta, MovedBase
from loratools.deltas.spectra import spectra_of_layers
from loratools.linalg import spectra
from loratools.linalg.finite import is_finite

_INNER: Mapping[type[LayerDelta], tuple[Callable[..., AdditiveDelta], str]] = {
    DoRA: (lambda delta: delta.inner, "of the change of direction, without the magnitudes"),
    MovedBase: (lambda delta: delta.lora, "of the trained factors, without the start they had"),
}
"""Changes that depend on the base, and the part of them that does not."""

BASE_DEPENDENT = "its change depends on the base weight"
_BIAS_ONLY = "it changes a bias only"
_NOT_FINITE = "it holds NaN or infinity"


@dataclass(frozen=True, eq=False)
class LayerSpectrum:
    """The singular values of one change.

    Attributes:
        module: the layer's path; an expert's ends in its number in brackets.
        kind: the parameterisation.
        shape: of the weight.
        values: (k,) float64, descending.
        part: which part of the change it is of, or None for all of it.
    """

    module: str
    kind: str
    shape: tuple[int, ...]
    values: Tensor
    part: str | None = None

    @cached_property
    def energy(self) -> float:
        """‖ΔW‖² (Frobenius)."""
        return float(self.values.square().sum())

    @property
    def norm(self) -> float:
        """‖ΔW‖ (Frobenius)."""
        return math.sqrt(self.energy)

    @cached_property
    def effective_rank(self) -> float:
        """The exponential of the values' entropy; 0 for a change that is zero."""
        return spectra.effective_rank(self.values)

    @cached_property
    def stable_rank(self) -> float:
        """‖ΔW‖²_F / ‖ΔW‖²₂; 0 for a change that is zero."""
        return spectra.stable_rank(self.values)

    def energy_rank(self, share: float) -> int:
        """Return the least rank that keeps ``share`` of ‖ΔW‖²; 0 for a change that is zero."""
        return spectra.energy_rank(self.values, share) if self.energy else 0


@dataclass(frozen=True, eq=False)
class AdapterSpectrum:
    """The spectra of an adapter.

    Attributes:
        layers: in the adapter's order; each expert is one.
        uncovered: module → why it has no spectrum.
    """

    layers: tuple[LayerSpectrum, ...]
    uncovered: Mapping[str, str]

    @cached_property
    def energy(self) -> float:
        """Σ‖ΔW‖²."""
        return sum(layer.energy for layer in self.layers)


@dataclass(frozen=True, slots=True, eq=False)
class AdditiveLayers:
    """What of an adapter does not depend on the base.

    Attributes:
        deltas: path → change; an expert's path ends in its number in brackets.
        parts: path → which part of the layer's change it is, or None for all of it.
        kinds: path → the layer's parameterisation.
        uncovered: layer → why nothing of it is here.
    """

    deltas: Mapping[str, AdditiveDelta]
    parts: Mapping[str, str | None]
    kinds: Mapping[str, str]
    uncovered: Mapping[str, str]


def measure_spectrum(adapter: Adapter) -> AdapterSpectrum:
    """Return the singular values of every layer's ΔW, several layers at a time.

    Changes that depend on the base have the spectrum of their additive part, if they have one.
    """
    found = additive_layers(adapter)
    spectra_found = spectra_of_layers(found.deltas, resolve_compute())
    layers = tuple(
        LayerSpectrum(
            path, found.kinds[path], one.delta.weight_shape, one.values, found.parts[path]
        )
        for path, one in spectra_found.items()
    )
    return AdapterSpectrum(layers, found.uncovered)


def additive_layers(adapter: Adapter) -> AdditiveLayers:
    """Return the additive changes of an adapter, or additive parts of changes."""
    uncovered: dict[str, str] = {}
    deltas: dict[str, AdditiveDelta] = {}
    parts: dict[str, str | None] = {}
    kinds: dict[str, str] = {}
    for path, delta in adapter.layers.items():
        additive, word = additive_part(delta)
        if additive is None:
            uncovered[path] = word or BASE_DEPENDENT
            continue
        for name, product in _products(path, additive):
            deltas[name], parts[name], kinds[name] = product, word, delta.kind
    return AdditiveLayers(deltas, parts, kinds, uncovered)


def additive_part(delta: LayerDelta) -> tuple[AdditiveDelta | None, str | None]:
    """Return what of a change does not depend on the base, and which part that is.

    None and the reason where there is nothing; the second is None where it is the whole change.
    """
    if not delta.changes_weight:
        return None, _BIAS_ONLY
    if not all(is_finite(tensor) for tensor in delta.tensors().values()):
        return None, _NOT_FINITE
    if isinstance(delta, AdditiveDelta):
        return delta, None
    if type(delta) in _INNER:
        part, word = _INNER[type(delta)]
        return part(delta), word
    return None, BASE_DEPENDENT


def _products(path: str, delta: AdditiveDelta) -> Iterator[tuple[str, AdditiveDelta]]:
    """Yield the matrices that a change consists of: one, or one for each expert."""
    if isinstance(delta, ExpertLoRA):
        yield from ((f"{path}[{n}]", delta.expert(n)) for n in range(delta.weight_shape[0]))
    else:
        yield path, delta
