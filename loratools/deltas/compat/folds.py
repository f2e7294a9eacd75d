"""Folds that tools' rules are made of, beside those of the parameterisations themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.deltas.base import RowFold, accumulate
from loratools.deltas.dora import add_direction, length_gain


class BothFold(RowFold):
    """Adds the changes of two folds; the second one reaches ``rows``."""

    def __init__(self, main: RowFold, other: RowFold) -> None:
        self.main = main
        self.other = other
        self.reach = main.reach

    def measure(self, weight: Tensor, start: int) -> None:
        self.main.measure(weight, start)

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        self.main.add_change(change, weight, start, first=first)
        self.other.add_change(change, weight, start, first=False)


class LengthenedFold(RowFold):
    """Adds strength · (lengths ∘ W″ − W), where W″ is W with another fold's change.

    ``lengths`` is (out,) in float32, on the fold's device.
    """

    def __init__(
        self, inner: RowFold, lengths: Tensor, strength: float, *, transposed: bool
    ) -> None:
        self.inner = inner
        self.lengths = lengths
        self.strength = strength
        self.transposed = transposed
        self.reach = inner.reach

    def measure(self, weight: Tensor, start: int) -> None:
        self.inner.measure(weight, start)

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        moved = add_direction(self.inner, weight, start)
        part = self.lengths[start : start + len(weight), None]
        moved.mul_(self.lengths if self.transposed else part)
        accumulate(change, moved.sub_(weight).mul_(self.strength), first=first)


class BaseLengthFold(RowFold):
    """Adds strength · (magnitude · V / ‖W‖ − W), the norm that of the base's own output rows."""

    def __init__(
        self, product: RowFold, magnitude: Tensor, strength: float, *, transposed: bool
    ) -> None:
        self.product = product
        self.magnitude = magnitude
        self.strength = strength
        self.transposed = transposed
        self.reach = "two-pass" if transposed else "rows"
        self.squares = torch.zeros_like(magnitude)

    def measure(self, weight: Tensor, start: int) -> None:
        self.squares += weight.square().sum(dim=0)

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        if self.transposed:
            gain = length_gain(self.magnitude, self.squares.sqrt())
        else:
            magnitude = self.magnitude[start : start + len(weight)]
            gain = length_gain(magnitude, weight.norm(dim=1))[:, None]
        moved = add_direction(self.product, weight, start).mul_(gain)
        accumulate(change, moved.sub_(weight).mul_(self.strength), first=first)
