"""Parameterisations of a layer's change, one per file; ``DELTAS`` lists them."""

from __future__ import annotations

from loratools.deltas.base import AdditiveDelta, LayerDelta, RowFold
from loratools.deltas.dora import DoRA
from loratools.deltas.full import Replacement, RowReplacement
from loratools.deltas.lora import LoRA
from loratools.deltas.moved_base import MovedBase

DELTAS: tuple[type[LayerDelta], ...] = (LoRA, DoRA, MovedBase, Replacement, RowReplacement)

__all__ = [
    "DELTAS",
    "AdditiveDelta",
    "DoRA",
    "LayerDelta",
    "LoRA",
    "MovedBase",
    "Replacement",
    "RowFold",
    "RowReplacement",
]
