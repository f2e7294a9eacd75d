"""The hidden folder that files are fetched to before they go where they were asked for."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from loratools.errors import OutputError

_LOCK = ".lock"
_PATIENCE = 0.5
"""Seconds; a pull takes longer than that."""


@contextmanager
def alone_in(folder: Path, target: Path) -> Iterator[None]:
    """Keep other processes out of ``folder``; remove it if the block ends well.

    Raises:
        OutputError: another process is at work for ``target``.
    """
    from huggingface_hub.utils import WeakFileLock

    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            stack.enter_context(WeakFileLock(folder / _LOCK, timeout=_PATIENCE))
        except TimeoutError as error:
            raise OutputError(
                f"{target}: another pull to it is under way", "wait for it, or choose another OUT"
            ) from error
        yield
        shutil.rmtree(folder, ignore_errors=True)
    if os.name == "nt":
        # It removes no lock that is held.
        with suppress(OSError):
            (folder / _LOCK).unlink(missing_ok=True)
            folder.rmdir()
