"""Adapters that operations hand to each other in memory, under names that stand for paths.

While a recipe runs, ``$NAME`` is such a name; while one is planned, so are the paths that its steps
would write. What is held is what a file would have held, read and written by the same formats, so
that nothing depends on whether there was a file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loratools.tensorfiles.destination import settled

if TYPE_CHECKING:
    from loratools.formats.format import Bundle

MARK = "$"
"""Names of steps begin with it. A file of such a name is written ``./$NAME``."""

_HELD: dict[str, Bundle | None] = {}

PathLike = str | os.PathLike[str]


@contextmanager
def holding(names: Iterable[PathLike]) -> Iterator[None]:
    """Let each name or path stand for a value in memory until the block is left."""
    added = dict.fromkeys(map(_key, names))
    _HELD.update(added)
    try:
        yield
    finally:
        for name in added:
            _HELD.pop(name, None)


def _key(path: PathLike) -> str:
    text = str(path)
    return text if text.startswith(MARK) else str(settled(Path(text)))


def is_held(path: PathLike) -> bool:
    """Return whether a path is a name for a value in memory."""
    return bool(_HELD) and _key(path) in _HELD


def hold(path: PathLike, bundle: Bundle) -> None:
    """Keep what would be the file's contents."""
    _HELD[_key(path)] = replace(bundle, source=str(path))


def let_go(path: PathLike) -> None:
    """Forget a value; its name still stands for one."""
    _HELD[_key(path)] = None


def held_bundle(path: PathLike) -> Bundle | None:
    """Return a value, or None where nothing is held."""
    return _HELD.get(_key(path)) if _HELD else None


def held_bytes(path: PathLike) -> int:
    """Return the bytes of a value's tensors; 0 if there is none."""
    bundle = held_bundle(path)
    return sum(tensor.nbytes for tensor in bundle.tensors.values()) if bundle else 0
