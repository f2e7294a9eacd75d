"""Reading a packed weight as rows of float32, whatever its scheme's own ranges of rows."""

from __future__ import annotations

import torch
from torch import Tensor

from loratools.basetensors import BaseTensor, elements
from loratools.codecs.scheme_floats import CAST
from loratools.errors import NonFiniteError
from loratools.tensorfiles.inputs import FETCH_AGAIN


class PackedSource:
    """A packed weight, its parts mapped into memory, as a flat sequence of float32."""

    def __init__(self, tensor: BaseTensor) -> None:
        assert tensor.packed is not None
        self.name, self.scheme = tensor.name, tensor.packed.scheme
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

    def refuse_damaged(self, made: Tensor, start: int) -> None:
        """Raise NonFiniteError if the codes and scales behind a block make no numbers.

        Args:
            made: (rows, columns) what came of the elements from ``start`` on; only rows that are
                not finite are looked at.
            start: position of its first element.
        """
        if self.scheme == CAST:
            # Plain numbers, of which a base may hold infinite ones.
            return
        columns = made.shape[1]
        for row in (~torch.isfinite(made)).any(1).nonzero().flatten().tolist():
            first = start + row * columns
            stored = self.read(first, first + columns)
            if not bool(stored.isfinite().all()):
                kind = "NaN" if bool(stored.isnan().any()) else "infinite"
                raise NonFiniteError(
                    f"{self.name}: stored as {self.scheme}, but row {first // columns} is {kind}: "
                    "a scale is damaged",
                    hint=FETCH_AGAIN,
                )
