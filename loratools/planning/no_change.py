"""A merge that changes nothing is an error: foreseen where the factors show it, else seen after."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from loratools.deltas import AdditiveDelta, LayerDelta
from loratools.errors import MatchError
from loratools.planning.placement import Placement
from loratools.streaming.works import TensorResult
from loratools.tensorfiles.dtypes import DTYPES, torch_dtype


@dataclass(frozen=True, slots=True)
class Touched:
    """One output tensor that was folded: what landed on it, its dtype, what became of it.

    ``shaped`` tells that its codes were chosen with the adapters in view.
    """

    placements: Sequence[Placement]
    dtype: str
    result: TensorResult
    shaped: bool = False


def refuse_untrained(placements: Iterable[Placement]) -> None:
    """Raise MatchError if the stored factors show that every change is zero."""
    placed = list(placements)
    if placed and all(_is_still(placement.delta) for placement in placed):
        raise MatchError(
            "the merge changes nothing: every change is zero",
            hint="is this adapter trained? (lora_B starts at zero)",
        )


def _is_still(delta: LayerDelta) -> bool:
    if delta.is_zero:
        return True
    return isinstance(delta, AdditiveDelta) and delta.bias_change is None and delta.norm() == 0


def refuse_no_change(tensors: Sequence[Touched]) -> None:
    """Raise MatchError if no stored value differs from the base's, saying why.

    Norms of results are float32's, where tiny strengths underflow, so the factors are asked.
    """
    if not tensors or any(tensor.result.changed for tensor in tensors):
        return
    if any(_cancels(tensor) for tensor in tensors):
        raise MatchError(
            "the merge changes nothing: the adapters cancel each other",
            hint="give other strengths, or leave them out",
        )
    if all(tensor.dtype not in DTYPES for tensor in tensors):
        raise MatchError(
            "the merge changes nothing: rounding to the base's few bits undoes every change",
            hint=_more_room(tensors),
        )
    raise MatchError(
        "the merge changes nothing: every change is below the base's precision",
        hint="raise the strength, or write a wider type with --dtype fp32",
    )


def _more_room(tensors: Sequence[Touched]) -> str:
    if any(tensor.shaped for tensor in tensors):
        return "raise the strength or --rounding-strength, or take a wider type: --quant dequantize"
    return "use --rounding adapter-aware, or a wider type: --quant dequantize"


def _cancels(tensor: Touched) -> bool:
    """Return whether several changes, each large enough to be seen alone, add up to none."""
    dtype = torch_dtype(tensor.dtype) if tensor.dtype in DTYPES else torch.float16
    least = torch.finfo(dtype).eps * tensor.result.result_norm
    least = max(least, 2 * tensor.result.change_norm)
    return sum(_size(placement) > least for placement in tensor.placements) > 1


def _size(placement: Placement) -> float:
    norm = placement.delta.norm() if placement.part == "weight" else None
    return 0.0 if norm is None else abs(placement.strength) * norm
