"""The figures of a spectrum, for a report."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.report import Json
from loratools.spectra.layers import AdapterSpectrum, LayerSpectrum
from loratools.spectra.places import Place, names_networks, place_of

SHARES = (0.95, 0.99)
"""Parts of the energy ‖ΔW‖² that suggested ranks keep."""

RULE = (
    "the least rank that keeps this share of the energy (the sum of squared singular values): "
    "of each layer's own, and with one rank in all layers, of the whole file's"
)


@dataclass(frozen=True, slots=True)
class Group:
    """Layers of one module kind in one network."""

    network: str
    module: str
    layers: tuple[LayerSpectrum, ...]


def places_of(spectrum: AdapterSpectrum, naming: str) -> dict[str, Place]:
    """Return the place of every module, covered or not."""
    names = [*(layer.module for layer in spectrum.layers), *spectrum.uncovered]
    return {name: place_of(name, networks=names_networks(naming)) for name in names}


def group_layers(spectrum: AdapterSpectrum, naming: str) -> list[Group]:
    """Return the layers by network and module kind, in order of appearance."""
    places = places_of(spectrum, naming)
    groups: dict[tuple[str, str], list[LayerSpectrum]] = {}
    for layer in spectrum.layers:
        place = places[layer.module]
        groups.setdefault((place.network, place.module), []).append(layer)
    return [Group(*key, tuple(layers)) for key, layers in groups.items()]


def energy_curve(layers: Iterable[LayerSpectrum]) -> Tensor:
    """Return the share of all layers' energy that the first 1, 2, ... values of each hold, (k,)."""
    squares = [layer.values.square() for layer in layers]
    longest = max((len(values) for values in squares), default=0)
    sums = torch.zeros(longest, dtype=torch.float64)
    for values in squares:
        sums[: len(values)] += values
    sums = sums.cumsum(0)
    return sums / sums[-1] if longest and float(sums[-1]) else torch.ones_like(sums)


def common_rank(layers: Sequence[LayerSpectrum], share: float) -> int:
    """Return the least rank that, given to all layers, keeps ``share`` of their energy."""
    if not any(layer.energy for layer in layers):
        return 0
    return int(torch.searchsorted(energy_curve(layers), share)) + 1


def spectrum_facts(spectrum: AdapterSpectrum, naming: str) -> dict[str, Json]:
    """Return what a report says of a spectrum; numbers of values have seven digits."""
    layers = spectrum.layers
    curve = energy_curve(layers)
    return {
        "layers_covered": len(layers),
        "not_covered": dict(spectrum.uncovered),
        "covered_in_part": dict(Counter(layer.part for layer in layers if layer.part)),
        "rule": RULE,
        "suggested_ranks": {_name(share): _suggestion(layers, share) for share in SHARES},
        "energy_at_rank": {str(rank): float(curve[rank - 1]) for rank in _doublings(len(curve))},
        "effective_rank": _spread([layer.effective_rank for layer in layers]),
        "stable_rank": _spread([layer.stable_rank for layer in layers]),
        "by_module": [_group_row(g, spectrum.energy) for g in group_layers(spectrum, naming)],
        "by_layer": [_layer_row(layer, spectrum.energy) for layer in layers],
    }


def _name(share: float) -> str:
    return f"{share:g}"


def _suggestion(layers: Sequence[LayerSpectrum], share: float) -> dict[str, Json]:
    return {
        "all_layers": common_rank(layers, share),
        "by_layer": _spread([layer.energy_rank(share) for layer in layers]),
    }


def _spread(numbers: Sequence[float]) -> dict[str, Json] | None:
    """Return the least, the middle and the greatest number."""
    if not numbers:
        return None
    middle = statistics.median_low(numbers)
    return {"min": min(numbers), "median": middle, "max": max(numbers)}


def _doublings(limit: int) -> list[int]:
    """Return 1, 2, 4, ... below the limit, and the limit."""
    ranks = [1 << n for n in range(limit.bit_length()) if 1 << n < limit]
    return [*ranks, limit] if limit else []


def _group_row(group: Group, whole: float) -> dict[str, Json]:
    energy = sum(layer.energy for layer in group.layers)
    return {
        "network": group.network or None,
        "module": group.module,
        "layers": len(group.layers),
        "norm": energy**0.5,
        "share_of_energy": energy / whole if whole else 0.0,
        "effective_rank": _spread([layer.effective_rank for layer in group.layers]),
        "stable_rank": _spread([layer.stable_rank for layer in group.layers]),
        "suggested_ranks": {
            _name(share): _spread([layer.energy_rank(share) for layer in group.layers])
            for share in SHARES
        },
    }


def _layer_row(layer: LayerSpectrum, whole: float) -> dict[str, Json]:
    curve = energy_curve([layer])
    return {
        "module": layer.module,
        "kind": layer.kind,
        "part": layer.part,
        "shape": list(layer.shape),
        "norm": layer.norm,
        "share_of_energy": layer.energy / whole if whole else 0.0,
        "effective_rank": layer.effective_rank,
        "stable_rank": layer.stable_rank,
        "suggested_ranks": {_name(share): layer.energy_rank(share) for share in SHARES},
        "energy_at_rank": {str(rank): float(curve[rank - 1]) for rank in _doublings(len(curve))},
        "singular_values": [float(f"{value:.7g}") for value in layer.values.tolist()],
    }
