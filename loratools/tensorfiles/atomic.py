"""Outputs that appear complete or not at all.

An output is written beside its destination under a hidden name, ``.NAME.HOST-PID-TOKEN.partial``,
synced, and renamed. A run that is killed leaves the destination as it was, and its partial file
for the next run to remove.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from types import TracebackType

from loratools.errors import OutputError
from loratools.tensorfiles.destination import check_destination, settled
from loratools.tensorfiles.leftovers import clear_leftovers, run_prefix
from loratools.tensorfiles.swapping import (
    remove,
    rename_to_absent,
    swap,
    sync_folder,
    sync_tree,
)

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_SPACE_HINT = "Free some space, or choose an output on another disk."
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def staged_output(
    target: Path, *, folder: bool, overwrite: bool, inputs: Sequence[Path] = ()
) -> StagedOutput:
    """Return a context manager that yields a temporary path beside ``target``.

    Entering makes the missing parents and, if ``folder``, the temporary folder; otherwise the
    caller creates a file at the yielded path. A clean exit syncs everything and renames it to
    ``target``; any exception removes what was made, parents included.

    Args:
        target: the destination; a relative path means the working directory of this moment.
        folder: whether the output is a folder.
        overwrite: replace what is there. A folder is replaced as a whole.
        inputs: paths that must survive. Name the files of a model too where they may be links.

    Raises:
        OutputError: on entering, the destination is refused (see ``check_destination``); on
            leaving, it cannot be completed, or the disk is full.
    """
    return StagedOutput(target, folder, overwrite, inputs)


class StagedOutput(AbstractContextManager[Path]):
    """What ``staged_output`` returns.

    Attributes:
        target: the destination, absolute.
        removed: partial outputs of killed runs that entering has cleared away or put back.
    """

    def __init__(self, target: Path, folder: bool, overwrite: bool, inputs: Sequence[Path]) -> None:
        self.target = settled(target)
        self.removed: tuple[Path, ...] = ()
        self._folder = folder
        self._overwrite = overwrite
        self._inputs = tuple(inputs)
        self._parents: list[Path] = []
        self._stem = run_prefix(self.target) + f"{os.getpid()}-{secrets.token_hex(4)}"

    def __enter__(self) -> Path:
        try:
            self.removed = clear_leftovers(self.target)
            self._check()
            self._make_parents()
            if self._folder:
                self._partial.mkdir()
        except OSError as error:
            self._discard()
            raise _refusal(self.target, error) from error
        except BaseException:
            self._discard()
            raise
        return self._partial

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._commit()
        except OSError as refused:
            raise _refusal(self.target, refused) from refused
        finally:
            self._discard()
        if isinstance(error, OSError) and error.errno in _FULL:
            raise _refusal(self.target, error) from error

    @property
    def _partial(self) -> Path:
        return self.target.parent / f"{self._stem}.partial"

    @property
    def _replaced(self) -> Path:
        return self.target.parent / f"{self._stem}.replaced"

    def _check(self) -> None:
        check_destination(
            self.target, folder=self._folder, overwrite=self._overwrite, inputs=self._inputs
        )

    def _make_parents(self) -> None:
        missing = [path for path in self.target.parents if not path.exists()]
        for path in reversed(missing):
            path.mkdir(exist_ok=True)
            self._parents.append(path)

    def _commit(self) -> None:
        if not self._partial.exists():
            raise OutputError(f"{self.target}: nothing was written")
        sync_tree(self._partial)
        # The destination may have appeared, or changed its kind, while the work went on.
        self._check()
        self._move_into_place()
        for path in (self.target, *self._parents):
            sync_folder(path.parent)

    def _move_into_place(self) -> None:
        """Rename to the target; an old folder is then where the new one was."""
        if not os.path.lexists(self.target):
            rename_to_absent(self._partial, self.target)
        elif self._folder:
            swap(self._partial, self.target, self._replaced)
        else:
            self._partial.replace(self.target)

    def _discard(self) -> None:
        # What cannot be removed now is for the next run: the target is settled either way.
        with suppress(OSError):
            remove(self._partial)
        for path in reversed(self._parents):
            # The output lies there, or somebody else uses the folder by now.
            with suppress(OSError):
                path.rmdir()


def require_space(parent: Path, nbytes: int) -> None:
    """See that ``nbytes`` more fit where ``parent`` is or will be.

    Raises:
        OutputError: the disk has less space left.
    """
    place = settled(parent)
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if nbytes > free:
        raise OutputError(
            f"{parent}: {_size(nbytes)} are needed and {_size(free)} are free", _SPACE_HINT
        )


def _refusal(target: Path, error: OSError) -> OutputError:
    hint = _SPACE_HINT if error.errno in _FULL else "Choose another output path."
    return OutputError(f"{target}: cannot be written: {error.strerror or error}", hint)


def _size(nbytes: int) -> str:
    amount, unit = float(nbytes), 0
    while amount >= 1000 and unit < len(_UNITS) - 1:
        amount, unit = amount / 1000, unit + 1
    return f"{amount:.1f} {_UNITS[unit]}" if unit else f"{nbytes} B"
