"""Whether a step's output is what its inputs and options would make again.

Beside every output lies ``.NAME.recipe.json``: what was read, with which options, and what the
output looked like. A file counts as unchanged if its size, its time of change and its first bytes
(the header of a .safetensors file, else 64 KiB) are; the weights themselves are not read.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools import __version__
from loratools.hub.references import is_reference

_SCHEMA = 1
_HEAD = 1 << 16
_LONGEST_HEADER = 100_000_000
"""Bytes that the safetensors library allows a header."""

_NO_SETTINGS = frozenset({"output", "overwrite", "dry_run", "json", "quiet", "verbose"})
_COMMIT = re.compile(r"hf://[^@]+@[0-9a-f]{40}(/.*)?")
_LEFT = frozenset({".git", ".cache"})


@dataclass(frozen=True, slots=True)
class State:
    """What decides what a step makes.

    Attributes:
        settings: a hash of the command, its options and the version of loratools.
        inputs: path → a hash of what is there, or None where that cannot be known.
    """

    settings: str
    inputs: Mapping[str, str | None]

    @property
    def whole(self) -> str | None:
        """One hash for all of it; None where an input's cannot be known."""
        if None in self.inputs.values():
            return None
        return _hash(json.dumps([self.settings, dict(self.inputs)], sort_keys=True).encode())


def settings_of(verb: str, values: Mapping[str, Any]) -> str:
    """Return a hash of a step's options; where it writes, and what is replaced, do not count."""
    kept = {key: value for key, value in values.items() if key not in _NO_SETTINGS}
    return _hash(json.dumps([__version__, verb, kept], sort_keys=True, default=str).encode())


def remote_print(reference: str, commit: str | None) -> str | None:
    """Return a hash of a reference and the commit that it means; None if that is not known."""
    return None if commit is None else _hash(f"{reference} {commit}".encode())


def fingerprint(path: str) -> str | None:
    """Return a hash of what is at a path; None for what may change unseen (a Hub branch)."""
    if is_reference(path):
        return _hash(path.encode()) if _COMMIT.fullmatch(path) else None
    rows = [json.dumps(row) for row in _rows(Path(path))]
    return _hash("\n".join(rows).encode())


def _rows(path: Path) -> Iterator[tuple[str, int, int, str]]:
    """Yield name, size, time of change (ns) and a hash of the first bytes of every file."""
    if path.is_dir():
        files = sorted(found for found in path.rglob("*") if found.is_file())
        named = [(found.relative_to(path), found) for found in files]
    else:
        named = [(Path(), path)]
    for name, file in named:
        if not _LEFT & set(name.parts) and file.is_file():
            status = file.stat()
            yield name.as_posix(), status.st_size, status.st_mtime_ns, _hash(_head(file))


def _head(file: Path) -> bytes:
    with file.open("rb") as opened:
        first = opened.read(_HEAD)
        if file.suffix != ".safetensors" or len(first) < 8:
            return first
        (length,) = struct.unpack("<Q", first[:8])
        return first + opened.read(max(0, min(length, _LONGEST_HEADER) + 8 - len(first)))


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]


def record_of(output: str) -> Path:
    """Return where an output's record lies."""
    place = Path(output)
    return place.parent / f".{place.name}.recipe.json"


def why_to_run(state: State, outputs: tuple[str, ...]) -> str | None:
    """Return why a step has to run, or None if its outputs are what it would make."""
    for output in outputs:
        if not os.path.lexists(output):
            return f"{output} is not there"
        record = _read(record_of(output))
        if record is None:
            return f"{output} is not of this recipe"
        if record.get("settings") != state.settings:
            made_by = record.get("version", __version__)
            same = made_by == __version__
            return "the options changed" if same else f"loratools {made_by} made it"
        before = record.get("inputs", {})
        for path in (*state.inputs, *before):
            now = state.inputs.get(path)
            if now is None or before.get(path) != now:
                return f"{path} changed" if path in before else f"{path} is new"
        if record.get("output") != fingerprint(output):
            return f"{output} was changed"
    return None


def write_records(state: State, outputs: tuple[str, ...]) -> None:
    """Note beside every output what it was made from.

    A disk that refuses it is no failure: the step is run again the next time.
    """
    for output in outputs:
        document = {
            "schema": _SCHEMA,
            "version": __version__,
            "settings": state.settings,
            "inputs": dict(state.inputs),
            "output": fingerprint(output),
        }
        with suppress(OSError):
            record_of(output).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _read(path: Path) -> Mapping[str, Any] | None:
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    known = isinstance(document, dict) and document.get("schema") == _SCHEMA
    return document if known and isinstance(document.get("inputs"), dict) else None
