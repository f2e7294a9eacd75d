"""What a report says of a change of rank."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from loratools.adapter import Adapter
from loratools.deltas import DoRA, LayerDelta
from loratools.report import Json, Note
from loratools.resizing.layers import Resized
from loratools.resizing.ranks import MODES, RankRule


def resize_notes(
    adapter: Adapter, done: Sequence[Resized], others: Mapping[str, Sequence[str]]
) -> list[Note]:
    """Return what became of layers that are not plain LoRA, and of those that were smaller."""
    notes = [Note(word) for word in adapter.notes]
    for kind, paths in others.items():
        notes.append(Note(f"{_count(paths)} of kind {kind} carried as they are: no rank to change"))
    if adapter.extras:
        notes.append(Note(f"{len(adapter.extras)} other tensors carried as they are"))
    lifted: dict[str, int] = {}
    for one in done:
        kind = _kind(one.layer.old)
        if kind != _kind(one.delta):
            lifted[kind] = lifted.get(kind, 0) + 1
    notes += [Note(f"{count} {kind} layers became plain LoRA") for kind, count in lifted.items()]
    grown = [one for one in done if (one.layer.rank or math.inf) < one.rank]
    if grown:
        notes.append(Note(f"{_count(grown)} filled up with zeros: their rank was smaller"))
    return notes


def _count(items: Sequence[object]) -> str:
    return "1 layer" if len(items) == 1 else f"{len(items)} layers"


def _kind(delta: LayerDelta) -> str:
    return delta.inner.kind if isinstance(delta, DoRA) else delta.kind


def capped_notes(rule: RankRule, done: Sequence[Resized]) -> list[Note]:
    """Return a note on layers whose shapes allow less than the rank that was asked for."""
    if rule.rank is None:
        return []
    capped = [one for one in done if one.rank < min(rule.rank, rule.conv_rank or rule.rank)]
    if not capped:
        return []
    names = ", ".join(f"{one.layer.path} ({one.rank})" for one in capped[:4])
    return [Note(f"{_count(capped)} have shapes that allow less than that rank: {names}")]


def rule_words(rule: RankRule) -> dict[str, Json]:
    """Return the rule's own words, those that were given."""
    words = (*MODES, "conv_rank", "max_rank", "compat")
    given: dict[str, Json] = {
        name: getattr(rule, name) for name in words if getattr(rule, name) is not None
    }
    return {**given, "scope": "global"} if rule.everywhere else given


def rank_range(ranks: Sequence[int]) -> dict[str, Json]:
    """Return the least, mean and most of some ranks."""
    if not ranks:
        return {}
    return {"least": min(ranks), "mean": sum(ranks) / len(ranks), "most": max(ranks)}


def overall_retained(layers: Sequence[Resized]) -> float:
    """Return Σσ² kept over Σσ² of all layers; of G·ΔW for DoRA."""
    wholes = [float(one.layer.spectrum.values.square().sum()) for one in layers]
    kept = sum(whole * one.retained for whole, one in zip(wholes, layers, strict=True))
    return kept / sum(wholes) if sum(wholes) else 1.0


def item_of(one: Resized) -> dict[str, Json]:
    """Return a layer's row of the report."""
    new = one.delta.inner if isinstance(one.delta, DoRA) else one.delta
    return {
        "module": one.layer.path,
        "kind": one.layer.old.kind,
        "shape": list(one.layer.old.weight_shape),
        "rank_before": one.layer.rank,
        "rank": one.rank,
        "alpha": getattr(new, "alpha", None),
        "norm": math.sqrt(one.layer.energy),
        "retained_energy": one.retained,
        "relative_error": one.relative_error,
    }
