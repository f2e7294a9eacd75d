"""Words for messages: nearest names, counted things."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher, get_close_matches


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` known names that resemble ``name``, best first."""
    names = list(known)
    close = get_close_matches(name, names, n=count, cutoff=0.6)
    # Of equally near names the first known comes first.
    return sorted(
        close, key=lambda one: (-SequenceMatcher(None, one, name).ratio(), names.index(one))
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint: the nearest names if there are any, else all of them."""
    names = list(known)
    close = nearest(name, names)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "known: " + ", ".join(names)


def counted(count: int, one: str, many: str | None = None) -> str:
    """Return a number and its noun: ``1 module``, ``2 modules`` (``many``, if it is irregular)."""
    return f"{count} {one if count == 1 else many or one + 's'}"
