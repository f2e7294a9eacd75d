"""A change of the top-left corner of a weight: of what the weight was before it was widened."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from loratools.deltas.base import RowFold


def take_corner(tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a view of the first ``shape[d]`` entries along every dimension d."""
    return tensor[tuple(slice(size) for size in shape)]


class CornerFold(RowFold):
    """Lets a fold prepared for a smaller weight act on the corner of a larger one.

    Args:
        inner: the fold, for a weight of shape ``corner``.
        corner: (out, in[, k...]) of the smaller weight.
        shape: that of the larger one, as many dimensions.
    """

    def __init__(self, inner: RowFold, corner: Sequence[int], shape: Sequence[int]) -> None:
        self.inner = inner
        self.reach = inner.reach
        self.substitutes = inner.substitutes
        self.corner = tuple(corner)
        self.shape = tuple(shape)

    def _view(self, block: Tensor, start: int) -> Tensor:
        rows = max(0, min(len(block), self.corner[0] - start))
        return take_corner(block.view(len(block), *self.shape[1:]), (rows, *self.corner[1:]))

    def measure(self, weight: Tensor, start: int) -> None:
        inside = self._view(weight, start)
        if len(inside):
            self.inner.measure(inside.flatten(1), start)

    def substitute(self, weight: Tensor, start: int) -> None:
        inside = self._view(weight, start)
        if len(inside):
            rows = inside.flatten(1).clone()
            self.inner.substitute(rows, start)
            inside.copy_(rows.view(inside.shape))

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        if first:
            change.zero_()
        inside = self._view(weight, start)
        if len(inside):
            rows = inside.flatten(1).contiguous()
            own = torch.empty_like(rows)
            self.inner.add_change(own, rows, start, first=True)
            self._view(change, start).add_(own.view(inside.shape))
