"""Ranks padded and scales folded, so that one rank and one scale are right for a whole file."""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from loratools.deltas.experts import ExpertLoRA
from loratools.deltas.lora import LoRA
from loratools.deltas.one_alpha import usual_alpha, with_alpha

L = TypeVar("L", bound=LoRA | ExpertLoRA)


def padded_to(layer: L, rank: int) -> L:
    """Return the same change with zeros up to ``rank``, at the same scale."""
    more = rank - layer.rank
    if not more:
        return layer
    # Behind the axis of experts, if there is one.
    axis = 1 if isinstance(layer, ExpertLoRA) else 0
    return replace(
        layer,
        down=_padded(layer.down, axis, more),
        up=_padded(layer.up, axis + 1, more),
        alpha=layer.scale * rank,
    )


def _padded(tensor: Tensor, axis: int, more: int) -> Tensor:
    shape = list(tensor.shape)
    shape[axis] = more
    # Joining is not implemented for 8-bit floats, of which bytes will do.
    raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return torch.cat([raw, raw.new_zeros(shape)], dim=axis).view(tensor.dtype)


def with_one_scale(
    layers: Mapping[str, LoRA | ExpertLoRA],
) -> tuple[dict[str, LoRA | ExpertLoRA], int, float]:
    """Return the same changes at one rank and one scale, with the two.

    The rank is the largest, the scale that of most layers. A scale that is the same in float32, in
    which it is applied, is not folded.
    """
    rank = max(layer.rank for layer in layers.values())
    padded = {path: padded_to(layer, rank) for path, layer in layers.items()}
    alpha = usual_alpha(padded.values())
    levelled = {
        path: layer if _single(layer.alpha) == _single(alpha) else with_alpha(layer, alpha)
        for path, layer in padded.items()
    }
    return levelled, rank, scale_of(alpha, rank)


def scale_of(alpha: float, rank: int) -> float:
    """Return alpha / rank, so rounded that times the rank it is alpha again where that is possible.

    Of several such numbers, the one that is written shortest.
    """
    near = alpha / rank
    candidates = (near, math.nextafter(near, math.inf), math.nextafter(near, -math.inf))
    exact = [scale for scale in candidates if scale * rank == alpha]
    return min(exact, key=lambda scale: len(repr(scale)), default=near)


def _single(value: float) -> float:
    """Return a number as float32 holds it."""
    rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    return rounded
