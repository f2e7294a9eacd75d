"""Opening what was given, and JSON that means one thing only."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from reprlib import Repr
from typing import Any, BinaryIO, NoReturn

from loratools.errors import CorruptFileError, InputError, MissingFileError

INCOMPLETE_HINT = "The download looks incomplete: fetch the file again."
FETCH_AGAIN = "fetch or save the file again"

# A hostile name may be a hundred megabytes long; a message stays readable.
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 200

_NOT_A_FILE = (FileNotFoundError, IsADirectoryError, NotADirectoryError)


def quoted(value: object) -> str:
    """Return ``repr(value)``, shortened where it is long."""
    return _SHORT.repr(value)


def open_input(path: Path) -> BinaryIO:
    """Open a file for reading bytes.

    Raises:
        MissingFileError: there is no file of that name.
        InputError: the system refuses to open it.
    """
    try:
        return path.open("rb")
    except _NOT_A_FILE as error:
        raise MissingFileError(f"{path}: {_reason(error)}") from error
    except OSError as error:
        raise InputError(f"{path}: {_reason(error)}", system_hint(error)) from error


_SYSTEM_HINTS = {
    errno.EACCES: "you lack the permission: see who owns it, and its folder (ls -ld)",
    errno.EPERM: "the system allows it to its owner or administrator alone",
    errno.EROFS: "the file system is read-only: choose another place",
    errno.ENOSPC: "the disk is full: free some space, or choose another disk",
    errno.ENAMETOOLONG: "the name is too long for the system: was a text given for a path?",
    errno.ELOOP: "links lead in a circle: name the file itself",
    errno.EIO: "the disk or the network drive fails: copy the file and try again",
    errno.EMFILE: "too many files are open: raise the limit (ulimit -n)",
    errno.ENOMEM: "the memory is not enough: close other programs",
}


def system_hint(error: OSError) -> str | None:
    """Return what to do about what the operating system refuses, where that is known."""
    return _SYSTEM_HINTS.get(error.errno or 0)


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def read_json_object(file: Path) -> dict[str, Any]:
    """Return a small JSON file's object; raises CorruptFileError if it holds none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{file}: not JSON ({error})", FETCH_AGAIN) from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{file}: not a JSON object", FETCH_AGAIN)
    return config


def parse_object(
    raw: bytes, what: str, parse_int: Callable[[str], int | float] = int
) -> dict[str, Any]:
    """Return the JSON object in ``raw``; no repeated keys, no NaN, no lone surrogates.

    Args:
        raw: UTF-8 text.
        what: what the text is, as an error begins: ``model.safetensors: header``.
        parse_int: what to make of the digits of a whole number.

    Raises:
        CorruptFileError: ``raw`` is anything else.
    """
    try:
        value = json.loads(
            raw.decode("utf-8"),
            object_pairs_hook=_distinct,
            parse_int=parse_int,
            parse_constant=_refuse_constant,
        )
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise CorruptFileError(f"{what} is not UTF-8 text: {error.reason}") from error
    except ValueError as error:
        raise CorruptFileError(f"{what} is not usable JSON: {error}") from error
    except RecursionError as error:
        raise CorruptFileError(f"{what} is not usable JSON: nested too deeply") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{what} is not a JSON object")
    return value


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in pairs:
        if key in members:
            raise ValueError(f"{quoted(key)} appears twice")
        # An escaped lone surrogate is a Python string that no file or terminal can hold.
        key.encode()
        if isinstance(value, str):
            value.encode()
        members[key] = value
    return members


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")
