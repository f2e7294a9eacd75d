"""Byte ranges from file to file, inside the kernel where the system can."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from loratools.errors import CorruptFileError, InputError

_BUFFER_BYTES = 8 << 20
# Python sees Ctrl-C between two calls only, and a call may take its time on a slow disk.
_CALL_BYTES = 256 << 20

# What the kernel says when this pair of files has to be copied by hand.
_BY_HAND = frozenset(
    {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.ENOTSUP}
)

# Windows has none of these three, macOS lacks the first.
_copy_file_range: Callable[..., int] | None = getattr(os, "copy_file_range", None)
_preadv: Callable[[int, list[memoryview], int], int] | None = getattr(os, "preadv", None)
_pwrite: Callable[[int, memoryview, int], int] | None = getattr(os, "pwrite", None)

# Without reads and writes at an offset, threads share one file position.
_POSITION = Lock()


def open_source(path: Path) -> int:
    """Return a descriptor to read from; raises InputError naming the file."""
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{path}: {reason}", hint="was it moved or changed meanwhile?") from error


def copy_range(
    source_fd: int, source_offset: int, target_fd: int, target_offset: int, count: int
) -> None:
    """Copy ``count`` bytes between two open files; neither file position matters.

    On filesystems with reflinks no data moves at all. Both descriptors are binary; the target
    grows as needed. Several threads may copy between the same files at once.

    Raises:
        CorruptFileError: the source ends before the range does; what there was has been copied.
        OSError: the system refuses, e.g. ``ENOSPC``, which ``staged_output`` translates.
    """
    done = _copy_in_kernel(source_fd, source_offset, target_fd, target_offset, count)
    done += _copy_by_hand(
        source_fd, source_offset + done, target_fd, target_offset + done, count - done
    )
    if done < count:
        raise CorruptFileError(
            f"the source ends {count - done} bytes before the range from byte {source_offset} "
            f"to {source_offset + count}",
            hint="The file was cut off or changed while it was read.",
        )


def _copy_in_kernel(source: int, start: int, target: int, to: int, count: int) -> int:
    """Return how many bytes went over: fewer than ``count`` when the rest is not for the kernel."""
    if _copy_file_range is None:
        return 0
    done = 0
    while done < count:
        try:
            size = min(count - done, _CALL_BYTES)
            moved = _copy_file_range(source, target, size, start + done, to + done)
        except OSError as error:
            if error.errno not in _BY_HAND:
                raise
            return done
        # Nothing moved means the end of the file, or one of the filesystems that never report
        # a size: reading by hand tells which.
        if not moved:
            break
        done += moved
    return done


def read_at(source_fd: int, buffer: memoryview, offset: int) -> int:
    """Fill ``buffer`` from ``offset`` of an open file; the file position does not matter.

    Returns:
        Bytes read: fewer than the buffer holds only at the end of the file.
    """
    done = 0
    while done < len(buffer):
        size = _read_some(source_fd, buffer[done:], offset + done)
        if not size:
            break
        done += size
    return done


def write_at(target_fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` at ``offset`` of an open file; the file position does not matter."""
    while data:
        written = _write_some(target_fd, data, offset)
        data, offset = data[written:], offset + written


def start_writeback(fd: int, offset: int, count: int) -> None:
    """Ask the kernel to begin writing a range to the disk, without waiting for it.

    A later ``fsync`` then finds little left to do. Where the system has no such call, nothing
    happens.
    """
    if _sync_file_range is not None:
        _sync_file_range(fd, offset, count, _SYNC_FILE_RANGE_WRITE)


def _find_sync_file_range() -> Callable[[int, int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    import ctypes

    try:
        function = ctypes.CDLL(None).sync_file_range
    except (OSError, AttributeError):
        return None
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    found: Callable[[int, int, int, int], int] = function
    return found


_SYNC_FILE_RANGE_WRITE = 2
_sync_file_range = _find_sync_file_range()


def _copy_by_hand(source: int, start: int, target: int, to: int, count: int) -> int:
    buffer = memoryview(bytearray(min(count, _BUFFER_BYTES)))
    done = 0
    while done < count:
        size = read_at(source, buffer[: count - done], start + done)
        if not size:
            break
        write_at(target, buffer[:size], to + done)
        done += size
    return done


def _read_some(source: int, buffer: memoryview, offset: int) -> int:
    if _preadv is not None:
        return _preadv(source, [buffer], offset)
    with _POSITION:
        os.lseek(source, offset, os.SEEK_SET)
        data = os.read(source, len(buffer))
    buffer[: len(data)] = data
    return len(data)


def _write_some(target: int, data: memoryview, offset: int) -> int:
    if _pwrite is not None:
        return _pwrite(target, data, offset)
    with _POSITION:
        os.lseek(target, offset, os.SEEK_SET)
        return os.write(target, data)
