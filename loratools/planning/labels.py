"""A classifier's number of classes in ``config.json``, where an adapter brings another head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from loratools.basemodel import BaseModel
from loratools.streaming.works import TensorWork

_LAST_LAYERS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")
"""Endings of the tensors of which transformers' classifiers have one row for each class."""

_DEFAULT = 2
"""Classes of a transformers model whose config does not say."""


def label_words(base: BaseModel, works: Mapping[str, TensorWork]) -> dict[str, Any]:
    """Return the words of ``config.json`` for a head with other classes than it says.

    An adapter does not bring the names of its classes, so they become transformers' own.
    """
    if base.config is None:
        return {}
    said = _classes(base)
    heads = {
        work.shape[0]
        for name, work in works.items()
        if f".{name}".endswith(tuple(f".{ending}" for ending in _LAST_LAYERS))
        if name not in base.tensors or base.tensors[name].shape[0] == said != work.shape[0]
    }
    if len(heads) != 1 or heads == {said}:
        return {}
    names = [f"LABEL_{position}" for position in range(heads.pop())]
    words: dict[str, Any] = {
        "id2label": {str(position): name for position, name in enumerate(names)},
        "label2id": {name: position for position, name in enumerate(names)},
    }
    return words | ({"num_labels": len(names)} if "num_labels" in base.config else {})


def _classes(base: BaseModel) -> int:
    table = base.config_word("id2label")
    if isinstance(table, Mapping):
        return len(table)
    count = base.config_word("num_labels")
    return count if isinstance(count, int) else _DEFAULT
