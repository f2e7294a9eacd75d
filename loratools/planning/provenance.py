"""What a merged GGUF file says of its making, in metadata keys of our own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_types import ValueType

_PREFIX = "loratools.merged"


class Merged(Protocol):
    """An adapter that was merged."""

    @property
    def path(self) -> str:
        """Return where it was."""

    @property
    def strength(self) -> float:
        """Return the multiplier on its change."""


def provenance(adapters: Sequence[Merged]) -> dict[str, Value]:
    """Return ``loratools.merged.count``, and ``.N.name`` and ``.N.strength`` of each adapter."""
    words = {f"{_PREFIX}.count": Value(ValueType.UINT32, len(adapters))}
    for number, adapter in enumerate(adapters):
        words[f"{_PREFIX}.{number}.name"] = Value(ValueType.STRING, Path(adapter.path).name)
        strength = Value(ValueType.FLOAT32, adapter.strength)
        words[f"{_PREFIX}.{number}.strength"] = strength
    return words
