"""Known names that resemble one that nothing knows, for error messages."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from loratools.keymaps.lookup import flatten, skeleton
from loratools.keymaps.vocabulary import ComponentNames, Vocabulary
from loratools.suggest import nearest

_TOKEN = re.compile(r"\{\w+\}|\d+")


def nearest_of_all(vocabularies: Iterable[Vocabulary], path: str) -> list[str]:
    """Return the paths that resemble ``path`` most in any of the vocabularies, best first."""
    found = {near: None for words in vocabularies for near in nearest_paths(words, path)}
    return nearest(path, found)


def nearest_paths(words: Vocabulary, path: str) -> list[str]:
    """Return known paths that resemble ``path``, in its spelling and with its block numbers."""
    found: list[str] = []
    for names, body, flat in words.readings(path):
        prefix = path[: len(path) - len(body)]
        known: dict[str, list[str]] = {}
        for template in _templates(names, flat):
            known.setdefault(skeleton(template), []).append(template)
        close = nearest(skeleton(body), known)
        found += [prefix + _numbered(known[name], body) for name in close]
        if found or prefix:
            break
    return list(dict.fromkeys(found))[:3]


def _templates(names: ComponentNames, flat: bool) -> Iterator[str]:
    for dialect in names.dialects:
        for template in names.templates(dialect):
            yield flatten(template) if flat else template


def _numbered(templates: list[str], body: str) -> str:
    """Return the template nearest in numbers, with the body's in its placeholders, in order."""
    numbers = re.findall(r"\d+", body)
    template = max(templates, key=lambda one: _agreement(_TOKEN.findall(one), numbers))
    tokens = _TOKEN.findall(template)
    if len(numbers) != len(tokens):
        return _TOKEN.sub(lambda match: _as_letter(match.group()), template)
    given = iter(numbers)

    def fill(match: re.Match[str]) -> str:
        number = next(given)
        return number if match.group().startswith("{") else match.group()

    return _TOKEN.sub(fill, template)


def _as_letter(token: str) -> str:
    return "N" if token.startswith("{") else token


def _agreement(tokens: list[str], numbers: list[str]) -> int:
    """Return at how many places the template has the name's number, or takes any."""
    return sum(
        token == number or token.startswith("{")
        for token, number in zip(tokens, numbers, strict=False)
    )
