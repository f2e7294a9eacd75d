"""GGUF metadata as text, the form in which adapters keep a file's own words, and back.

A string stands as it is, everything else as JSON. Types come from the table of known keys; those
of other keys are kept in one word of their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType

from loratools.errors import OutputError
from loratools.tensorfiles.gguf_reading import ArrayValue, Value
from loratools.tensorfiles.gguf_types import ValueType
from loratools.tensorfiles.inputs import quoted

TYPES_WORD = "gguf.types"
"""The word that holds the types of keys which the table does not have: JSON, key → type."""

_MAX_ITEMS = 4096
_STRING = (ValueType.STRING, None)
_TEXTS = (
    "general.type", "general.architecture", "adapter.type", "adapter.lora.task_name",
    "adapter.lora.prompt_prefix", "general.name", "general.basename", "general.finetune",
    "general.version", "general.organization", "general.size_label", "general.license",
    "general.author", "general.description", "general.url", "general.doi", "general.uuid",
    "general.repo_url",
)  # fmt: skip
Kind = tuple[ValueType, ValueType | None]
KNOWN: Mapping[str, Kind] = MappingProxyType(
    {
        **dict.fromkeys(_TEXTS, _STRING),
        "adapter.lora.alpha": (ValueType.FLOAT32, None),
        "adapter.alora.invocation_tokens": (ValueType.ARRAY, ValueType.UINT32),
        "general.alignment": (ValueType.UINT32, None),
        "general.quantization_version": (ValueType.UINT32, None),
        "general.base_model.count": (ValueType.UINT32, None),
        "general.tags": (ValueType.ARRAY, ValueType.STRING),
        "general.languages": (ValueType.ARRAY, ValueType.STRING),
    }
)
"""Type, and type of the items, of the keys that adapters have; other keys are text by default."""


def words_from_metadata(metadata: Mapping[str, Value]) -> dict[str, str]:
    """Return metadata as text; arrays of more than 4096 items (a vocabulary) are left out."""
    words: dict[str, str] = {}
    types: dict[str, str] = {}
    for key, value in metadata.items():
        if isinstance(value.data, ArrayValue) and len(value.data) > _MAX_ITEMS:
            continue
        plain = value.plain()
        words[key] = plain if isinstance(plain, str) else json.dumps(plain)
        if (value.type, value.item) != KNOWN.get(key, _STRING):
            types[key] = ":".join(
                kind.name for kind in (value.type, value.item) if kind is not None
            )
    if types:
        words[TYPES_WORD] = json.dumps(types, sort_keys=True)
    return words


def metadata_from_words(words: Mapping[str, str]) -> dict[str, Value]:
    """Return what ``words_from_metadata`` was given; raises OutputError for other text."""
    types = json.loads(words.get(TYPES_WORD, "{}"))
    return {
        key: _value(key, text, _kind(key, types))
        for key, text in words.items()
        if key != TYPES_WORD
    }


def _kind(key: str, types: Mapping[str, str]) -> Kind:
    if key not in types:
        return KNOWN.get(key, _STRING)
    name, _, item = types[key].partition(":")
    return ValueType[name], ValueType[item] if item else None


def _value(key: str, text: str, kind: Kind) -> Value:
    if kind == _STRING:
        return Value(ValueType.STRING, text)
    try:
        data = json.loads(text)
    except ValueError as error:
        raise OutputError(f"metadata {quoted(key)}: {quoted(text)} is no {kind[0].name}") from error
    return Value(kind[0], tuple(data) if isinstance(data, list) else data, kind[1])
