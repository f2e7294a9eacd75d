"""Pieces of the layout steps: blocks of rows taken apart and put together, factor by factor."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

P = TypeVar("P")
R = TypeVar("R")


def each(parts: Sequence[P | None], function: Callable[[P], R]) -> list[R | None]:
    """Return the function's value for every part, ``None`` for ``None``."""
    return [None if part is None else function(part) for part in parts]


def take(tensor: Tensor, index: Sequence[int] | Tensor, axis: int = 0) -> Tensor:
    """Return the chosen slices along an axis, as a view where they are consecutive."""
    order = torch.as_tensor(index, dtype=torch.long)
    first, count = int(order[0]), len(order)
    if torch.equal(order, torch.arange(first, first + count)):
        return tensor.narrow(axis, first, count)
    # Gathering is not implemented for 8-bit floats, of which bytes will do.
    raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    return raw.index_select(axis, order.to(tensor.device)).view(tensor.dtype)


def times(tensor: Tensor, factor: float) -> Tensor:
    """Return the tensor times a factor: in float32, or as stored where the factor is 1."""
    return tensor if factor == 1.0 else tensor.to(torch.float32) * factor


def is_zero(*factors: Tensor | None) -> bool:
    """Return whether any of the factors of a product is all zero."""
    return any(factor is not None and not _has_nonzero(factor) for factor in factors)


def _has_nonzero(factor: Tensor) -> bool:
    # One look at the first element spares nearly every pass over the whole tensor.
    first = factor.reshape(-1)[:1] if factor.is_contiguous() else factor
    return bool(_wide(first).any()) or bool(_wide(factor).any())


def same(one: Tensor | None, other: Tensor | None) -> bool:
    """Return whether two tensors agree in shape, dtype and every element."""
    if one is None or other is None:
        return one is other
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(torch.equal(_wide(one), _wide(other)))


def column_groups(up: Tensor, sizes: Sequence[int]) -> list[list[int]] | None:
    """Return the columns that belong to each block of rows of a block-diagonal (out, r) factor.

    ``None`` if a column has nonzero elements in more than one block, or nothing is nonzero.
    All-zero columns go with the ones before them.
    """
    blocks = _wide(up).flatten(1).split(list(sizes))
    used = torch.stack([(block != 0).any(dim=0) for block in blocks])
    if len(sizes) < 2 or bool((used.sum(dim=0) > 1).any()) or not bool(used.any()):
        return None
    groups: list[list[int]] = [[] for _ in sizes]
    owners = [int(column.nonzero()[0]) if bool(column.any()) else None for column in used.T]
    owner = next(found for found in owners if found is not None)
    for column, found in enumerate(owners):
        owner = owner if found is None else found
        groups[owner].append(column)
    return groups


def stack_rows(parts: Sequence[Tensor | None], sizes: Sequence[int]) -> Tensor:
    """Return the parts one below the other, with zeros for ``None``."""
    present = [part for part in parts if part is not None]
    dtype, rest = common_dtype(present), present[0].shape[1:]
    filled = [
        present[0].new_zeros((size, *rest), dtype=dtype) if part is None else part.to(dtype)
        for part, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat(filled)


def spread_columns(
    parts: Sequence[Tensor | None],
    sizes: Sequence[int],
    owners: Sequence[int | None],
    widths: Sequence[int],
) -> Tensor:
    """Return the parts one below the other, each in its owner's columns, zeros elsewhere.

    Args:
        parts: (rows, width[, 1...]) or ``None``.
        sizes: number of rows of each part.
        owners: which group of columns each part stands in.
        widths: number of columns of each group.
    """
    present = [part for part in parts if part is not None]
    dtype = common_dtype(present)
    result = present[0].new_zeros((sum(sizes), sum(widths), *present[0].shape[2:]), dtype=dtype)
    start = 0
    for part, size, owner in zip(parts, sizes, owners, strict=True):
        if part is not None and owner is not None:
            left = sum(widths[:owner])
            result[start : start + size, left : left + part.shape[1]] = part.to(dtype)
        start += size
    return result


def join(parts: Sequence[Tensor], axis: int = 0) -> Tensor:
    """Return the parts one behind the other, in a dtype that holds all of them."""
    dtype = common_dtype(parts)
    return torch.cat([part.to(dtype) for part in parts], dim=axis)


def common_scale(scales: Sequence[float]) -> float:
    """Return the scale that all parts have, or 1 where they differ and must be folded."""
    return scales[0] if scales[0] and len(set(scales)) == 1 else 1.0


def places(owners: Sequence[int | None]) -> list[int | None]:
    """Return owners numbered in order of appearance."""
    order = [owner for owner in dict.fromkeys(owners) if owner is not None]
    return each(owners, order.index)


def common_dtype(tensors: Sequence[Tensor]) -> torch.dtype:
    """Return the dtype that holds all of them; 8-bit floats promote with nothing but float32."""
    dtypes = {tensor.dtype for tensor in tensors}
    if len(dtypes) > 1 and any(dtype.itemsize == 1 for dtype in dtypes):
        return torch.float32
    return functools.reduce(torch.promote_types, dtypes)


def shared_groups(keys: Sequence[tuple[Tensor | None, ...] | None]) -> list[int | None]:
    """Return for each key the position of the first one equal to it, ``None`` for ``None``."""
    owners: list[int | None] = []
    for position, key in enumerate(keys):
        earlier = [owner for owner in dict.fromkeys(owners) if owner is not None]
        owners.append(None if key is None else _first_equal(key, keys, earlier, position))
    return owners


def _first_equal(
    key: tuple[Tensor | None, ...],
    keys: Sequence[tuple[Tensor | None, ...] | None],
    earlier: Sequence[int],
    position: int,
) -> int:
    for owner in earlier:
        other = keys[owner] or ()
        if all(same(one, two) for one, two in zip(key, other, strict=True)):
            return owner
    return position


def factor_permutation(order: Tensor, inner: int) -> tuple[Tensor, Tensor] | None:
    """Return (outer, inner) permutations that together are ``order``, or ``None``.

    Rows are numbered outer·inner + inner index: ``order[a·n + b] = outer[a]·n + within[b]``.
    """
    grid = order.reshape(-1, inner)
    outer, within = grid[:, 0] // inner, grid[0] % inner
    rebuilt = outer[:, None] * inner + within[None, :]
    return (outer, within) if torch.equal(grid, rebuilt) else None


def _wide(tensor: Tensor) -> Tensor:
    """Return 8-bit floats in float32, where comparisons are implemented; others as they are."""
    return tensor.to(torch.float32) if tensor.dtype.itemsize == 1 else tensor
