"""Layout steps: what a change of naming does to the rows of a module's weight.

Only output rows ever move (``up``, biases, magnitudes per output): a fused projection's parts are
blocks of rows of one matrix, and a swap of shift and scale is a permutation of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from loratools.deltas import AdditiveDelta, FullDelta, LayerDelta, Replacement
from loratools.deltas.fusing import fuse_rows
from loratools.errors import MatchError, UnsupportedError
from loratools.keymaps.architecture import Fused, Row
from loratools.linalg.gram import product_inner

Parts = Mapping[int, LayerDelta]
"""What is known of a fused module: part number → its change."""

_SAME = 1e-4
"""Relative ‖ΔW − ΔW′‖ up to which two copies of a module are one (both rounded)."""


def is_swapped(row: Row | Fused | None, delta: LayerDelta) -> bool:
    """Return whether the original has the delta's two halves the other way round."""
    if not isinstance(row, Row) or row.order == "same":
        return False
    if row.order == "halves_swapped":
        return True
    width = _width(delta)
    widths = row.inputs if width is None else (width,)
    return delta.out_rows in [2 * width for width in widths]


def swap_halves(delta: LayerDelta) -> LayerDelta:
    """Return the delta with the two halves of its output rows exchanged."""
    rows = delta.out_rows
    if rows is None:
        return delta
    if rows % 2:
        raise MatchError(f"{rows} rows have no two halves to swap")
    return delta.permute_rows([*range(rows // 2, rows), *range(rows // 2)])


def in_diffusers_layout(row: Row | Fused | None, delta: LayerDelta) -> LayerDelta:
    """Return a change of the row's one module as diffusers stores that.

    Raises:
        MatchError: rows that do not divide as the row says.
    """
    if not isinstance(row, Row):
        return delta
    if row.vectors:
        size = math.prod(delta.weight_shape)
        if size % row.vectors:
            raise MatchError(f"{size} numbers are not {row.vectors} vectors")
        return _of_shape(delta, (row.vectors, size // row.vectors))
    if row.transposed and isinstance(delta, Replacement):
        return _turned(delta)
    return swap_halves(delta) if is_swapped(row, delta) else delta


def in_own_layout(row: Row | Fused, delta: LayerDelta) -> LayerDelta:
    """Return a change of one of diffusers' modules as the row's own dialect stores it."""
    if not isinstance(row, Row):
        return delta
    if row.vectors:
        return _of_shape(delta, (math.prod(delta.weight_shape),))
    if row.transposed and isinstance(delta, Replacement):
        return _turned(delta)
    return swap_halves(delta) if is_swapped(row, delta) else delta


def has_same_layout(one: Row | Fused | None, other: Row | Fused | None) -> bool:
    """Return whether two rows of a module store it alike; ``None`` is diffusers' way."""
    return _way(one) == _way(other)


def _way(row: Row | Fused | None) -> tuple[object, ...]:
    return (row.order, row.vectors, row.transposed) if isinstance(row, Row) else ("same", 0, False)


def _turned(delta: Replacement) -> Replacement:
    """Return a full tensor as (in, out); deltas are turned when they are folded."""
    return delta.map_tensors(lambda tensor: tensor.T.contiguous())


def _of_shape(delta: LayerDelta, shape: tuple[int, ...]) -> LayerDelta:
    if not isinstance(delta, FullDelta | Replacement):
        raise UnsupportedError(f"a {delta.kind} cannot be of a table of vectors")
    return delta.map_tensors(lambda tensor: tensor.reshape(shape))


def split_sizes(row: Fused, delta: LayerDelta) -> tuple[int, ...]:
    """Return how many rows of the fused change belong to each part.

    One each for a change that knows inputs alone, which every part has in full.

    Raises:
        MatchError: no division of these rows follows the row's rule.
    """
    if delta.out_rows is None:
        return (1,) * len(row.parts)
    total, width = delta.out_rows, _width(delta)
    sizes = _by_rule(row, total, width) or _by_typical(row, total)
    if not sizes or sum(sizes) != total or min(sizes) < 1:
        raise MatchError(f"{total} rows do not divide into {len(row.parts)} parts ({row.sizes})")
    return sizes


def split(row: Fused, delta: LayerDelta) -> list[LayerDelta | None]:
    """Return the parts' changes; ``None`` for a part that is not changed."""
    return delta.split_rows(split_sizes(row, delta))


@dataclass(frozen=True, slots=True)
class FusedSizes:
    """How many rows each part of a fused module has.

    ``assumed``: whether those of a missing part are the released models', for want of a base.
    """

    rows: tuple[int, ...]
    assumed: bool = False


def fuse_sizes(
    row: Fused, parts: Parts, *, total: int | None = None, sibling: Sequence[int] | None = None
) -> FusedSizes:
    """Return every part's rows, those of missing ones included.

    Args:
        row: the fused module.
        parts: the changes there are, at least one.
        total: the fused weight's rows, where a base tells.
        sibling: the sizes in another block of the same kind.

    Raises:
        UnsupportedError: nothing tells how large a missing part is.
    """
    present = {place: part.out_rows or 1 for place, part in parts.items()}
    if len(present) == len(row.parts):
        return FusedSizes(tuple(present[place] for place in sorted(present)))
    width = next((w for w in map(_width, parts.values()) if w is not None), None)
    told = _from_total(row, total, width), sibling, _from_present(row, present, width)
    for sizes in told:
        if sizes is not None and _agree(sizes, present):
            return FusedSizes(tuple(sizes))
    typical = _scaled(row.typical, width)
    if typical is not None and _agree(typical, present):
        return FusedSizes(typical, assumed=True)
    missing = [part for place, part in enumerate(row.parts) if place not in present]
    raise UnsupportedError(
        f"the adapter lacks {', '.join(missing)}, and nothing tells how many rows belong there",
        hint="name the base model, whose tensors tell",
    )


def fuse(row: Fused, parts: Parts, sizes: Sequence[int]) -> LayerDelta:
    """Return the parts' changes as one; missing parts are rows of zeros."""
    return fuse_rows([parts.get(place) for place in range(len(row.parts))], sizes)


def same_change(one: LayerDelta, other: LayerDelta) -> bool:
    """Return whether two deltas change a weight alike, up to the rounding of stored factors."""
    if one.weight_shape != other.weight_shape:
        return False
    if isinstance(one, AdditiveDelta) and isinstance(other, AdditiveDelta):
        return _distance(one, other) <= _SAME
    left, right = one.tensors(), other.tensors()
    return type(one) is type(other) and all(
        torch.equal(tensor, right[name]) for name, tensor in left.items()
    )


def _distance(one: AdditiveDelta, other: AdditiveDelta) -> float:
    """Return ‖ΔW − ΔW′‖ / ‖ΔW‖, from the factors where both have them."""
    left, right = one.low_rank(), other.low_rank()
    if left is None or right is None:
        left_dense, right_dense = one.materialize(), other.materialize()
        return float(torch.dist(left_dense, right_dense) / left_dense.norm())
    mixed = [
        a.scale * b.scale * product_inner(a.factors(), b.factors())
        for a, b in ((left, left), (left, right), (right, right))
    ]
    square = max(mixed[0] - 2 * mixed[1] + mixed[2], 0.0)
    return math.sqrt(square / mixed[0]) if mixed[0] else math.sqrt(mixed[2])


def _agree(sizes: Sequence[int], present: Mapping[int, int]) -> bool:
    return all(sizes[place] == rows for place, rows in present.items())


def _from_total(row: Fused, total: int | None, width: int | None) -> tuple[int, ...] | None:
    return None if total is None else _by_rule(row, total, width) or _by_typical(row, total)


def _by_rule(row: Fused, total: int, width: int | None) -> tuple[int, ...] | None:
    """Return the parts' rows by the row's rule, if the fused weight's size suffices for it."""
    count = len(row.parts)
    if isinstance(row.sizes, tuple):
        return row.sizes
    if row.sizes == "equal":
        return (total // count,) * count if total % count == 0 else None
    if width is None:
        return None
    if row.sizes == "inner":
        return (*(width,) * (count - 1), total - width * (count - 1))
    rest, left = divmod(total - width, count - 1)
    return (width, *(rest,) * (count - 1)) if left == 0 else None


def _by_typical(row: Fused, total: int) -> tuple[int, ...] | None:
    if not row.typical:
        return None
    return _scaled(row.typical, total / sum(row.typical))


def _from_present(
    row: Fused, present: Mapping[int, int], width: int | None
) -> tuple[int, ...] | None:
    """Return the sizes where the rule and the parts that are there suffice."""
    count = len(row.parts)
    rows = next(iter(present.values()))
    if isinstance(row.sizes, tuple):
        return row.sizes
    if row.sizes == "equal":
        return (rows,) * count
    if width is None:
        return None
    if row.sizes == "inner":
        last = present.get(count - 1)
        return None if last is None else (*(width,) * (count - 1), last)
    rest = [rows for place, rows in present.items() if place > 0]
    return (width, *rest[:1] * (count - 1)) if rest else None


def _scaled(typical: Sequence[float], width: float | None) -> tuple[int, ...] | None:
    """Return the typical sizes for an input width, if they come out as whole numbers."""
    if not typical or width is None:
        return None
    sizes = [width * share for share in typical]
    whole = tuple(round(size) for size in sizes)
    return (
        whole if all(abs(n - size) < 0.01 for n, size in zip(whole, sizes, strict=True)) else None
    )


def _width(delta: LayerDelta) -> int | None:
    """Return the number of inputs, where the delta has any."""
    shape = delta.weight_shape
    return shape[1] if len(shape) > 1 else None
