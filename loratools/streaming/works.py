"""What is to be done to one tensor of the output, and what doing it did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from loratools.basetensors import BaseTensor, elements
from loratools.codecs.packers import Packer
from loratools.deltas import RowFold
from loratools.streaming.residuals import Residual, ResidualWish
from loratools.streaming.stored import stored_bytes
from loratools.streaming.subspaces import Rounding

MakeFolds = Callable[[str], Sequence[RowFold]]


@dataclass(frozen=True, slots=True, eq=False)
class TensorWork:
    """One output tensor.

    Attributes:
        name: in the output.
        dtype: safetensors' word or ggml's type, in the output.
        shape: in the output.
        source: where its values start from; a smaller one is padded with zeros at the end of
            each dimension.
        folds: prepares the changes on a device, or ``None`` if there are none.
        rounding: how codes are chosen where the output has few bits; nearest, if not said.
        packer: codes a float source into a scheme of several stored tensors.
        whole: the packed weight that this stored tensor is a part of, if it is one.
        role: which part.
        residual: that what rounding to few bits leaves out is wanted, if it is.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    source: BaseTensor
    folds: MakeFolds | None = None
    rounding: Rounding | None = None
    packer: Packer | None = None
    whole: TensorWork | None = None
    role: str = ""
    residual: ResidualWish | None = None

    @property
    def elements(self) -> int:
        """Number of elements."""
        return elements(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the output."""
        if self.packer:
            fresh = self.packer.parts(self.shape, self.source.dtype).values()
            return sum(stored_bytes(part.dtype, part.shape) for part in fresh)
        if self.is_packed and self.source.packed:
            parts = self.source.packed.tensors.values()
            return sum(stored_bytes(part.dtype, part.shape) for part in parts)
        return stored_bytes(self.dtype, self.shape)

    @property
    def is_packed(self) -> bool:
        """Whether the output is several stored tensors."""
        own = self.source.packed is not None and self.dtype == self.source.packed.scheme
        return own or self.packer is not None

    @property
    def is_copy(self) -> bool:
        """Whether the output's bytes are the source's."""
        same = (self.dtype, self.shape) == (self.source.dtype, self.source.shape)
        own = (self.is_packed and self.packer is None) or (same and self.source.packed is None)
        return self.folds is None and own


@dataclass(frozen=True, slots=True)
class TensorResult:
    """What folding did to one tensor.

    Attributes:
        name: in the output.
        changed: whether any stored value differs from the source's.
        change_norm: ‖W' − W‖ before rounding.
        result_norm: ‖W'‖ before rounding.
        retained: ⟨Δ', Δ⟩/‖Δ‖², how much of the change Δ is left in what is stored, Δ', where the
            output has few bits; and so for what follows.
        subspace_error: ‖(Δ' − Δ)V‖/‖ΔV‖ on the inputs V that the adapters act on, if known.
        added_error: ‖Δ' − Δ‖/‖W'‖.
        codes_changed: share of the codes that differ, where they can be compared.
        residual: what rounding left out, where it was wanted.
    """

    name: str
    changed: bool
    change_norm: float
    result_norm: float
    retained: float | None = None
    subspace_error: float | None = None
    added_error: float | None = None
    codes_changed: float | None = None
    residual: Residual | None = field(default=None, compare=False)
