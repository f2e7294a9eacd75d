"""Parameterisations of a layer's change, one per file; ``DELTAS`` lists them."""

from __future__ import annotations

from loratools.deltas.base import AdditiveDelta, LayerDelta, RowFold
from loratools.deltas.boft import BOFT
from loratools.deltas.dora import DoRA
from loratools.deltas.experts import ExpertLoRA
from loratools.deltas.full import Replacement, RowReplacement
from loratools.deltas.full_change import FullDelta
from loratools.deltas.fusing import fuse_rows
from loratools.deltas.glora import GLoRA
from loratools.deltas.ia3 import IA3
from loratools.deltas.loha import LoHa
from loratools.deltas.lokr import LoKr
from loratools.deltas.lora import LoRA
from loratools.deltas.moved_base import MovedBase
from loratools.deltas.oft import OFT
from loratools.deltas.sparse import SparseResidual
from loratools.deltas.sums import SumDelta
from loratools.deltas.tucker import TuckerLoRA

DELTAS: tuple[type[LayerDelta], ...] = (
    LoRA,
    TuckerLoRA,
    LoHa,
    LoKr,
    FullDelta,
    SparseResidual,
    SumDelta,
    DoRA,
    OFT,
    BOFT,
    GLoRA,
    IA3,
    ExpertLoRA,
    MovedBase,
    Replacement,
    RowReplacement,
)

__all__ = [
    "BOFT",
    "DELTAS",
    "IA3",
    "OFT",
    "AdditiveDelta",
    "DoRA",
    "ExpertLoRA",
    "FullDelta",
    "GLoRA",
    "LayerDelta",
    "LoHa",
    "LoKr",
    "LoRA",
    "MovedBase",
    "Replacement",
    "RowFold",
    "RowReplacement",
    "SparseResidual",
    "SumDelta",
    "TuckerLoRA",
    "fuse_rows",
]
