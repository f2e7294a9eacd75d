"""Parameterisations of a layer's change, one per file; ``DELTAS`` lists them."""

from __future__ import annotations

from loratools.deltas.base import AdditiveDelta, LayerDelta, RowFold
from loratools.deltas.dora import DoRA
from loratools.deltas.experts import ExpertLoRA
from loratools.deltas.full import Replacement, RowReplacement
from loratools.deltas.lora import LoRA
from loratools.deltas.moved_base import MovedBase

DELTAS: tuple[type[LayerDelta], ...] = (
    LoRA,
    DoRA,
    ExpertLoRA,
    MovedBase,
    Replacement,
    RowReplacement,
)

__all__ = [
    "DELTAS",
    "AdditiveDelta",
    "DoRA",
    "ExpertLoRA",
    "LayerDelta",
    "LoRA",
    "MovedBase",
    "Replacement",
    "RowFold",
    "RowReplacement",
]
