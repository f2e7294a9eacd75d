"""The contract of weights that are stored as several tensors: codes here, scales there.

A packed weight is seen as a matrix (rows, columns), leading dimensions flattened into rows, one
range of rows at a time. Its scales stay; what may change are the codes, positions among the
ascending levels of its ``Grid``.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from loratools.codecs.grid import Grid


@dataclass(frozen=True, slots=True, eq=False)
class Patch:
    """Values for a part of one stored tensor.

    Attributes:
        part: which of the stored tensors.
        start: the first element, counted through the flattened tensor; with ``axis``, the first
            index along it.
        values: of the part's dtype; with ``axis``, of its shape but for that axis.
        axis: along which the range runs, or None for consecutive elements.
    """

    part: str
    start: int
    values: Tensor
    axis: int | None = None

    def apply(self, parts: Mapping[str, Tensor]) -> None:
        """Write the values into the stored tensors, in place."""
        target = parts[self.part]
        if self.axis is None:
            target.view(-1)[self.start : self.start + self.values.numel()] = self.values.flatten()
        else:
            count = self.values.shape[self.axis]
            target.narrow(self.axis, self.start, count).copy_(self.values)


class PackedWeight(ABC):
    """One weight of a quantised checkpoint, as a frozen value holding the stored tensors."""

    scheme: ClassVar[str]
    """The scheme's name, as reports use it."""

    row_step: ClassVar[int] = 1
    """Ranges of rows start at multiples of this."""

    shape: tuple[int, ...]
    """Of the float weight, in the order in which its values are stored."""

    parts: Mapping[str, Tensor]
    """Stored tensors by the part they play."""

    @property
    def columns(self) -> int:
        """Size of the last dimension."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Product of the others."""
        return math.prod(self.shape[:-1])

    def decode(self, start: int, stop: int) -> Tensor:
        """Return rows ``start`` to ``stop``, (stop − start, columns) in float32."""
        return self.grid(start, stop).values(self.codes(start, stop))

    @abstractmethod
    def codes(self, start: int, stop: int) -> Tensor:
        """Return the codes of a range of rows, (stop − start, columns) uint8."""

    @abstractmethod
    def grid(self, start: int, stop: int) -> Grid:
        """Return what the codes of a range of rows stand for."""

    @abstractmethod
    def patches(self, codes: Tensor, start: int) -> Iterator[Patch]:
        """Yield what storing ``codes`` (rows, columns) at row ``start`` writes where."""
