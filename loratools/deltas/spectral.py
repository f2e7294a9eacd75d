"""Between deltas and singular values: the SVD of a change, and a LoRA from an SVD."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from loratools.deltas.base import AdditiveDelta
from loratools.deltas.lora import LoRA, Role
from loratools.linalg.factored import SVD, factored_svd


def delta_svd(delta: AdditiveDelta, device: str | torch.device = "cpu") -> SVD:
    """Return the SVD of ΔW as a matrix (out, in·k...), in float32, scale included.

    From the factors, in float64, where an exact low-rank view has fewer columns than the matrix
    has sides, else from the dense matrix.
    """
    rows, columns = matrix_shape(delta)
    plain = factored_view(delta)
    if plain is not None:
        up, down = (factor.to(torch.float64) for factor in plain.factors(device))
        found = factored_svd(up * plain.scale, down)
        return SVD(found.left.float(), found.values.float(), found.right.float())
    dense = delta.materialize().to(device).reshape(rows, columns)
    return SVD(*torch.linalg.svd(dense, full_matrices=False))


def matrix_shape(delta: AdditiveDelta) -> tuple[int, int]:
    """Return (out, in·k...): the matrix whose singular values a layer is said to have."""
    out, *rest = delta.weight_shape
    return out, math.prod(rest)


def factored_view(delta: AdditiveDelta) -> LoRA | None:
    """Return the exact low-rank view, unless the dense matrix is no larger a problem.

    A stored LoRA is always taken at its factors.
    """
    if isinstance(delta, LoRA):
        return delta
    plain = delta.low_rank()
    return plain if plain is not None and plain.rank < min(matrix_shape(delta)) else None


def lora_from_svd(
    found: SVD,
    weight_shape: Sequence[int],
    *,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    balanced: bool = True,
    role: Role = "linear",
) -> LoRA:
    """Return the LoRA with ΔW = U·S·V, all triplets of ``found`` kept.

    Args:
        found: (out, k), (k,) and (k, in·k...).
        weight_shape: (out, in[, k...]); a convolution gets ``up`` (out, k, 1...).
        scale: alpha / rank of the result, not 0; the factors are divided by it.
        dtype: of the stored factors.
        balanced: √S on both sides (both factors stay small: float16 holds them); else all in up.
        role: of the layer.
    """
    rank = found.values.shape[-1]
    root = (found.values / abs(scale)).sqrt() if balanced else None
    up = found.left * (root if root is not None else found.values / abs(scale))
    down = found.right if root is None else root.unsqueeze(-1) * found.right
    out, *rest = weight_shape
    sign = -1.0 if scale < 0 else 1.0
    return LoRA(
        down.reshape(rank, *rest).to(dtype).cpu().contiguous(),
        (sign * up).reshape(out, rank, *[1] * (len(rest) - 1)).to(dtype).cpu().contiguous(),
        scale * rank,
        role=role,
    )
