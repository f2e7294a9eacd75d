"""What torch leaves out for the 8-bit floats: whether they are finite, and what holds them."""

from __future__ import annotations

import torch
from torch import Tensor


def is_finite(tensor: Tensor) -> bool:
    """Return whether no element is NaN or infinity, for every dtype (``isfinite`` has gaps)."""
    return bool(torch.isfinite(widened(tensor)).all())


def joint_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """Return a dtype that holds every value of all of these exactly; theirs, if they are alike."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    first, *others = map(_wide, dtypes)
    for other in others:
        first = torch.promote_types(first, other)
    return first


def widened(tensor: Tensor) -> Tensor:
    """Return 8-bit floats in bfloat16, which holds them exactly; any other tensor as it is."""
    return tensor.to(_wide(tensor.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    small = dtype.is_floating_point and dtype.itemsize == 1
    return torch.bfloat16 if small else dtype
