"""What a file is that is not what its name says, told by its first bytes."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import CorruptFileError

FIRST_BYTES = 512
"""How much of a file is looked at."""

TORCH_SAVED = "a torch.save file"
_AGAIN = "name the weights file, or fetch it again if this should be it"
_SHOWN = 60
_SHORTEST = 8
_LEAST_TEXT = 0.97
"""Share of printable characters in what is called text."""


@dataclass(frozen=True, slots=True)
class Impostor:
    """What a file is, and what to do about it."""

    what: str
    hint: str


_LFS = Impostor(
    "a Git LFS pointer, which stands for the file",
    "run `git lfs pull` where you cloned it, or fetch it with `loratools pull`",
)
_PAGE = Impostor(
    "a web page",
    "the address was a page's, or asked for a login: download the file itself",
)
_TORCH = Impostor(TORCH_SAVED, "if you trust its source, name it .bin or .pt")
_ANSWER = "name the weights file; if this is what a server answered, download it again"
_ARCHIVE = "unpack it and name the weights file inside; what torch.save wrote is named .bin or .pt"

_MAGIC: tuple[tuple[bytes, Impostor], ...] = (
    (b"version https://git-lfs", _LFS),
    (b"version ", _LFS),
    (b"PK\x03\x04", Impostor("a zip archive", _ARCHIVE)),
    (b"\x80\x02", _TORCH),
    (b"\x80\x03", _TORCH),
    (b"\x80\x04", _TORCH),
    (b"\x80\x05", _TORCH),
    (b"GGUF", Impostor("a GGUF file", "name it .gguf")),
    (b"\x1f\x8b", Impostor("a gzip archive", _ARCHIVE)),
    (b"7z\xbc\xaf\x27\x1c", Impostor("a 7-Zip archive", _ARCHIVE)),
    (b"Rar!", Impostor("a RAR archive", _ARCHIVE)),
    (b"\xfd7zXZ", Impostor("an xz archive", _ARCHIVE)),
    (b"\x89HDF", Impostor("an HDF5 file", "give the model's safetensors version")),
    (b"\x89PNG", Impostor("a picture (PNG)", "name the weights file")),
    (b"\xff\xd8\xff", Impostor("a picture (JPEG)", "name the weights file")),
    (b"%PDF", Impostor("a PDF document", "name the weights file")),
)
_SAFETENSORS = re.compile(rb'.{6}\0\0\{\s*"', re.DOTALL)
"""Eight bytes of length, of which the upper are zero, and the beginning of an object."""


def recognise(head: bytes) -> Impostor | None:
    """Return what a file is whose first bytes are ``head``, or ``None`` for nothing known."""
    return next((one for test in _TESTS if (one := test(head[:FIRST_BYTES]))), None)


def not_what_it_says(path: Path, kind: str, head: bytes, otherwise: str) -> CorruptFileError:
    """Return the error for a file that is not of the kind that its name says.

    Args:
        path: the file.
        kind: what it should be, with its article.
        head: its first bytes.
        otherwise: what speaks against it, for bytes that are nothing known.
    """
    found = recognise(head)
    if found is None or found.what == kind:
        return CorruptFileError(f"{path}: not {kind} ({otherwise})", _AGAIN)
    return CorruptFileError(f"{path}: not {kind} but {found.what}", found.hint)


def _by_magic(head: bytes) -> Impostor | None:
    if head.startswith(b"PK\x03\x04") and b"data.pkl" in head:
        return _TORCH
    return next((one for magic, one in _MAGIC if head.startswith(magic)), None)


def _by_length(head: bytes) -> Impostor | None:
    if not _SAFETENSORS.match(head):
        return None
    return Impostor("a safetensors file", "name it .safetensors")


def _page(head: bytes) -> Impostor | None:
    return _PAGE if head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"<") else None


def _text(head: bytes) -> Impostor | None:
    text = head.decode("utf-8", "replace").strip()
    plain = sum(_is_plain(letter) for letter in text)
    if len(text) < _SHORTEST or plain < _LEAST_TEXT * len(text):
        return None
    line = " ".join(text.split())
    words = line[:_SHOWN] + (" ..." if len(line) > _SHOWN else "")
    kind = "a JSON text" if text.startswith(("{", "[")) else "a text"
    return Impostor(f"{kind} ({words})", _ANSWER)


def _is_plain(letter: str) -> bool:
    return letter in "\r\n\t" or (letter.isprintable() and letter != "\N{REPLACEMENT CHARACTER}")


_TESTS: tuple[Callable[[bytes], Impostor | None], ...] = (_by_magic, _by_length, _page, _text)
