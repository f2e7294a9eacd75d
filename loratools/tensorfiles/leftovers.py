"""The hidden siblings of an output that a killed run leaves behind.

``.NAME.HOST-PID-TOKEN.partial`` is an unfinished output, or an old one that has been replaced;
``.replaced`` is an old one set aside for a moment, on a system that cannot swap two paths at once.
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path

from loratools.tensorfiles.swapping import remove


def run_prefix(target: Path) -> str:
    """Return how the hidden siblings of ``target`` begin that runs on this host make."""
    return f".{target.name}.{socket.gethostname()}-"


def clear_leftovers(target: Path) -> tuple[Path, ...]:
    """Remove what killed runs on this host left of ``target``; put back what they set aside.

    Returns:
        The hidden siblings that are gone now.

    Raises:
        OSError: the folder cannot be listed.
    """
    if not target.parent.is_dir():
        return ()
    pattern = re.compile(re.escape(run_prefix(target)) + r"(\d+)-[0-9a-f]{8}\.(partial|replaced)")
    found = [(path, pattern.fullmatch(path.name)) for path in target.parent.iterdir()]
    dead = [(path, match[2]) for path, match in found if match and not _is_alive(int(match[1]))]
    return tuple(path for path, kind in dead if _clear(path, kind, target))


def _clear(path: Path, kind: str, target: Path) -> bool:
    try:
        # Killed between the two renames of `swap`: this is the only copy.
        if kind == "replaced" and not os.path.lexists(target):
            path.rename(target)
        else:
            remove(path)
    except OSError:
        # Somebody else's rubbish is no reason to refuse the job.
        return False
    return True


def _is_alive(pid: int) -> bool:
    # On Windows os.kill ends the process that it is asked about.
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
