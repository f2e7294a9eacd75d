"""One packed weight coded again in its own scheme, its scales as they are."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loratools.basetensors import elements
from loratools.codecs.grid import Grid
from loratools.codecs.packed import Patch
from loratools.streaming.blocks import Blocks
from loratools.tensorfiles.copying import write_at


class PackedBlocks(Blocks):
    """Blocks of rows whose codes go into a copy of the stored parts."""

    def _matrix(self) -> tuple[int, int]:
        assert self.packed is not None
        return self.packed.weight.rows, self.packed.weight.columns

    def patches(self) -> Iterator[Patch]:
        """Yield what is to be written over the copied parts."""
        for start, stop in self._spans():
            wide, _, made = self._summed(self._read(start, stop), start)
            self._check(wide, start)
            yield from self._coded(wide, made, start)

    def _coded(self, wide: Tensor, made: Tensor, start: int) -> Iterator[Patch]:
        assert self.packed is not None
        weight = self.packed.weight
        target, change = (part.reshape(-1, weight.columns) for part in (wide, made))
        first = start * self.columns // weight.columns
        last = first + len(target)
        grid = weight.grid(first, last).to(self.device)
        before = weight.codes(first, last)
        codes = self.subspaces.codes(target, grid, first)
        codes = _same_where_equal(grid, before.to(self.device), codes)
        self._count(change, grid.values(codes).sub_(target), first)
        codes = codes.cpu()
        self.losses.count(before, codes)
        self.changed = self.changed or not torch.equal(before, codes)
        yield from weight.patches(codes.contiguous(), first)


def _same_where_equal(grid: Grid, before: Tensor, codes: Tensor) -> Tensor:
    """Return the codes, but the stored ones where they stand for the same.

    FP4 has two zeros, and where a scale is zero all codes are alike.
    """
    if bool((grid.levels[1:] != grid.levels[:-1]).all()) and bool(grid.scale.all()):
        return codes
    return torch.where(grid.values(before) == grid.values(codes), before, codes)


def write_patch(target: int, offset: int, shape: tuple[int, ...], patch: Patch) -> None:
    """Write a patch of a stored tensor of ``shape``, which begins at ``offset`` of an open file."""
    values = patch.values.contiguous()
    size = values.element_size()
    if patch.axis is None:
        write_at(target, _bytes(values), offset + patch.start * size)
        return
    # One run of bytes for every index of the axes before.
    inner = elements(shape[patch.axis + 1 :])
    outer = elements(shape[: patch.axis])
    stride = shape[patch.axis] * inner * size
    for index, run in enumerate(values.reshape(outer, -1)):
        write_at(target, _bytes(run), offset + index * stride + patch.start * inner * size)


def _bytes(values: Tensor) -> memoryview:
    return memoryview(values.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
