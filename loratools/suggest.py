"""Words for messages: nearest names, counted things."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches

_SHOWN = 40
"""Names of a hint; what has more has a command or a page that lists them."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` known names that resemble ``name`` in any case, best first."""
    names = {one.casefold(): one for one in reversed(list(known))}
    word = name.casefold()
    order = list(reversed(names))
    close = get_close_matches(word, order, n=count, cutoff=0.6)
    # Of equally near names the first known comes first.
    close.sort(key=lambda one: (-SequenceMatcher(None, one, word).ratio(), order.index(one)))
    return [names[one] for one in close]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint: the nearest names if there are any, else all of them."""
    names = list(known)
    close = nearest(name, names)
    if close:
        return f"did you mean {' or '.join(close)}?"
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"known: {', '.join(names[:_SHOWN])}{more}"


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number and its noun: ``1 module``, ``2 modules`` (``many``, if it is irregular)."""
    return f"{count} {one if count == 1 else many or one + 's'}"
