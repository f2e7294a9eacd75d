"""The contract of every parameterisation: what a layer's change can be asked to do.

Shapes are those of the layer's mathematics: a weight is (out, in[, k...]), whichever way a
checkpoint stores it. A weight that is stored transposed (GPT-2's Conv1D, embeddings) is described
by ``transposed=True``; the folds below then take rows of the stored matrix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing_extensions import Self

    from loratools.deltas.lora import LoRA

Reach = Literal["rows", "two-pass", "whole"]
"""How much of a weight a fold must see: only its own rows; all rows once beforehand, to measure
them; or the whole matrix as a single block."""


class RowFold(ABC):
    """A delta prepared for one weight matrix, folded in a block of stored rows at a time.

    Blocks are float32, two-dimensional and on the fold's device: rows ``start`` to
    ``start + len(block)`` of the stored weight, its ``leading`` dimensions flattened into rows and
    the others into columns.
    """

    reach: Reach = "rows"
    leading: int = 1
    """How many leading dimensions of the stored weight count as its rows (2: stacked matrices)."""

    substitutes: bool = False
    """Whether ``substitute`` does anything."""

    def measure(self, weight: Tensor, start: int) -> None:
        """See a block of the base weight before folding begins (``two-pass`` only)."""

    def substitute(self, weight: Tensor, start: int) -> None:
        """Replace, in place, the rows of the block whose base value this fold overrides."""

    @abstractmethod
    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        """Add W' − W of the block to ``change``; if ``first``, overwrite it (it is undefined)."""


def accumulate(change: Tensor, addend: Tensor, *, first: bool) -> None:
    """Set ``change`` to ``addend``, or add it, in place."""
    if first:
        change.copy_(addend)
    else:
        change.add_(addend)


class ShiftFold(RowFold):
    """Adds a vector, (n,) in float32, to a weight of n rows: a bias."""

    def __init__(self, shift: Tensor) -> None:
        self.shift = shift

    def add_change(self, change: Tensor, weight: Tensor, start: int, *, first: bool) -> None:
        rows = self.shift[start : start + len(change)]
        accumulate(change, rows.reshape(change.shape), first=first)


class LayerDelta(ABC):
    """One layer's change, as a frozen value holding the stored tensors."""

    kind: ClassVar[str]
    """The parameterisation's name, as ``formats`` and reports use it."""

    additive: ClassVar[bool] = False
    """Whether W' − W does not depend on W."""

    @property
    @abstractmethod
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the base weight in mathematical order: (out, in[, k...])."""

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """What the adapted parameter may be called inside its module, in order of trial.

        The empty name means that the module path is itself the parameter's name.
        """
        return ("weight", "")

    @property
    def stored_transposed(self) -> bool | None:
        """Whether the base stores (in, out): known for some layer kinds, else ``None``."""
        return None

    @property
    def obstacle(self) -> str | None:
        """Why this delta cannot be folded into any original base, if so."""
        return None

    @property
    def bias_change(self) -> Tensor | None:
        """What the delta adds to the layer's bias, (out,) in float32, if anything."""
        return None

    @abstractmethod
    def tensors(self) -> Mapping[str, Tensor]:
        """Return the stored tensors by field name."""

    @abstractmethod
    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with ``function`` applied to every stored tensor (dtype, device)."""

    @abstractmethod
    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        """Prepare strength·(W' − W) for folding into blocks of stored rows on ``device``."""

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Return W + strength·(W' − W) in float32 for a ``weight`` of shape ``weight_shape``."""
        flat = weight.to(torch.float32).reshape(weight.shape[0], -1).clone()
        fold = self.row_fold(strength, device=weight.device)
        fold.substitute(flat, 0)
        if fold.reach == "two-pass":
            fold.measure(flat, 0)
        change = torch.empty_like(flat)
        fold.add_change(change, flat, 0, first=True)
        return (flat + change).reshape(weight.shape)

    @abstractmethod
    def norm(self) -> float | None:
        """Return ‖ΔW‖ (Frobenius), or ``None`` where it depends on the base weight."""


class AdditiveDelta(LayerDelta):
    """A delta whose ΔW = W' − W is known without W."""

    additive: ClassVar[bool] = True

    @abstractmethod
    def materialize(self) -> Tensor:
        """Return ΔW, shaped ``weight_shape``, in float32."""

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """Return the delta whose ΔW is ``factor``·ΔW."""

    @abstractmethod
    def low_rank(self) -> LoRA | None:
        """Return the same ΔW as a plain LoRA, or ``None`` if none is exact."""
