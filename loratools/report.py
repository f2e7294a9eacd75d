"""What an operation did, as one frozen value with one JSON form."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

SCHEMA = 1

Level = Literal["note", "warning"]
Json = Any
"""A value that ``json.dumps`` takes: str, int, float, bool, None, list, dict."""


@dataclass(frozen=True, slots=True)
class Note:
    """One sentence about a default, a conversion or a danger, and what it is about."""

    message: str
    level: Level = "note"
    subject: str | None = None


@dataclass(frozen=True, slots=True)
class Report:
    """What one operation read, decided and wrote.

    Attributes:
        operation: the verb, as on the command line (``merge``, ``inspect`` ...).
        inputs: paths or references as the user gave them, in order.
        output: what was made, or ``None``.
        facts: summary figures in reading order; keys are snake_case words.
        items: one mapping for each layer or tensor; all rows have the same keys.
        notes: every default, conversion and danger, warnings included.
        dry_run: true when nothing was written.
    """

    operation: str
    inputs: tuple[str, ...] = ()
    output: str | None = None
    facts: Mapping[str, Json] = field(default_factory=lambda: MappingProxyType({}))
    items: tuple[Mapping[str, Json], ...] = ()
    notes: tuple[Note, ...] = ()
    dry_run: bool = False

    @property
    def warnings(self) -> tuple[Note, ...]:
        """The notes that warn."""
        return tuple(note for note in self.notes if note.level == "warning")

    def to_dict(self) -> dict[str, Json]:
        """Return the JSON form: plain containers, with the schema number first."""
        return {
            "schema": SCHEMA,
            "operation": self.operation,
            "dry_run": self.dry_run,
            "inputs": list(self.inputs),
            "output": self.output,
            "facts": dict(self.facts),
            "items": [dict(item) for item in self.items],
            "notes": [
                {"level": note.level, "message": note.message, "subject": note.subject}
                for note in self.notes
            ],
        }

    def to_json(self) -> str:
        """Return the JSON document, non-finite numbers as strings."""
        return json.dumps(_finite(self.to_dict()), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: Json) -> Json:
    """Replace NaN and infinities, which JSON has no words for, by strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
