"""Whole weights between a checkpoint's layout and GGUF's: which number goes where.

The steps of ``gguf_ops`` are written for LoRA factors. A weight whose rows and columns are numbered
is such a product too: ``up`` holds the numbers of the rows, ``down`` those of the columns. Sent
through the steps, the numbers say where every row and column came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.deltas import ExpertLoRA, LoRA
from loratools.errors import MatchError, UnsupportedError
from loratools.keymaps.gguf_base import GGUFBase
from loratools.keymaps.gguf_factors import Parts
from loratools.keymaps.gguf_model import Step
from loratools.keymaps.gguf_ops import Columns, Op, Turn
from loratools.keymaps.gguf_to import ops_of

_ROW, _ONE, _PART, _COLUMN, _ALSO = range(5)
"""Ranks: a row's number, 1, its tensor's number; a column's number, 1. Numbers count from 1."""

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class Gather:
    """Where the numbers of a tensor come from: out[r, c] = factor[r] · source[row[r], column[c]].

    Stacks count their rows through all matrices, in sources as in the result.

    Attributes:
        shape: of the result.
        part: (rows,) which source.
        row: (rows,) of the source; of its columns, where turned.
        column: (columns,) of the source, or ``None``: as they are; where turned,
            (matrices, columns) of the source's rows.
        factor: (rows,), or ``None``: 1.
        turned: whether matrices are transposed.
    """

    shape: Shape
    part: Tensor
    row: Tensor
    column: Tensor | None = None
    factor: Tensor | None = None
    turned: bool = False

    @property
    def is_copy(self) -> bool:
        """Whether the result is the one source as it stands."""
        plain = self.column is None and self.factor is None and not self.turned
        return plain and torch.equal(self.row, torch.arange(len(self.row))) and not self.part.any()


def gather_weights(
    step: Step,
    base: GGUFBase,
    block: int | None,
    shapes: Sequence[Shape],
    *,
    undo: bool = False,
    turned: bool = False,
) -> list[Gather]:
    """Return where the tensors on the other side of a row's layout come from.

    Args:
        step: the row.
        base: its hyper-parameters.
        block: number of the block.
        shapes: of the tensors on this side, in the row's order, those of all experts.
        undo: from GGUF to the checkpoint.
        turned: whether the checkpoint stores the weights as (in, out).

    Raises:
        MatchError: shapes that the layout does not fit.
        UnsupportedError: a layout that no gathering of rows expresses.
    """
    vectors = all(len(shape) == 1 for shape in shapes)
    ops = ops_of(step, base, block, shapes[0][0] if undo and step.stacks else 0)
    ops = tuple(op for op in ops if not isinstance(op, (Columns, Turn))) if vectors else ops
    ends: tuple[Op, ...] = (Turn(),) if turned and not vectors else ()
    parts: Parts = [_numbered(shape, place) for place, shape in enumerate(shapes)]
    for op in reversed((*ends, *ops)) if undo else (*ends, *ops):
        parts = op.undo(parts) if undo else op.do(parts)
    found = [_read(part) for part in parts]
    return [_as_vector(one) for one in found] if vectors else found


def _numbered(shape: Shape, place: int) -> LoRA | ExpertLoRA:
    """Return a change of a weight's shape whose factors number its rows and columns."""
    *stack, rows, columns = shape if len(shape) > 1 else (*shape, 1)
    count = stack[0] if stack else 1
    if len(stack) > 1:
        raise UnsupportedError(f"a tensor of {len(shape)} dimensions, {shape}")
    up = torch.zeros(count, rows, 5, dtype=torch.float64)
    down = torch.zeros(count, 5, columns, dtype=torch.float64)
    up[..., _ROW] = torch.arange(1, count * rows + 1).view(count, rows)
    up[..., _ONE], up[..., _PART] = 1, place + 1
    down[:, _COLUMN], down[:, _ALSO] = torch.arange(1, columns + 1), 1
    return ExpertLoRA(down, up, 5.0) if stack else LoRA(down[0], up[0], 5.0)


def _read(part: LoRA | ExpertLoRA | None) -> Gather:
    """Return what the numbers say after all steps."""
    if part is None or part.rank != 5:
        raise UnsupportedError(
            "the layout joins weights in a way that only their low-rank changes survive"
        )
    up = part.up.double().view(-1, *part.up.shape[-2:])
    down = part.down.double().view(-1, *part.down.shape[-2:]).mT
    turned = not bool(up[..., _ONE].any())
    own, other = (down, up) if turned else (up, down)
    number, one, place = (own[..., slot] for slot in (_ROW, _ONE, _PART))
    if not bool(one.all()):
        raise MatchError("a part of it is not there")
    column = (other[..., _COLUMN] / other[..., _ALSO]).round().long() - 1
    row = (number / one).round().long() - 1
    source = (place / one).round().long() - 1
    along, across = (other[..., _ALSO], one) if turned else (one, other[..., _ALSO])
    _check_even(across)
    factor = part.scale * along * across[:, :1]
    shape = part.weight_shape
    if turned:
        return Gather(shape, *_turned(source, column, row), _unless_one(factor), turned=True)
    plain = torch.equal(column, torch.arange(column.shape[1]).expand_as(column))
    if not plain and not torch.equal(column, column[:1].expand_as(column)):
        raise UnsupportedError("the columns of one stack stand in several orders")
    columns = None if plain else column[0]
    return Gather(shape, source.flatten(), row.flatten(), columns, _unless_one(factor))


def _turned(source: Tensor, column: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the source of every row, its column there, and the source's rows of each matrix."""
    if not torch.equal(source, source[:, :1].expand_as(source)):
        raise UnsupportedError("a transposed matrix is put together from several tensors")
    return source[:, :1].expand_as(column).flatten(), column.flatten(), row


def _check_even(ones: Tensor) -> None:
    if not torch.equal(ones, ones[:, :1].expand_as(ones)):
        raise UnsupportedError("the layout multiplies columns by different factors")


def _unless_one(factor: Tensor) -> Tensor | None:
    flat = factor.flatten().to(torch.float32)
    return None if bool((flat == 1).all()) else flat


def _as_vector(gather: Gather) -> Gather:
    return Gather(gather.shape[:-1], gather.part, gather.row, None, gather.factor)
