"""Scales folded into factors, so that one alpha is right for every layer of a file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from loratools.deltas.experts import ExpertLoRA
from loratools.deltas.lora import LoRA

L = TypeVar("L", bound=LoRA | ExpertLoRA)


def usual_alpha(layers: Iterable[LoRA | ExpertLoRA]) -> float:
    """Return the alpha that most layers have, but not 0; 1 where there is none."""
    counts = Counter(layer.alpha for layer in layers if layer.alpha)
    return counts.most_common(1)[0][0] if counts else 1.0


def with_alpha(layer: L, alpha: float) -> L:
    """Return the same ΔW with another alpha, which must not be 0.

    The quotient goes into ``up``: in its own dtype where nothing is rounded (powers of two), else
    in float32.
    """
    if layer.alpha == alpha:
        return layer
    return replace(layer, up=_times(layer.up, layer.alpha / alpha), alpha=alpha)


def _times(tensor: Tensor, factor: float) -> Tensor:
    wide = tensor.to(torch.float32) * factor
    same = wide.to(tensor.dtype)
    exact = factor == 0 or torch.equal(same.to(torch.float32), wide)
    back = exact and torch.equal(wide / factor, tensor.to(torch.float32)) if factor else exact
    return same if back else wide
