"""Heat maps of modules: cells that people can count, point at, and tell from empty ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from loratools.plots.drawing import Figure, legible
from loratools.plots.grids import Grid

Key = tuple[int, int]

_LABEL = 0.062
"""Width of a character of a tick label, in inches."""
_APART = 0.115
"""Least distance of two tick labels, in inches."""
BAR = 0.95
"""Width of a colour bar with its gap and labels, in inches."""
_GAP = 0.3
_MARKED = "#ececec"
"""Behind the sign of a cell that has no number."""


@dataclass(frozen=True, slots=True)
class Cells:
    """What to show in a grid.

    Attributes:
        values: cell → number, on the colour scale; others stay blank.
        marks: cell → a sign or number to write in it; without a value it stands on grey.
        tips: cell → what to say when it is pointed at.
    """

    values: Mapping[Key, float]
    marks: Mapping[Key, str] = field(default_factory=lambda: MappingProxyType({}))
    tips: Mapping[Key, str] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class CellSize:
    """Inches."""

    width: float
    height: float


def cell_size(grids: Sequence[Grid]) -> CellSize:
    """Return a size at which all grids, side by side, are as large as they are legible."""
    rows = max(len(grid.rows) for grid in grids)
    columns = sum(len(grid.columns) for grid in grids)
    height = min(max(7.0 / rows, _APART), max(0.3, min(1.1 / rows, 0.5)), 24.0 / rows)
    return CellSize(min(max(4.4 / columns, 0.2), 0.55, 24.0 / columns), height)


def label_width(grid: Grid) -> float:
    """Return the inches that the labels of the rows take, with the name of what they count."""
    longest = max(len(label) for label in grid.rows)
    return longest * _LABEL + 0.1 + (0.22 if grid.stack else 0.0)


def label_height(grids: Sequence[Grid]) -> float:
    """Return the inches that the upright labels of the columns take."""
    return max(len(label) for grid in grids for label in grid.columns) * _LABEL + 0.15


def grids_width(grids: Sequence[Grid], size: CellSize) -> float:
    """Return the inches that grids take side by side."""
    each = (label_width(grid) + len(grid.columns) * size.width for grid in grids)
    return sum(each) + _GAP * (len(grids) - 1)


@dataclass(frozen=True, slots=True)
class Scale:
    """Colours of numbers.

    Attributes:
        colours: a matplotlib colour map.
        norm: numbers to 0..1.
        label: of the colour bar.
        extend: which ends of the scale numbers may exceed.
        pale: whether a colour comes near the blank's white, which then is hatched.
    """

    colours: Any
    norm: Any
    label: str
    extend: str = "neither"
    pale: bool = False

    def of(self, value: float) -> Any:
        """Return the colour of a number."""
        return self.colours(self.norm(value))


def sequential(values: Sequence[float], label: str) -> Scale:
    """Return a linear scale from 0 to the largest value."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    largest = max(values, default=0.0)
    return Scale(colormaps["viridis"], Normalize(0, largest or 1.0), label)


def logarithmic(values: Sequence[float], label: str, span: float = 1e4) -> Scale:
    """Return a logarithmic scale over the positive values, at most ``span`` wide."""
    from matplotlib import colormaps
    from matplotlib.colors import LogNorm

    positive = [value for value in values if value > 0] or [1.0]
    top, bottom = max(positive), max(min(positive), max(positive) / span)
    if top / bottom < 1.5:
        top, bottom = top * 1.25, bottom / 1.25
    extend = "min" if min(positive) < bottom else "neither"
    return Scale(colormaps["viridis"], LogNorm(bottom, top, clip=True), label, extend)


def diverging(values: Sequence[float], label: str) -> Scale:
    """Return a scale around 0, whose place is pale, as far as the values reach to either side."""
    from matplotlib import colormaps
    from matplotlib.colors import Normalize

    reach = max((abs(value) for value in values), default=0.0) or 1.0
    return Scale(colormaps["PuOr_r"], Normalize(-reach, reach), label, pale=True)


def draw_grids(
    figure: Figure,
    corner: tuple[float, float],
    grids: Sequence[Grid],
    cells: Sequence[Cells],
    scale: Scale,
    size: CellSize,
    title: str,
    name: str,
) -> dict[str, str]:
    """Draw grids side by side, their tops in line, and a colour bar; returns the tips by id.

    Args:
        figure: to draw on.
        corner: left and top, in inches from the lower left of the figure.
        grids: one for each network.
        cells: what to show in each.
        scale: its colours.
        size: of a cell.
        title: above them.
        name: begins the ids of the cells.
    """
    left, top = corner
    tips: dict[str, str] = {}
    for position, (grid, shown) in enumerate(zip(grids, cells, strict=True)):
        left += label_width(grid)
        width, height = len(grid.columns) * size.width, len(grid.rows) * size.height
        axes = axes_at(figure, left, top - height, width, height)
        if position == 0:
            axes.annotate(
                legible(title),
                (0, 1),
                xytext=(0, 22 if any(g.network for g in grids) else 8),
                xycoords="axes fraction",
                textcoords="offset points",
                fontsize=10,
                fontweight="bold",
            )
        tips |= _draw_grid(axes, grid, shown, scale, size, f"{name}-{position}")
        left += width + _GAP
    _draw_bar(figure, scale, left - _GAP + 0.15, top, max(len(g.rows) for g in grids) * size.height)
    return tips


def axes_at(figure: Figure, left: float, bottom: float, width: float, height: float) -> Any:
    """Return axes at a place given in inches."""
    whole_width, whole_height = figure.get_size_inches()
    place = (left / whole_width, bottom / whole_height, width / whole_width, height / whole_height)
    return figure.add_axes(place)


def _draw_grid(
    axes: Any, grid: Grid, shown: Cells, scale: Scale, size: CellSize, name: str
) -> dict[str, str]:
    from matplotlib.patches import Rectangle

    edge = 0.5 if size.height > 0.08 else 0.0
    tips: dict[str, str] = {}
    for row, column in grid.cells:
        value, key = shown.values.get((row, column)), f"cell-{name}-{row}-{column}"
        colour = _MARKED if value is None else scale.of(value)
        patch = Rectangle((column, row), 1, 1, facecolor=colour, edgecolor="white", linewidth=edge)
        patch.set_gid(key)
        axes.add_patch(patch)
        tips[key] = shown.tips.get((row, column), "")
    for (row, column), sign in shown.marks.items():
        value = shown.values.get((row, column))
        ink = "#555555" if value is None else _ink_on(scale.of(value))
        axes.text(column + 0.5, row + 0.5, sign, ha="center", va="center", color=ink)
    axes.set(xlim=(0, len(grid.columns)), ylim=(len(grid.rows), 0), ylabel=legible(grid.stack))
    axes.patch.set(facecolor="white", edgecolor="#d8d8d8", hatch="////" if scale.pale else None)
    _tick(axes.xaxis, grid.columns, size.width)
    _tick(axes.yaxis, grid.rows, size.height)
    axes.tick_params(axis="x", rotation=90)
    axes.tick_params(length=0, pad=2, labelsize=7.5)
    axes.tick_params(axis="y", labelsize=min(7.5, max(size.height, _APART) * 58))
    axes.spines[:].set_visible(True)
    axes.spines[:].set_color("#cccccc")
    if grid.network:
        axes.set_title(legible(grid.network), fontsize=8.5, fontweight="normal", pad=5)
    return tips


def _ink_on(colour: Sequence[float]) -> str:
    """Return black or white, whichever is legible on a colour (red, green, blue, alpha)."""
    red, green, blue = colour[:3]
    return "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 0.5 else "white"


def _tick(axis: Any, labels: Sequence[str], step: float) -> None:
    """Label every cell, or every second, fifth, tenth ... where they would touch."""
    need = math.ceil(_APART / step - 1e-6)
    every = next(n for n in (1, 2, 5, 10, 20, 50, 100, 10**9) if n >= need)
    shown = range(0, len(labels), every)
    axis.set_ticks([n + 0.5 for n in shown], [legible(labels[n]) for n in shown])


_STEPS: Sequence[tuple[float, tuple[int, ...]]] = (
    (5, (1, 2, 3, 4, 5, 6, 7, 8, 9)),
    (30, (1, 2, 3, 5)),
    (300, (1, 2, 5)),
    (math.inf, (1,)),
)
"""What a logarithmic axis is labelled at within a decade, by how far it reaches."""


def label_plainly(axis: Any) -> None:
    """Write the numbers of a logarithmic axis out: 0.2, 0.5, 1; leaves other axes alone."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if axis.get_scale() != "log":
        return
    low, high = axis.get_view_interval()
    steps = next(steps for span, steps in _STEPS if high / low < span)
    axis.set_major_locator(LogLocator(subs=steps))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _draw_bar(figure: Figure, scale: Scale, left: float, top: float, height: float) -> None:
    from matplotlib.cm import ScalarMappable

    long = min(max(height, 1.6), 3.2)
    axes = axes_at(figure, left, top - long, 0.14, long)
    bar = figure.colorbar(ScalarMappable(scale.norm, scale.colours), cax=axes, extend=scale.extend)
    bar.outline.set_visible(False)
    label_plainly(bar.ax.yaxis)
    bar.set_label(scale.label, fontsize=8)
    bar.ax.tick_params(labelsize=7.5, length=2)
