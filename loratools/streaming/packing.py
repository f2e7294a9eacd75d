"""One float weight coded into a packed scheme, with fresh scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from loratools.basetensors import BaseTensor, elements
from loratools.codecs.packed import Patch
from loratools.streaming.blocks import Blocks
from loratools.streaming.works import TensorWork


def part_works(work: TensorWork) -> list[TensorWork]:
    """Return the stored tensors of a weight that is to be packed."""
    assert work.packer is not None
    module = work.name.removesuffix(".weight")
    found = []
    for role, part in work.packer.parts(work.shape, work.source.dtype).items():
        name = module + part.ending
        place = BaseTensor(name, part.dtype, part.shape, work.source.file)
        found.append(TensorWork(name, part.dtype, part.shape, place, whole=work, role=role))
    return found


class PackingBlocks(Blocks):
    """Blocks of rows on their way into a packed scheme."""

    def _step(self) -> int:
        assert self.work.packer is not None
        unit = self.work.packer.row_step(self.work.shape)
        return -(-super()._step() // unit) * unit

    def patches(self) -> Iterator[Patch]:
        """Yield what is to be written into the stored tensors."""
        packer = self.work.packer
        assert packer is not None
        packing = packer.start(self.work.shape, self.work.source.dtype)
        if packer.two_pass:
            for start, stop in self._spans():
                packing.see(self._values(start, stop), start)
        for start, stop in self._spans():
            values = self._values(start, stop)
            self._check(values, start)
            yield from packing.code(values, start)
        yield from packing.finish()

    def _values(self, start: int, stop: int) -> Tensor:
        raw = self._read(start, stop)
        return self._wide(raw, start).to(torch.float32).view(-1, elements(self.work.shape[1:]))
