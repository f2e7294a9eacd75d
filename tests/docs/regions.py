"""Regions of the pages that are made from the code.

A region lies between two comments, which GitHub does not show::

    <!-- options: merge -->
    ...
    <!-- end -->

The first word is the kind, what follows the colon is what the kind's maker is given.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

Maker = Callable[[str], str]

_REGION = re.compile(
    r"^(?P<start><!-- (?P<kind>[a-z]+)(?:: (?P<about>[^\n]+?))? -->\n)"
    r"(?P<body>.*?)(?P<end>^<!-- end -->$)",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class Region:
    """A region as it stands on a page."""

    kind: str
    about: str
    body: str


def regions(text: str) -> Iterator[Region]:
    """Yield the regions of a page in their order."""
    for found in _REGION.finditer(text):
        yield Region(found["kind"], found["about"] or "", found["body"])


def made_again(text: str, makers: Mapping[str, Maker]) -> str:
    """Return the page with every region as the code is now; raises KeyError for no such kind."""

    def fresh(found: re.Match[str]) -> str:
        body = makers[found["kind"]](found["about"] or "")
        return f"{found['start']}\n{body.strip()}\n\n{found['end']}"

    return _REGION.sub(fresh, text)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table; cells are Markdown already."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


_CODE = re.compile(
    r"`[^`]+`"  # as it is
    r"|(?<![\w-])--?[a-z][a-z-]*"  # an option
    r"|(?<![\w.])\.(?:gguf|safetensors|png|svg|html)\b"
    r"|\b[A-Za-z]\w*(?:[._]\w+)+"  # a name with dots or underscores, a file
)


def prose(text: str) -> str:
    """Return a sentence of a help text or docstring as Markdown: options and names in code."""
    code = _CODE.sub(lambda found: f"`{found[0].strip('`')}`", text)
    return re.sub(r"([|*<])", r"\\\1", code)
