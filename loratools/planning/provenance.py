"""What a merged GGUF file says of its making, in metadata keys of our own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from loratools.basemodel import BaseModel
from loratools.hub.references import plain_name
from loratools.tensorfiles.gguf import GGUFHeader
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.gguf_types import ValueType

_PREFIX = "loratools.merged"
_COUNT = f"{_PREFIX}.count"

Entry = tuple[str, float]
"""An adapter's name and strength."""


class Merged(Protocol):
    """An adapter that was merged."""

    @property
    def path(self) -> str:
        """Return where it was."""

    @property
    def strength(self) -> float:
        """Return the multiplier on its change."""


def provenance(base: BaseModel, adapters: Sequence[Merged]) -> dict[str, Value | None]:
    """Return ``loratools.merged.count``, and ``.N.name`` and ``.N.strength`` of each adapter.

    Adapters that the base itself was made of come first. One that is taken out again, at the
    opposite strength, leaves the list.
    """
    told = merged_adapters(base)
    for one in adapters:
        name = plain_name(one.path)
        undone = next((known for known in told if _undoes((name, one.strength), known)), None)
        if undone is not None:
            told.remove(undone)
        else:
            told.append((name, one.strength))
    return {**dict.fromkeys(_own_words(base)), **_words(told)}


def provenance_of(base: BaseModel, merged: BaseModel) -> dict[str, Value | None]:
    """Return the changes of metadata that make ``merged`` say what ``base`` says."""
    return {**dict.fromkeys(_own_words(merged)), **_own_words(base)}


def merged_adapters(base: BaseModel) -> list[Entry]:
    """Return what a GGUF file says that it was made of; what is no such word counts as nothing."""
    words = _own_words(base)
    count = words[_COUNT].data if _COUNT in words else 0
    found = []
    for number in range(count if isinstance(count, int) else 0):
        name = words.get(f"{_PREFIX}.{number}.name")
        strength = words.get(f"{_PREFIX}.{number}.strength")
        if name is not None and strength is not None and isinstance(strength.data, (int, float)):
            found.append((str(name.data), float(strength.data)))
    return found


def _words(told: Sequence[Entry]) -> dict[str, Value]:
    words = {_COUNT: Value(ValueType.UINT32, len(told))} if told else {}
    for number, (name, strength) in enumerate(told):
        words[f"{_PREFIX}.{number}.name"] = Value(ValueType.STRING, name)
        words[f"{_PREFIX}.{number}.strength"] = Value(ValueType.FLOAT32, strength)
    return words


def _own_words(base: BaseModel) -> Mapping[str, Value]:
    header = base.shards[0].header
    if not isinstance(header, GGUFHeader):
        return {}
    return {k: value for k, value in header.metadata.items() if k.startswith(f"{_PREFIX}.")}


def _undoes(one: Entry, other: Entry) -> bool:
    # Files hold strengths in float32.
    return one[0] == other[0] and math.isclose(one[1], -other[1], rel_tol=1e-6)
