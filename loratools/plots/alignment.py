"""The figure of an alignment: matrices of adapters by adapters, and maps of their modules."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from loratools.plots.drawing import MARGIN, Drawing, Figure, draw_head, new_figure
from loratools.plots.grids import Grid, grids_of
from loratools.plots.heatmaps import (
    BAR,
    Cells,
    CellSize,
    cell_size,
    diverging,
    draw_grids,
    grids_width,
    label_height,
    sequential,
)
from loratools.report import Json, Report
from loratools.spectra.alignment import Alignment, PairAlignment
from loratools.spectra.places import names_networks, place_of
from loratools.suggest import counted

COLUMNS = (
    "module", "first", "second", "⟨ΔW₁, ΔW₂⟩", "cosine", "directions compared",
    "overlap of outputs", "overlap of inputs", "by chance, outputs", "by chance, inputs",
    "smallest angle of outputs, °", "smallest angle of inputs, °",
)  # fmt: skip
_MATRICES = (
    ("cosine", "Cosine of ΔW"),
    ("overlap_out", "Overlap of output directions"),
    ("overlap_in", "Overlap of input directions"),
)
_HEAD = 1.75
_HEADING = 0.75
"""Above the maps, for their titles, in inches."""
_NOT_COMPARED = "·"
_KEY = (
    "overlap: mean squared cosine of the principal angles between leading directions; 1 is the "
    f"same space.   hatched: not adapted   {_NOT_COMPARED} not in both, or zero"
)
_LONGEST = 26
_WIDEST = 16.0
"""Inches that maps may take side by side."""
_MAPS = 3
"""Pairs of adapters whose modules are mapped; of more adapters the matrices say enough."""
_WRITTEN = 12
"""Adapters up to which the numbers stand in the cells."""


def draw_alignment(alignment: Alignment, names: Sequence[str], report: Report) -> Drawing:
    """Draw how adapters relate, all modules together, and module by module for few adapters.

    Args:
        alignment: what was found.
        names: of the adapters, as the user gave them.
        report: what ``describe_alignment`` says of it.
    """
    labels = [_shortened(name) for name in names]
    cell = min(max(2.2 / len(names), 0.16), 0.8)
    matrix = Grid("", "", labels, labels, _square(len(names)))
    across = grids_width([matrix], CellSize(cell, cell)) + BAR
    below = len(names) * cell + label_height([matrix])
    maps = _maps(alignment) if len(_pairs(alignment)) <= _MAPS else []
    size = cell_size(maps) if maps else CellSize(0, 0)
    wide, tall = _room(maps, size, len(_pairs(alignment)))
    figure = new_figure(max(3 * (across + MARGIN), wide) + MARGIN, _HEAD + below + tall + MARGIN)
    draw_head(figure, f"Alignment of {len(names)} adapters", _subtitle(alignment), _KEY)
    top = tall + below + MARGIN
    tips: dict[str, str] = {}
    for number, words in enumerate(_MATRICES):
        corner = (MARGIN + number * (across + MARGIN), top)
        tips |= _draw_matrix(figure, corner, matrix, report.facts[words[0]], words, cell)
    if maps:
        tips |= _draw_maps(figure, alignment, labels, maps, size, tall)
    title = "Alignment of " + ", ".join(labels)
    return Drawing(title, figure, tips, COLUMNS, _rows(alignment, labels))


def _room(maps: Sequence[Grid], size: CellSize, pairs: int) -> tuple[float, float]:
    """Return the inches that the maps of so many pairs take, across and down."""
    if not maps:
        return 0.0, 0.0
    across, down = _room_of_one(maps, size)
    beside = _beside(across, pairs)
    return across * beside, down * math.ceil(pairs / beside)


def _room_of_one(maps: Sequence[Grid], size: CellSize) -> tuple[float, float]:
    rows = max(len(grid.rows) for grid in maps)
    down = rows * size.height + label_height(maps) + _HEADING
    return grids_width(maps, size) + BAR + MARGIN, down


def _beside(across: float, pairs: int) -> int:
    return max(1, min(pairs, int(_WIDEST / across)))


def _subtitle(alignment: Alignment) -> str:
    shared = len({pair.module for pair in alignment.pairs})
    return f"{counted(shared, 'module')} shared by two or more"


def _shortened(name: str) -> str:
    word = Path(name).name or name
    return word if len(word) <= _LONGEST else f"{word[: _LONGEST - 8]}…{word[-7:]}"


def _square(count: int) -> dict[tuple[int, int], Sequence[str]]:
    return {(i, j): () for i in range(count) for j in range(count)}


def _draw_matrix(
    figure: Figure,
    corner: tuple[float, float],
    grid: Grid,
    values: Sequence[Sequence[Json]],
    words: tuple[str, str],
    cell: float,
) -> dict[str, str]:
    name, title = words
    shown = {
        (i, j): float(value)
        for i, row in enumerate(values)
        for j, value in enumerate(row)
        if value is not None
    }
    tips = {
        (i, j): f"{title}: {value:.4g}\n{grid.rows[i]}\n{grid.rows[j]}"
        for (i, j), value in shown.items()
    }
    scale = diverging([1.0], title) if name == "cosine" else sequential([1.0], title)
    signs = {key: f"{value:.2g}" for key, value in shown.items()} if len(values) <= _WRITTEN else {}
    cells = Cells(shown, signs, tips)
    return draw_grids(figure, corner, [grid], [cells], scale, CellSize(cell, cell), title, name)


def _maps(alignment: Alignment) -> list[Grid]:
    networks = names_networks(alignment.naming)
    modules = dict.fromkeys(pair.module for pair in alignment.pairs)
    return grids_of({module: place_of(module, networks=networks) for module in modules})


def _draw_maps(
    figure: Figure,
    alignment: Alignment,
    labels: Sequence[str],
    grids: Sequence[Grid],
    size: CellSize,
    top: float,
) -> dict[str, str]:
    """Draw, for each pair of adapters, the cosine of every module they share."""
    cosines = [pair.cosine for pair in alignment.pairs if pair.cosine is not None]
    scale = diverging(cosines, "cosine of ΔW")
    tips: dict[str, str] = {}
    across, down = _room_of_one(grids, size)
    beside = _beside(across, len(_pairs(alignment)))
    for number, (first, second) in enumerate(_pairs(alignment)):
        place = divmod(number, beside)
        corner = (MARGIN + place[1] * across, top - _HEADING - place[0] * down)
        found = {pair.module: pair for pair in alignment.between(first, second)}
        cells = [_map_cells(grid, found) for grid in grids]
        title = f"{labels[first]} and {labels[second]}, by module"
        name = f"pair-{first}-{second}"
        tips |= draw_grids(figure, corner, grids, cells, scale, size, title, name)
    return tips


def _pairs(alignment: Alignment) -> list[tuple[int, int]]:
    return list(dict.fromkeys((pair.first, pair.second) for pair in alignment.pairs))


def _map_cells(grid: Grid, found: Mapping[str, PairAlignment]) -> Cells:
    """Return the mean cosine of each cell's modules: several are experts of one layer."""
    values: dict[tuple[int, int], float] = {}
    tips: dict[tuple[int, int], str] = {}
    for key, modules in grid.cells.items():
        here = [found[module] for module in modules if module in found]
        tips[key] = "\n".join(_tip(pair) for pair in here) or "not shared"
        cosines = [pair.cosine for pair in here if pair.cosine is not None]
        if cosines:
            values[key] = sum(cosines) / len(cosines)
    missing = {key: _NOT_COMPARED for key in grid.cells if key not in values}
    return Cells(values, missing, tips)


def _tip(pair: PairAlignment) -> str:
    if pair.cosine is None:
        return f"{pair.module}\none of the changes is zero"
    return (
        f"{pair.module}\ncosine {pair.cosine:.3g}\noverlap of the leading {pair.leading}:"
        f" outputs {pair.overlap_out:.3g} (by chance {pair.chance_out:.2g}),"
        f" inputs {pair.overlap_in:.3g} (by chance {pair.chance_in:.2g})"
    )


def _rows(
    alignment: Alignment, labels: Sequence[str]
) -> list[tuple[str | float | int | None, ...]]:
    return [
        (pair.module, labels[pair.first], labels[pair.second], *astuple(pair)[3:])
        for pair in alignment.pairs
    ]
