"""Known names that resemble one that nothing knows, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loratools.keymaps.lookup import flatten, skeleton
from loratools.keymaps.vocabulary import ComponentNames, Vocabulary
from loratools.suggest import nearest

_TOKEN = re.compile(r"\{\w+\}|\d+")


def nearest_paths(words: Vocabulary, path: str) -> list[str]:
    """Return known paths that resemble ``path``, in its spelling and with its block numbers."""
    found: list[str] = []
    for names, body, flat in words.readings(path):
        prefix = path[: len(path) - len(body)]
        known = {skeleton(template): template for template in _templates(names, flat)}
        close = nearest(skeleton(body), known)
        found += [prefix + _numbered(known[name], body) for name in close]
        if found or prefix:
            break
    return list(dict.fromkeys(found))[:3]


def _templates(names: ComponentNames, flat: bool) -> Iterator[str]:
    for dialect in names.dialects:
        for template in names.templates(dialect):
            yield flatten(template) if flat else template


def _numbered(template: str, body: str) -> str:
    """Return the template with the body's numbers in its placeholders, in order."""
    numbers = re.findall(r"\d+", body)
    tokens = _TOKEN.findall(template)
    if len(numbers) != len(tokens):
        return template
    given = iter(numbers)

    def fill(match: re.Match[str]) -> str:
        number = next(given)
        return number if match.group().startswith("{") else match.group()

    return _TOKEN.sub(fill, template)
