"""One tensor's change, found and factored."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.deltas import ExpertLoRA, LoRA
from loratools.deltas.lora import Role
from loratools.deltas.spectral import lora_from_svd
from loratools.extraction.changes import Change
from loratools.linalg.factored import SVD
from loratools.linalg.randomized import Truncation, truncated_svd, truncated_svd_of_energy
from loratools.streaming.differences import Difference, read_difference


@dataclass(frozen=True, slots=True)
class Wish:
    """How much of each change to keep.

    Attributes:
        rank: or, with an energy, the largest rank.
        energy: share of ‖ΔW‖², in (0, 1].
        conv_rank: for kernels beyond 1, instead of ``rank``.
        exact: by dense SVDs.
    """

    rank: int | None
    energy: float | None = None
    conv_rank: int | None = None
    exact: bool = False

    def word_for(self, change: Change) -> str:
        """Return which option says the rank of a change."""
        spatial = math.prod(change.pair.shape[2:]) > 1
        own = change.kind == "conv" and spatial and self.conv_rank is not None
        return "conv-rank" if own else "rank"

    def rank_for(self, change: Change) -> int | None:
        """Return the rank of a change, or the largest it may have."""
        return self.conv_rank if self.word_for(change) == "conv-rank" else self.rank

    def truncate(self, matrix: Tensor, change: Change) -> Truncation:
        """Return what is kept of a matrix."""
        rank = self.rank_for(change)
        if self.energy is not None:
            return truncated_svd_of_energy(matrix, self.energy, ceiling=rank, exact=self.exact)
        assert rank is not None
        return truncated_svd(matrix, rank, exact=self.exact)


@dataclass(frozen=True, slots=True, eq=False)
class Found:
    """What became of one tensor's change.

    Attributes:
        change: the tensor.
        norm: ‖ΔW‖.
        base_norm: ‖W_base‖.
        lost: ‖ΔW − what is written‖, before rounding.
        delta: the factors, if it was factored.
        values: the change itself, or the tuned tensor, if it is written whole.
        rank: of the factors.
        error: lost / norm, of the factors.
        least: a lower bound on that at this rank.
        method: ``sketch`` or ``dense``.
    """

    change: Change
    norm: float
    base_norm: float
    lost: float
    delta: LoRA | ExpertLoRA | None = None
    values: Tensor | None = None
    rank: int | None = None
    error: float | None = None
    least: float | None = None
    method: str | None = None


def find_change(change: Change, *, wish: Wish, device: str = "cpu") -> Found:
    """Read both tensors and factor their difference as the change says.

    Raises NonFiniteError, CorruptFileError: see ``read_difference``.
    """
    difference = read_difference(change.pair.tuned, change.pair.base)
    norms = (difference.norm, difference.base_norm)
    if difference.norm == 0 or change.way == "none":
        return Found(change, *norms, lost=difference.norm)
    if change.way == "whole":
        return Found(change, *norms, lost=0.0, values=difference.values)
    if change.way == "copy":
        return Found(change, *norms, lost=0.0)
    if change.kind == "experts":
        return _experts(change, difference, wish, device)
    matrix = difference.values.reshape(difference.values.shape[0], -1).to(device)
    kept = wish.truncate(matrix, change)
    delta = _lora(kept.svd, change, change.pair.shape)
    return Found(
        change,
        *norms,
        lost=kept.error * difference.norm,
        delta=delta,
        rank=kept.rank,
        error=kept.error,
        least=kept.least,
        method=_method(kept),
    )


def _method(kept: Truncation) -> str:
    return "dense" if kept.dense else "sketch"


def _lora(svd: SVD, change: Change, shape: tuple[int, ...]) -> LoRA:
    """Return the factors, alpha = rank, in mathematical order (out, in)."""
    if not change.transposed:
        return lora_from_svd(svd, shape)
    role: Role = "embedding" if change.kind == "embedding" else "linear"
    # Embeddings come here only where the format sees their tables as (dim, tokens).
    return lora_from_svd(svd.transposed, shape[::-1], role=role)


def _experts(change: Change, difference: Difference, wish: Wish, device: str) -> Found:
    """Return a stack of products of one rank, the largest that any expert needs."""
    stack = difference.values.to(device)
    kept = [wish.truncate(matrix, change) for matrix in stack]
    rank = max(one.rank for one in kept)
    if any(one.rank < rank for one in kept):
        kept = [truncated_svd(matrix, rank, exact=wish.exact) for matrix in stack]
    shape = change.pair.shape[1:]
    loras = [_lora(one.svd.padded(rank), change, shape) for one in kept]
    lost, least = (
        math.sqrt(sum((share * one.norm) ** 2 for share, one in pairs))
        for pairs in ([(one.error, one) for one in kept], [(one.least, one) for one in kept])
    )
    return Found(
        change,
        difference.norm,
        difference.base_norm,
        lost=lost,
        delta=ExpertLoRA(
            torch.stack([lora.down for lora in loras]),
            torch.stack([lora.up for lora in loras]),
            float(rank),
        ),
        rank=rank,
        error=lost / difference.norm,
        least=least / difference.norm,
        method=_method(kept[0]),
    )
