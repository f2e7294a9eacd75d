"""The contract of every parameterisation: what a layer's change can be asked to do.

Shapes are those of the layer's mathematics: a weight is (out, in[, k...]), whichever way a
checkpoint stores it. A weight that is stored transposed (GPT-2's Conv1D, embeddings) is described
by ``transposed=True``; the folds below then take rows of the stored matrix.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from loratools.errors import UnsupportedError

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
    def out_rows(self) -> int | None:
        """Number of output rows, unless only the base knows it."""
        return self.weight_shape[0]

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

    @property
    def changes_weight(self) -> bool:
        """Whether there is anything for the weight: a bias may be all that was trained."""
        return True

    @property
    def is_zero(self) -> bool:
        """Whether exact zeros in the stored tensors show that nothing changes."""
        return False

    def tensors(self) -> Mapping[str, Tensor]:
        """Return the stored tensors by field name; an inner delta's stand among them."""
        found: dict[str, Tensor] = {}
        for name, value in _fields(self):
            if isinstance(value, LayerDelta):
                found.update(value.tensors())
            elif isinstance(value, Tensor):
                found[name] = value
        return found

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Return a copy with ``function`` applied to every stored tensor (dtype, device)."""
        changes: dict[str, Any] = {}
        for name, value in _fields(self):
            if isinstance(value, LayerDelta):
                changes[name] = value.map_tensors(function)
            elif isinstance(value, Tensor):
                changes[name] = function(value)
        return replace(self, **changes)  # type: ignore[type-var]

    @abstractmethod
    def row_fold(
        self, strength: float, *, transposed: bool = False, device: str | torch.device = "cpu"
    ) -> RowFold:
        """Prepare strength·(W' − W) for folding into blocks of stored rows on ``device``."""

    def apply(self, weight: Tensor, strength: float = 1.0) -> Tensor:
        """Return W + strength·(W' − W) in float32 for a ``weight`` of shape ``weight_shape``."""
        fold = self.row_fold(strength, device=weight.device)
        rows = math.prod(weight.shape[: fold.leading])
        flat = weight.to(torch.float32).reshape(rows, -1).clone()
        fold.substitute(flat, 0)
        if fold.reach == "two-pass":
            fold.measure(flat, 0)
        change = torch.empty_like(flat)
        fold.add_change(change, flat, 0, first=True)
        return (flat + change).reshape(weight.shape)

    def norm(self) -> float | None:
        """Return ‖ΔW‖ (Frobenius), or ``None`` where it depends on the base weight."""
        return None

    # ── layout steps: the same change, seen from a base that lays its weights out otherwise ──

    def split_rows(self, sizes: Sequence[int]) -> list[LayerDelta | None]:
        """Return the changes of consecutive blocks of output rows, of ``sizes`` rows each.

        ``None`` stands for a block that the stored tensors show to be unchanged (a projection that
        was not trained), unless all of them are. Raises UnsupportedError where the rows of this
        parameterisation depend on each other.
        """
        if self.out_rows not in (None, sum(sizes)) or min(sizes, default=0) < 1:
            raise self.refusal(f"split into {list(sizes)} rows", "it has another number of rows")
        blocks = self.row_blocks(sizes)
        zero = [block.is_zero for block in blocks]
        if all(zero):
            return list(blocks)
        return [None if empty else block for block, empty in zip(blocks, zero, strict=True)]

    def permute_rows(self, order: Sequence[int] | Tensor) -> Self:
        """Return the delta of the weight ``W[order]``; raises UnsupportedError if there is none."""
        index = torch.as_tensor(order, dtype=torch.long)
        rows = len(index) if self.out_rows is None else self.out_rows
        if not torch.equal(index.sort().values, torch.arange(rows)):
            raise self.refusal("reordered", "the order does not name each of its rows once")
        return self.rows_in_order(index)

    def reshaped(self, weight_shape: Sequence[int]) -> Self:
        """Return the same change of a base weight of another shape, row for row.

        A convolution may be stored as a matrix and a matrix as a 1×1 convolution; deltas that know
        only one axis of their weight learn the others here. Raises UnsupportedError otherwise.
        """
        if tuple(weight_shape) != self.weight_shape:
            raise self.misfit(weight_shape)
        return self

    def row_blocks(self, sizes: Sequence[int]) -> Sequence[LayerDelta]:
        """Return what ``split_rows`` does, zero blocks included; ``sizes`` are checked."""
        raise self.refusal("split by rows", "its output rows depend on each other")

    def rows_in_order(self, order: Tensor) -> Self:
        """Return what ``permute_rows`` does; ``order`` is checked."""
        raise self.refusal("reordered", "its output rows depend on each other")

    @classmethod
    def fused(cls, parts: Sequence[Any], sizes: Sequence[int]) -> LayerDelta:
        """Return the delta of weights stacked by rows: the inverse of ``row_blocks``.

        ``parts`` are of this class, at least one is not ``None``, and ``None`` means rows that do
        not change. Raises UnsupportedError where this parameterisation cannot say so.
        """
        some = next(part for part in parts if part is not None)
        raise some.refusal("fused with others", "its output rows depend on each other")

    def refusal(self, action: str, reason: str, hint: str = "") -> UnsupportedError:
        """Return the error for a step that would not be exact."""
        return UnsupportedError(
            f"a {self.kind} delta of {self.weight_shape} cannot be {action}: {reason}",
            hint=hint or "merge it into its own base, and extract a LoRA from the difference",
        )

    def misfit(self, weight_shape: Sequence[int]) -> UnsupportedError:
        """Return the error for a weight of another shape."""
        return self.refusal(
            f"put on a weight of {tuple(weight_shape)}",
            "the shapes differ",
            "is this the base it was trained on?",
        )

    def is_same_matrix(self, weight_shape: Sequence[int]) -> bool:
        """Return whether the weight has the same rows, each of the same number of elements."""
        shape = self.weight_shape
        return weight_shape[0] == shape[0] and math.prod(weight_shape) == math.prod(shape)


# 2**18 elements, 1 MiB in float32, stay in a core's cache.
_BLOCK = 1 << 18


class AdditiveDelta(LayerDelta):
    """A delta whose ΔW = W' − W is known without W. Its folds reach ``rows``."""

    additive: ClassVar[bool] = True

    def materialize(self) -> Tensor:
        """Return ΔW, shaped ``weight_shape``, in float32."""
        change = torch.zeros(self.weight_shape).reshape(self.weight_shape[0], -1)
        self.row_fold(1.0).add_change(change, change, 0, first=True)
        return change.reshape(self.weight_shape)

    def norm(self) -> float:
        """Return ‖ΔW‖ (Frobenius), from one block of rows at a time."""
        rows = self.weight_shape[0]
        columns = math.prod(self.weight_shape[1:])
        step = max(1, _BLOCK // max(columns, 1))
        fold, squares = self.row_fold(1.0), 0.0
        block = torch.zeros(min(step, rows), columns)
        for start in range(0, rows, step):
            change = block[: rows - start]
            fold.add_change(change, change, start, first=True)
            wide = change.to(torch.float64).flatten()
            squares += float(torch.dot(wide, wide))
        return math.sqrt(squares)

    def row_blocks(self, sizes: Sequence[int]) -> Sequence[AdditiveDelta]:
        raise self.refusal("split by rows", "its output rows depend on each other")

    @classmethod
    def fused(cls, parts: Sequence[Any], sizes: Sequence[int]) -> AdditiveDelta:
        some = next(part for part in parts if part is not None)
        raise some.refusal("fused with others", "its output rows depend on each other")

    @abstractmethod
    def scaled(self, factor: float) -> Self:
        """Return the delta whose ΔW is ``factor``·ΔW."""

    def low_rank(self) -> LoRA | None:
        """Return the same ΔW as a plain LoRA, or ``None`` if none is exact.

        Its rank is the smallest that the parameterisation shows, which may exceed the weight's
        sides: callers decide whether the factors are worth having.
        """
        return None


def _fields(delta: Any) -> list[tuple[str, Any]]:
    """Return the name and value of every field of a delta, which is a dataclass."""
    return [(field.name, getattr(delta, field.name)) for field in fields(delta)]
