"""A figure as SVG, with a tooltip for every element that has one."""

from __future__ import annotations

import re
from html import escape
from io import BytesIO

from loratools.plots.drawing import Drawing, legible

_METADATA = re.compile(r"\s*<metadata>.*?</metadata>", re.DOTALL)
_ROOT = re.compile(r"<svg [^>]*>")
_GROUP = re.compile(r'<g id="([^"]+)">')


def svg_of(drawing: Drawing) -> str:
    """Return one ``<svg>`` element: no document type, no metadata, no address outside of it."""
    written = BytesIO()
    silent = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    drawing.figure.savefig(written, format="svg", metadata=silent)
    text = _METADATA.sub("", written.getvalue().decode())
    text = text[text.index("<svg ") :]
    text = _ROOT.sub(lambda match: match[0] + _title(drawing.title), text, count=1)
    return _GROUP.sub(lambda match: _with_tip(match, drawing), text)


def _with_tip(match: re.Match[str], drawing: Drawing) -> str:
    tip = drawing.tips.get(match[1])
    return match[0] if tip is None else match[0] + _title(tip)


def _title(text: str) -> str:
    return f"<title>{escape(legible(text))}</title>"
