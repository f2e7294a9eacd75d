"""Tucker-decomposed convolutions as products of two matrices."""

from __future__ import annotations

import torch
from torch import Tensor


def contract_core(core: Tensor, inner: Tensor) -> Tensor:
    """Return (n, in, k...) = Σₘ core[n, m, k...] · inner[m, in], in float32."""
    wide = core.to(torch.float32)
    return torch.einsum("nm...,mi->ni...", wide, inner.to(torch.float32).flatten(1))
