"""Nearest names for error messages."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def nearest(name: str, known: Iterable[str], count: int = 3) -> list[str]:
    """Return up to ``count`` known names that resemble ``name``, best first."""
    return get_close_matches(name, list(known), n=count, cutoff=0.6)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a hint: the nearest names if there are any, else all of them."""
    names = list(known)
    close = nearest(name, names)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return "known: " + ", ".join(names)
