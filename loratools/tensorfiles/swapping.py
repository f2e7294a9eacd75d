"""Renames that keep one of two contents in place at every moment, and syncing to disk."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path

# linux/fs.h and linux/fcntl.h
_RENAME_NOREPLACE = 1
_RENAME_EXCHANGE = 2
_AT_FDCWD = -100

# Kernels and filesystems (some network ones) without these renames answer so.
_UNABLE = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP})


def exchange(first: Path, second: Path) -> bool:
    """Swap two existing paths in one step; return False where the system cannot.

    Raises:
        OSError: the system can, and refuses.
    """
    return _renameat2(first, second, _RENAME_EXCHANGE)


def rename_to_absent(source: Path, target: Path) -> None:
    """Rename ``source`` to ``target``, which must not exist.

    Raises:
        FileExistsError: something is there. Systems without such a rename look first, and may
            miss what appears in the same instant.
        OSError: the system refuses.
    """
    if _renameat2(source, target, _RENAME_NOREPLACE):
        return
    if os.path.lexists(target):
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
    source.rename(target)


def swap(source: Path, target: Path, aside: Path) -> None:
    """Exchange ``source`` and ``target``, through ``aside`` where one step is not enough.

    Raises:
        OSError: the system refuses; ``target`` is as it was.
    """
    if exchange(source, target):
        return
    target.rename(aside)
    try:
        source.rename(target)
    except BaseException:
        aside.rename(target)
        raise
    aside.rename(source)


def remove(path: Path) -> None:
    """Delete a file, a link or a whole folder; what is absent stays absent.

    Raises:
        OSError: the system refuses.
    """
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Bring a file, or a folder with all that is in it, to the disk.

    Raises:
        OSError: the disk is full or failing; some filesystems say so only here.
    """
    if not path.is_dir():
        _sync_file(path)
        return
    for folder, _, names in os.walk(path):
        for name in names:
            _sync_file(Path(folder, name))
        sync_folder(Path(folder))


def sync_folder(path: Path) -> None:
    """Bring the names in a folder to the disk; Windows has no call for that."""
    if os.name != "nt":
        _sync(path, os.O_RDONLY)


def _sync_file(path: Path) -> None:
    if not path.is_symlink():
        # Windows syncs only what is open for writing; elsewhere a read-only file may be ours.
        _sync(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)


def _sync(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _renameat2(source: Path, target: Path, flags: int) -> bool:
    call = _libc_renameat2()
    if call is None:
        return False
    if call(_AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), flags) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(target))


@functools.cache
def _libc_renameat2() -> Callable[..., int] | None:
    if os.name == "nt":
        return None
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if call is not None:
        call.argtypes = [
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_uint,
        ]
    return call
