"""The hidden folder that files are fetched to before they go where they were asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loratools.errors import OutputError

_LOCK = ".lock"
_LIBRARY = ".cache"
"""The Hub's library notes there what it asked; only what it calls incomplete is content."""

_PATIENCE = 0.5
"""Seconds; a pull takes longer than that."""


@contextmanager
def alone_in(folder: Path, target: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``; remove it, unless the block fails with files begun.

    With it go the parents that were made for it, if they are empty.

    Raises:
        OutputError: another process is at work for ``target``.
    """
    from huggingface_hub.utils import WeakFileLock

    made = [place for place in folder.parents if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    locked = False
    try:
        with ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(folder / _LOCK, timeout=_PATIENCE))
            except TimeoutError as error:
                raise OutputError(
                    f"{target}: another pull to it is under way",
                    "wait for it, or choose another OUT",
                ) from error
            locked = True
            stack.callback(_clear, folder, made)
            yield
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        # It removes no lock that is held.
        if locked and os.name == "nt":
            _clear(folder, made)


def _clear(folder: Path, made: Sequence[Path]) -> None:
    """Remove the folder, and the empty ones around it, where no file has been begun."""
    if _has_begun(folder):
        return
    shutil.rmtree(folder, ignore_errors=True)
    with suppress(OSError):
        for place in made:
            place.rmdir()


def _has_begun(folder: Path) -> bool:
    """Return whether there is anything of a file's contents from which to go on."""
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return any(
        (folder / file).stat().st_size
        and file.name != _LOCK
        and (file.parts[0] != _LIBRARY or file.suffix == ".incomplete")
        for file in files
    )
