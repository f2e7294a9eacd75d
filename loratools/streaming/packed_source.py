"""Reading a packed weight as rows of float32, whatever its scheme's own ranges of rows."""

from __future__ import annotations

from torch import Tensor

from loratools.basetensors import BaseTensor, elements


class PackedSource:
    """A packed weight, its parts mapped into memory, as a flat sequence of float32."""

    def __init__(self, tensor: BaseTensor) -> None:
        assert tensor.packed is not None
        self.weight = tensor.packed.open()
        self.turned = tensor.packed.turned
        self.shape = tensor.shape
        self.total = elements(tensor.shape)

    @property
    def unit(self) -> int:
        """Number of elements that are decoded together."""
        if self.turned:
            return self.shape[-1] * self.shape[-2]
        return min(self.weight.row_step * self.weight.columns, self.total)

    def read(self, start: int, stop: int) -> Tensor:
        """Return elements ``start`` to ``stop`` of the flattened float weight, (n,) float32."""
        unit = self.unit
        low, high = start // unit * unit, min(-(-stop // unit) * unit, self.total)
        columns = self.weight.columns
        values = self.weight.decode(low // columns, high // columns)
        if self.turned:
            # Stored as (out, in), read as (in, out), one matrix after another.
            values = values.view(-1, self.shape[-1], self.shape[-2]).mT.contiguous()
        return values.flatten()[start - low : stop - low]
