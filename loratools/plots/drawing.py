"""What a figure is until it is written, and the state of matplotlib while it is drawn."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from loratools.errors import UnsupportedError

MARGIN = 0.35
"""Around a figure, in inches."""

Figure = Any
"""matplotlib.figure.Figure: the extra may not be installed."""

_STYLE = {
    "axes.edgecolor": "#888888",
    "axes.grid": False,
    "axes.labelcolor": "#222222",
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "figure.dpi": 120,
    "figure.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 8,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "savefig.dpi": 120,
    "svg.fonttype": "none",
    "svg.hashsalt": "loratools",
    # A file name may hold a dollar sign.
    "text.parse_math": False,
    "xtick.color": "#444444",
    "xtick.labelsize": 8,
    "ytick.color": "#444444",
    "ytick.labelsize": 8,
}


@dataclass(frozen=True, slots=True, eq=False)
class Drawing:
    """A finished figure.

    Attributes:
        title: one line.
        figure: a matplotlib figure.
        tips: id of a drawn element → what to say when it is pointed at.
        columns: headings of the table that goes with the figure.
        rows: its rows: text, numbers or None.
    """

    title: str
    figure: Figure
    tips: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    columns: Sequence[str] = ()
    rows: Sequence[Sequence[str | float | int | None]] = ()


_ILLEGIBLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
"""What XML has no place for: control characters, halves of characters."""


def legible(text: str) -> str:
    """Return a name from a file as it may stand in a figure."""
    return _ILLEGIBLE.sub("\ufffd", text)


def require_matplotlib() -> None:
    """Raise UnsupportedError unless matplotlib can be imported."""
    try:
        import matplotlib as _  # noqa: F401
    except ImportError as error:
        raise UnsupportedError(
            "plots need matplotlib, which is not installed", hint="pip install 'loratools[plot]'"
        ) from error


@contextmanager
def house_style() -> Iterator[None]:
    """Draw in the house style, whatever the user's matplotlibrc says, and restore it after."""
    import matplotlib as mpl

    with mpl.rc_context(), warnings.catch_warnings():
        # A file name in a script that the font lacks; SVG and HTML show it all the same.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        mpl.rcdefaults()
        mpl.rcParams.update(_STYLE)
        yield


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, with no window and no global state."""
    from matplotlib.figure import Figure as MatplotlibFigure

    return MatplotlibFigure(figsize=(width, height))


def draw_head(figure: Figure, title: str, subtitle: str, key: str) -> None:
    """Write the lines at the top of a figure: what it is of, and how to read it."""
    width, height = figure.get_size_inches()
    lines = (
        (0.42, title, {"fontsize": 14, "fontweight": "bold"}),
        (0.66, subtitle, {"fontsize": 9, "color": "#333333"}),
        (0.86, key, {"fontsize": 8, "color": "#666666"}),
    )
    for down, text, style in lines:
        figure.text(MARGIN / width, 1 - down / height, legible(text), **style)
