"""Short rows of one number per sub-block: numpy arrays on a CPU, torch tensors elsewhere.

A search does two dozen operations on such rows for every pass over the weights. numpy starts each
several times faster than torch, and both spell arithmetic and comparison alike; what they do not
spell alike is here.
"""

from __future__ import annotations

import math
import threading
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Column: TypeAlias = Any
"""A numpy array that shares its memory with a CPU tensor, or a tensor of another device: (n,),
or several of them, (m, n)."""


def as_column(values: Tensor) -> Column:
    """Return ``values``, of any shape, as columns in the same memory."""
    return values.numpy() if values.device.type == "cpu" else values


def in_order_sum(values: Column, out: Column) -> None:
    """Fill ``out`` with the sum of ``values`` over their first axis, added from first to last."""
    if isinstance(out, np.ndarray) and out.size > 1:
        # numpy adds whole rows one after the other; only a single column is summed in pairs.
        np.add.reduce(values, axis=0, out=out)
        return
    out[:] = values[0]
    for row in values[1:]:
        out += row


def ratio(numerator: float, denominator: Column, out: Column) -> None:
    """Fill ``out`` with the correctly rounded quotients of a float32 number and a column."""
    if isinstance(out, np.ndarray):
        np.divide(np.float32(numerator), denominator, out=out)
    else:
        # Not `numerator / denominator`, which torch computes with a reciprocal.
        torch.div(denominator.new_full((), numerator), denominator, out=out)


def replace(target: Column, mask: Column, values: Column | float) -> None:
    """Write ``values``, of the same shape or one number, into ``target`` (n,) where ``mask`` is."""
    if isinstance(target, np.ndarray):
        np.putmask(target, mask, values)
    else:
        target.copy_(torch.where(mask, values, target))


def borrow(like: Tensor, *shape: int) -> Tensor:
    """Return uninitialised memory on the device of ``like``: on a CPU, the calling thread's own.

    It is good until the thread borrows again. Asking the system for megabytes at every call, and
    touching them for the first time, would cost a tenth of a search.
    """
    if like.device.type != "cpu":
        return like.new_empty(shape)
    count = math.prod(shape)
    if len(_kept.memory) < count:
        _kept.memory = torch.empty(count)
    return _kept.memory[:count].view(shape)


class _Kept(threading.local):
    """What a thread keeps between searches."""

    def __init__(self) -> None:
        self.memory = torch.empty(0)


_kept = _Kept()
