"""What llama.cpp's converters do to weights, as steps on LoRA factors that run both ways.

A step takes a list of changes to a list of changes: rows are moved and scaled on ``up``, columns
on ``down``; blocks of rows are split off and put together; experts are stacked. ``None`` stands
for a module that the adapter does not have. ``undo`` is the inverse, to the bit where no ranks had
to be added up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from loratools.deltas import ExpertLoRA, LayerDelta, LoRA
from loratools.deltas import rows as pieces
from loratools.errors import MatchError
from loratools.keymaps.gguf_factors import (
    Change,
    Parts,
    check_alike,
    equal_blocks,
    join_rows,
    like_present,
    padded,
    split_stack,
    trimmed,
    usual,
    with_columns,
    with_rows,
    with_scaled_rows,
)

Order = Callable[[int], Tensor]
"""Number of rows (or columns) → which of the checkpoint's stands at each place in GGUF."""


class Op(ABC):
    """One step of a layout, with its inverse."""

    @abstractmethod
    def do(self, parts: Parts) -> Parts:
        """Return the parts as GGUF has them."""

    @abstractmethod
    def undo(self, parts: Parts) -> Parts:
        """Return the parts as the checkpoint has them."""


class Each(Op):
    """A step on every part alone."""

    def do(self, parts: Parts) -> Parts:  # noqa: D102 - as in Op
        return [None if part is None else self.there(part) for part in parts]

    def undo(self, parts: Parts) -> Parts:  # noqa: D102 - as in Op
        return [None if part is None else self.back(part) for part in parts]

    @abstractmethod
    def there(self, part: Change) -> Change:
        """Return one part as GGUF has it."""

    @abstractmethod
    def back(self, part: Change) -> Change:
        """Return one part as the checkpoint has it."""


@dataclass(frozen=True, slots=True, eq=False)
class Rows(Each):
    """Moves output rows: GGUF's row n is the checkpoint's row ``order(rows)[n]``."""

    order: Order

    def there(self, part: Change) -> Change:  # noqa: D102
        return with_rows(part, self.order(part.weight_shape[-2]))

    def back(self, part: Change) -> Change:  # noqa: D102
        return with_rows(part, torch.argsort(self.order(part.weight_shape[-2])))


@dataclass(frozen=True, slots=True, eq=False)
class Columns(Each):
    """Moves input columns: GGUF's column n is the checkpoint's column ``order(rows)[n]``."""

    order: Order

    def there(self, part: Change) -> Change:  # noqa: D102
        return with_columns(part, self.order(part.weight_shape[-1]))

    def back(self, part: Change) -> Change:  # noqa: D102
        return with_columns(part, torch.argsort(self.order(part.weight_shape[-1])))


@dataclass(frozen=True, slots=True, eq=False)
class RowScale(Each):
    """Multiplies output rows by ``factors``."""

    factors: Callable[[int], Tensor]

    def there(self, part: Change) -> Change:  # noqa: D102
        return with_scaled_rows(part, self.factors(part.weight_shape[-2]))

    def back(self, part: Change) -> Change:  # noqa: D102
        return with_scaled_rows(part, 1.0 / self.factors(part.weight_shape[-2]))


@dataclass(frozen=True, slots=True)
class Scale(Each):
    """Multiplies the whole change."""

    factor: float

    def there(self, part: Change) -> Change:  # noqa: D102
        return part.scaled(self.factor)

    def back(self, part: Change) -> Change:  # noqa: D102
        return part.scaled(1.0 / self.factor)


@dataclass(frozen=True, slots=True)
class Turn(Each):
    """Transposes every matrix: the factors change places."""

    def there(self, part: Change) -> Change:  # noqa: D102
        return replace(part, down=part.up.mT, up=part.down.mT)

    def back(self, part: Change) -> Change:  # noqa: D102
        return self.there(part)


@dataclass(frozen=True, slots=True)
class Oriented(Each):
    """Settles which way round a stack of experts stands: (experts, out, in) from here on.

    PEFT up to 0.18 ran lora_A over the first axis of a stored expert, later versions over the last,
    and models store either (out, in) or (in, out). Shapes tell, but for squares.

    Attributes:
        size: outputs or inputs of an expert.
        axis: which of the two: 1 for outputs, 2 for inputs.
        turned: whether the base stores (in, out).
    """

    size: int
    axis: int
    turned: bool = False

    def there(self, part: Change) -> Change:  # noqa: D102
        if not isinstance(part, ExpertLoRA):
            return part
        shape = part.weight_shape
        square = shape[1] == shape[2]
        if self.size not in shape[1:]:
            raise MatchError(f"experts of {shape[1]}×{shape[2]}, and the base has {self.size}")
        turns = part.flipped_if_square != self.turned if square else shape[self.axis] != self.size
        plain = replace(part, flipped_if_square=False)
        return Turn().there(plain) if turns else plain

    def back(self, part: Change) -> Change:  # noqa: D102
        return Turn().there(part) if self.turned else part


@dataclass(frozen=True, slots=True)
class Split(Op):
    """Takes one part's output rows apart into blocks of ``sizes`` rows.

    Without sizes, the blocks are ``count`` equal ones.
    """

    sizes: tuple[int, ...] = ()
    count: int = 0

    def do(self, parts: Parts) -> Parts:  # noqa: D102
        (part,) = parts
        assert part is not None
        sizes = self.sizes or equal_blocks(part, self.count)
        if isinstance(part, ExpertLoRA):
            return split_stack(part, sizes)
        blocks: Sequence[LayerDelta | None] = part.split_rows(sizes)
        return [block for block in blocks if block is None or isinstance(block, LoRA)]

    def undo(self, parts: Parts) -> Parts:  # noqa: D102
        return [join_rows(parts, self.sizes or like_present(parts))]


@dataclass(frozen=True, slots=True)
class Fuse(Op):
    """Puts parts one below the other: the inverse of ``Split``."""

    sizes: tuple[int, ...]

    def do(self, parts: Parts) -> Parts:  # noqa: D102
        return Split(self.sizes).undo(parts)

    def undo(self, parts: Parts) -> Parts:  # noqa: D102
        return Split(self.sizes).do(parts)


@dataclass(frozen=True, slots=True)
class At(Op):
    """A step on the part number ``place`` only."""

    place: int
    op: Each | Heads

    def do(self, parts: Parts) -> Parts:  # noqa: D102
        return self._put(parts, self.op.do(parts[self.place : self.place + 1]))

    def undo(self, parts: Parts) -> Parts:  # noqa: D102
        return self._put(parts, self.op.undo(parts[self.place : self.place + 1]))

    def _put(self, parts: Parts, one: Parts) -> Parts:
        return [*parts[: self.place], *one, *parts[self.place + 1 :]]


@dataclass(frozen=True, slots=True)
class Heads(Op):
    """Makes a stack of ``count`` matrices of one matrix's consecutive blocks of rows."""

    count: int

    def do(self, parts: Parts) -> Parts:  # noqa: D102
        return [None if part is None else self._apart(part) for part in parts]

    def undo(self, parts: Parts) -> Parts:  # noqa: D102
        return [None if part is None else self._together(part) for part in parts]

    def _apart(self, part: Change) -> Change:
        up = part.up.reshape(self.count, -1, part.rank)
        return ExpertLoRA(part.down.expand(self.count, -1, -1), up, part.alpha)

    def _together(self, part: Change) -> Change:
        assert isinstance(part, ExpertLoRA)
        each = part.weight_shape[1]
        if all(pieces.same(part.down[0], down) for down in part.down[1:]):
            return LoRA(part.down[0], part.up.reshape(-1, part.rank), part.alpha)
        heads: Parts = [part.expert(number) for number in range(self.count)]
        return join_rows(heads, (each,) * self.count)


@dataclass(frozen=True, slots=True)
class Stack(Op):
    """Stacks the matrices of ``count`` experts; experts that are missing are zeros."""

    count: int

    def do(self, parts: Parts) -> Parts:  # noqa: D102
        present = [part for part in parts if isinstance(part, LoRA)]
        rank = max(part.rank for part in present)
        if len({(part.rank, part.alpha) for part in present}) > 1:
            alpha = usual([part.alpha for part in present])
            parts = [
                None if part is None else padded(part, rank, alpha)  # type: ignore[arg-type]
                for part in parts
            ]
            present = [part for part in parts if isinstance(part, LoRA)]
        check_alike(present)
        ones = (1,) * self.count
        down = pieces.stack_rows([None if p is None else p.down[None] for p in parts], ones)
        up = pieces.stack_rows([None if p is None else p.up[None] for p in parts], ones)
        return [ExpertLoRA(down, up, present[0].alpha)]

    def undo(self, parts: Parts) -> Parts:  # noqa: D102
        (part,) = parts
        assert isinstance(part, ExpertLoRA)
        if part.weight_shape[0] != self.count:
            raise MatchError(f"{part.weight_shape[0]} experts, and the base has {self.count}")
        return [trimmed(part.expert(number)) for number in range(self.count)]
