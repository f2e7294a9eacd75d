"""The figure of one adapter's spectrum."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from loratools.plots.curves import draw_decay, draw_energy
from loratools.plots.drawing import MARGIN, Drawing, Figure, draw_head, new_figure
from loratools.plots.grids import Grid, grids_of
from loratools.plots.heatmaps import (
    BAR,
    Cells,
    axes_at,
    cell_size,
    draw_grids,
    grids_width,
    label_height,
    logarithmic,
    sequential,
)
from loratools.report import Json
from loratools.spectra.figures import SHARES, group_layers, places_of
from loratools.spectra.layers import AdapterSpectrum, LayerSpectrum
from loratools.suggest import counted

_HEAD = 1.55
_FOOT = 0.55
_CURVES = 2.9
_INSET = 0.6
_LEGEND = 2.1
_RELATIVE = "‖ΔW‖ / that of the largest (log)"
_TIPS = 8
"""Modules that one tooltip lists (experts of one layer share a cell)."""
_NO_SPECTRUM, _ZERO = "·", "×"
_MEANINGS = {
    _ZERO: "changes nothing",
    _NO_SPECTRUM: "no spectrum (NaN, or the change depends on the base)",
}

COLUMNS = (
    "module", "kind", "shape", "‖ΔW‖", "share of energy, %", "effective rank", "stable rank",
    *(f"rank for {share:.0%}" for share in SHARES),
)  # fmt: skip

Layers = Sequence[LayerSpectrum]


def draw_spectrum(
    spectrum: AdapterSpectrum, naming: str, source: str, facts: Mapping[str, Json]
) -> Drawing:
    """Draw ‖ΔW‖ and effective rank of every module, and the curves below them.

    Args:
        spectrum: what was measured.
        naming: of the modules' paths.
        source: the file's name.
        facts: what ``summarize`` says of it: format, ranks, parameters.
    """
    title = f"{source}: spectrum"
    if not spectrum.layers and not spectrum.uncovered:
        figure = new_figure(8, 1.6)
        draw_head(figure, source, _subtitle(facts), "no layer is adapted: there is nothing to draw")
        return Drawing(title, figure)
    grids = grids_of(places_of(spectrum, naming))
    size = cell_size(grids)
    largest = max((layer.norm for layer in spectrum.layers), default=0.0) or 1.0
    norms = [_cells(grid, spectrum, partial(_norm, largest)) for grid in grids]
    ranks = [_cells(grid, spectrum, _mean_rank) for grid in grids]
    across = grids_width(grids, size) + BAR
    tall = max(len(grid.rows) for grid in grids) * size.height + label_height(grids)
    width = max(2 * across + 3 * MARGIN, 11.0)
    top = tall + _CURVES + _FOOT + 0.35
    figure = new_figure(width, top + _HEAD)
    draw_head(figure, source, _subtitle(facts), _key(norms, spectrum))
    sides = (
        ("norm", "Size of the change", norms, logarithmic(_all(norms), _RELATIVE)),
        ("rank", "Effective rank", ranks, sequential(_all(ranks), "effective rank")),
    )
    tips: dict[str, str] = {}
    for side, (name, heading, cells, scale) in enumerate(sides):
        corner = (MARGIN + side * (width - MARGIN) / 2, top)
        tips |= draw_grids(figure, corner, grids, cells, scale, size, heading, name)
    _draw_curves(figure, spectrum, naming, width)
    return Drawing(title, figure, tips, COLUMNS, _rows(spectrum))


def _subtitle(facts: Mapping[str, Json]) -> str:
    norm = facts.get("delta_norm")
    words = (
        facts.get("format"),
        facts.get("architecture"),
        _ranks(facts.get("ranks") or {}),
        counted(facts.get("layers", 0), "layer"),
        f"{facts.get('parameters', 0):,} parameters",
        f"‖ΔW‖ = {norm:.4g}" if norm is not None and math.isfinite(norm) else None,
    )
    return "  ·  ".join(word for word in words if word)


def _ranks(ranks: Mapping[str, int]) -> str:
    numbers = sorted(ranks, key=int)
    if len(numbers) > 4:
        return f"ranks {numbers[0]} to {numbers[-1]}"
    return f"rank {', '.join(numbers)}" if numbers else ""


def _key(cells: Sequence[Cells], spectrum: AdapterSpectrum) -> str:
    """Return what the signs in the cells mean, those that occur, and what is covered in part."""
    found = {sign for one in cells for sign in one.marks.values()}
    words = [f"{sign} {meaning}" for sign, meaning in _MEANINGS.items() if sign in found]
    parts = Counter(layer.part for layer in spectrum.layers if layer.part)
    words += [f"numbers of {counted(count, 'layer')}: {part}" for part, count in parts.items()]
    return "   ".join(["white: not adapted", *words])


def _cells(grid: Grid, spectrum: AdapterSpectrum, number: Callable[[Layers], float]) -> Cells:
    by_name = {layer.module: layer for layer in spectrum.layers}
    values: dict[tuple[int, int], float] = {}
    marks: dict[tuple[int, int], str] = {}
    tips: dict[tuple[int, int], str] = {}
    for key, modules in grid.cells.items():
        here = [by_name[module] for module in modules if module in by_name]
        tips[key] = "\n".join(_tip(module, by_name, spectrum) for module in modules[:_TIPS])
        if any(layer.energy for layer in here):
            values[key] = number(here)
        else:
            marks[key] = _ZERO if here else _NO_SPECTRUM
    return Cells(values, marks, tips)


def _norm(largest: float, layers: Layers) -> float:
    return float(sum(layer.energy for layer in layers) ** 0.5 / largest)


def _mean_rank(layers: Layers) -> float:
    return sum(layer.effective_rank for layer in layers) / len(layers)


def _all(cells: Sequence[Cells]) -> list[float]:
    return [value for one in cells for value in one.values.values()]


def _tip(module: str, layers: Mapping[str, LayerSpectrum], spectrum: AdapterSpectrum) -> str:
    if module not in layers:
        return f"{module}\nno spectrum: {spectrum.uncovered[module]}"
    layer = layers[module]
    shape = " × ".join(map(str, layer.shape))
    ranks = ", ".join(f"{layer.energy_rank(share)} for {share:.0%}" for share in SHARES)
    part = f"\n{layer.part}" if layer.part else ""
    return (
        f"{module}\n{layer.kind}, {shape}{part}\n‖ΔW‖ = {layer.norm:.4g}"
        f" ({_percent(layer, spectrum):.2g}% of the energy)\neffective rank"
        f" {layer.effective_rank:.3g}, stable rank {layer.stable_rank:.3g}\nrank {ranks}"
    )


def _percent(layer: LayerSpectrum, spectrum: AdapterSpectrum) -> float:
    return 100 * layer.energy / spectrum.energy if spectrum.energy else 0.0


def _rows(spectrum: AdapterSpectrum) -> list[tuple[str | float | int | None, ...]]:
    covered: list[tuple[str | float | int | None, ...]] = [
        (
            layer.module, layer.kind, "×".join(map(str, layer.shape)), layer.norm,
            _percent(layer, spectrum), layer.effective_rank, layer.stable_rank,
            *(layer.energy_rank(share) for share in SHARES),
        )
        for layer in spectrum.layers
    ]  # fmt: skip
    empty = (None,) * (len(COLUMNS) - 2)
    return [*covered, *((module, why, *empty) for module, why in spectrum.uncovered.items())]


def _draw_curves(figure: Figure, spectrum: AdapterSpectrum, naming: str, width: float) -> None:
    if not spectrum.energy:
        return
    half = (width - MARGIN) / 2
    wide, inset = half - _LEGEND - _INSET, MARGIN + _INSET
    decay, energy = (
        axes_at(figure, inset + side * half, _FOOT, wide, _CURVES - 0.4) for side in (0, 1)
    )
    draw_decay(decay, group_layers(spectrum, naming))
    draw_energy(energy, spectrum)
