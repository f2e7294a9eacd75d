"""What rounding to few bits leaves out of a tensor: gathered as it is written, then factored."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from loratools.basetensors import elements
from loratools.linalg.factored import SVD
from loratools.linalg.randomized import truncated_svd
from loratools.streaming.gate import Gate


@dataclass(frozen=True, slots=True, eq=False)
class ResidualWish:
    """That a tensor's residual is wanted.

    Attributes:
        rank: of each of its matrices, at most.
        stacked: whether its first dimension counts matrices (experts).
        gate: lets in as many tensors at a time as memory is to hold.
    """

    rank: int
    stacked: bool
    gate: Gate

    def matrix_shape(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return (rows, columns) of one of the tensor's matrices."""
        own = shape[1:] if self.stacked else shape
        return own[0], elements(own[1:])


@dataclass(frozen=True, slots=True, eq=False)
class Residual:
    """(Wanted − stored) of one tensor, each of its matrices truncated.

    Attributes:
        svds: on the CPU, of one rank each.
        square: ‖wanted − stored‖².
        kept: how much of that the triplets hold.
    """

    svds: tuple[SVD, ...]
    square: float
    kept: float


class Gathering(AbstractContextManager["Gathering"]):
    """Takes the error of rounding block by block; one matrix is in memory at a time."""

    def __init__(self, wish: ResidualWish, shape: tuple[int, ...], device: str) -> None:
        self.wish = wish
        self.shape = wish.matrix_shape(shape)
        self.size = elements(self.shape)
        self.device = device
        self.flat: Tensor | None = None
        self.found: list[SVD] = []
        self.square = self.kept = 0.0
        self.held = ExitStack()

    def __enter__(self) -> Gathering:
        self.held.enter_context(self.wish.gate.holding(self.size))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.flat = None
        self.held.close()

    def add(self, error: Tensor, first: int) -> None:
        """Take (stored − wanted) of consecutive elements, the first of which is ``first``."""
        if self.flat is None:
            self.flat = torch.empty(self.size, device=self.device)
        values, done = error.flatten(), 0
        while done < len(values):
            place = (first + done) % self.size
            count = min(self.size - place, len(values) - done)
            torch.neg(values[done : done + count], out=self.flat[place : place + count])
            done += count
            if place + count == self.size:
                self._factor(self.flat.view(self.shape))

    def _factor(self, matrix: Tensor) -> None:
        kept = truncated_svd(matrix, self.wish.rank)
        self.square += kept.norm**2
        self.kept += kept.captured * kept.norm**2
        self.found.append(SVD(kept.svd.left.cpu(), kept.svd.values.cpu(), kept.svd.right.cpu()))

    def result(self) -> Residual:
        """Return the residual, after the last block."""
        rank = max(len(svd.values) for svd in self.found)
        padded = tuple(svd.padded(rank) for svd in self.found)
        return Residual(padded, self.square, self.kept)


def empty_residual(shape: tuple[int, ...], wish: ResidualWish) -> Residual:
    """Return a residual of rank 1 that is zero."""
    rows, columns = wish.matrix_shape(shape)
    zero = SVD(torch.zeros(rows, 1), torch.zeros(1), torch.zeros(1, columns))
    return Residual((zero,) * (shape[0] if wish.stacked else 1), 0.0, 0.0)


def share_kept(residuals: list[Residual]) -> float:
    """Return how much of the squares of all residuals the triplets hold; 1 of nothing."""
    whole = math.fsum(one.square for one in residuals)
    return math.fsum(one.kept for one in residuals) / whole if whole else 1.0
