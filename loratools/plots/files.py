"""Writing a figure: the suffix says how."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path

from loratools.errors import OptionError
from loratools.plots.drawing import Drawing, house_style, legible, require_matplotlib
from loratools.plots.page import page_of
from loratools.plots.svg import svg_of
from loratools.tensorfiles.atomic import staged_output
from loratools.tensorfiles.destination import check_destination


def _png(drawing: Drawing) -> bytes:
    written = BytesIO()
    drawing.figure.savefig(written, format="png", metadata={"Title": legible(drawing.title)})
    return written.getvalue()


def _svg(drawing: Drawing) -> bytes:
    return svg_of(drawing).encode()


def _html(drawing: Drawing) -> bytes:
    return page_of(drawing).encode()


_WRITERS: Mapping[str, Callable[[Drawing], bytes]] = {".png": _png, ".svg": _svg, ".html": _html}


def check_plot(target: Path, *, overwrite: bool, inputs: Sequence[Path] = ()) -> None:
    """Refuse a plot that could not be written, before anything is computed for it.

    Raises:
        OptionError: a suffix other than .png, .svg and .html.
        UnsupportedError: matplotlib is not installed.
        OutputError: the destination exists, or is an input.
    """
    if target.suffix.lower() not in _WRITERS:
        known = f"{', '.join(list(_WRITERS)[:-1])} or {list(_WRITERS)[-1]}"
        raise OptionError(
            f"{target}: a plot is a file that ends in {known}", hint=f"end its name in {known}"
        )
    require_matplotlib()
    check_destination(target, folder=False, overwrite=overwrite, inputs=inputs)


def write_plot(
    build: Callable[[], Drawing], target: Path, *, overwrite: bool, inputs: Sequence[Path] = ()
) -> None:
    """Draw and write one file, atomically; see ``check_plot`` for what it raises."""
    check_plot(target, overwrite=overwrite, inputs=inputs)
    with house_style():
        written = _WRITERS[target.suffix.lower()](build())
    with staged_output(target, folder=False, overwrite=overwrite, inputs=inputs) as place:
        place.write_bytes(written)
