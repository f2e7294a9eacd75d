"""Refusing adapters with values that are no numbers, before anything is done with them."""

from __future__ import annotations

import math

import torch

from loratools.adapter import Adapter
from loratools.errors import NonFiniteError

_CHUNK = 1 << 22


def check_finite(adapter: Adapter, source: str) -> None:
    """Raise NonFiniteError naming the first tensor that holds NaN or infinity."""
    for name, tensor in adapter.named_tensors():
        # In chunks: a replaced embedding may be as large as a gigabyte.
        for chunk in torch.split(tensor.flatten(), _CHUNK):
            # A sum is finite only if its terms are, and takes a thirtieth of looking at each.
            wide = chunk.float() if chunk.element_size() == 1 else chunk
            total = float(wide.sum(dtype=torch.float32))
            if not math.isfinite(total) and not bool(torch.isfinite(wide).all()):
                kind = "NaN" if bool(torch.isnan(wide).any()) else "infinity"
                raise NonFiniteError(
                    f"{source}: {name} holds {kind}",
                    hint="training diverged or the file is damaged; use an earlier checkpoint",
                )
