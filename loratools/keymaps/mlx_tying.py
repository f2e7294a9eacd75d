"""Tied embeddings in mlx-lm: a change of the table is one of the output head, which is the table.

PEFT adds a change of the input table to the input alone. Where the base ties the two, an adapter of
mlx-lm's therefore is two alike layers in transformers' naming, and the other way round.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from loratools.deltas import DoRA, LayerDelta, LoRA
from loratools.errors import UnsupportedError
from loratools.keymaps.mlx_base import MLXBase
from loratools.keymaps.transformers_rows import TIED

Layers = Mapping[str, LayerDelta]


def with_tied_head(layers: Layers, base: MLXBase) -> dict[str, LayerDelta]:
    """Return the layers with one for the head beside that of its table, in transformers' names."""
    done = dict(layers)
    for table, head in _pairs(layers, base).items():
        done.setdefault(head, _turned(layers[table]))
    return done


def without_tied_head(layers: Layers, base: MLXBase) -> dict[str, LayerDelta]:
    """Return the layers with the head's left to its table's.

    Raises UnsupportedError where the two do not change alike.
    """
    done = dict(layers)
    heads = {head for head, table in TIED if base.is_tied} & layers.keys()
    pairs = _pairs(layers, base)
    for head in heads - set(pairs.values()):
        raise _apart(head)
    for table, head in pairs.items():
        other = done.pop(head, None)
        if other is None or not _same(_turned(layers[table]), other):
            raise _apart(table)
    return done


def _pairs(layers: Layers, base: MLXBase) -> dict[str, str]:
    """Return the changed tables of a base that ties them, with the names of their heads."""
    heads = {table: head for head, table in reversed(TIED)} if base.is_tied else {}
    return {path: heads[path] for path in layers if path in heads}


def _turned(delta: LayerDelta) -> LayerDelta:
    """Return a table's change as the head's, (out, in) = (rows of the table, width)."""
    if isinstance(delta, LoRA) and delta.role == "embedding":
        return replace(delta, down=delta.up.mT, up=delta.down.mT, role="linear")
    if isinstance(delta, DoRA) and isinstance(delta.inner, LoRA):
        inner = _turned(delta.inner)
        assert isinstance(inner, LoRA)
        return replace(delta, inner=inner, axis="out" if delta.axis == "in" else "in")
    return delta


def _same(one: LayerDelta, other: LayerDelta) -> bool:
    ours, theirs = one.tensors(), other.tensors()
    alike = type(one) is type(other) and ours.keys() == theirs.keys()
    scales = getattr(one, "alpha", None) == getattr(other, "alpha", None)
    return alike and scales and all(torch.equal(ours[name], theirs[name]) for name in ours)


def _apart(path: str) -> UnsupportedError:
    return UnsupportedError(
        f"{path}: the base ties its embeddings, of which mlx-lm changes both or none, and the "
        "adapter changes one",
        hint="merge it into the base, which unties them, and convert the merged model",
    )
