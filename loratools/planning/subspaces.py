"""The input directions that the adapters on one tensor act on."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

import torch
from torch import Tensor

from loratools.deltas import AdditiveDelta, ExpertLoRA
from loratools.planning.placement import Placement
from loratools.streaming.subspaces import Rounding

# A direction is one that another row gives too, or none, where less than this part of it is new.
_NEGLIGIBLE = 1e-5


def rounding_for(placements: Sequence[Placement], strength: float | None) -> Rounding:
    """Return how a tensor's codes are chosen; ``strength`` None rounds to nearest."""
    return Rounding(lambda device: input_bases(placements, device), strength)


def input_bases(placements: Sequence[Placement], device: str) -> list[Tensor]:
    """Return orthonormal columns (in, r) spanning all that the changes read of their inputs.

    One tensor for each matrix of a stack of experts; none where a change has no such directions
    (it is no low-rank product), lies the other way round in the base, or reads half of them all.
    """
    found = [_input_rows(placement) for placement in placements]
    if not found or any(rows is None for rows in found):
        return []
    stacks = [rows for rows in found if rows is not None]
    if len({len(rows) for rows in stacks}) != 1:
        return []
    joined = [torch.cat(rows).to(device, torch.float32) for rows in zip_longest(*stacks)]
    bases = [_orthonormal(rows) for rows in joined]
    # Adapters may read the same directions, so these are counted and not the rows.
    return [] if any(2 * basis.shape[1] > len(basis) for basis in bases) else bases


def _input_rows(placement: Placement) -> list[Tensor] | None:
    """Return the rows (r, in) whose span is the row space of each of the change's matrices."""
    delta = placement.delta
    if placement.part != "weight" or placement.transposed or placement.corner:
        return None
    if isinstance(delta, ExpertLoRA):
        return list(delta.down)
    plain = delta.low_rank() if isinstance(delta, AdditiveDelta) else None
    return None if plain is None else [plain.down.flatten(1)]


def _orthonormal(rows: Tensor) -> Tensor:
    # Lengths of rows are the adapter's matter: equal ones keep small directions from drowning.
    scaled = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    basis, triangle = torch.linalg.qr(scaled.T)
    # The triangle's diagonal would not do: behind a dependent row, others have parts along its
    # column too.
    turn, sizes, _ = torch.linalg.svd(triangle, full_matrices=False)
    kept: Tensor = basis @ turn[:, sizes > _NEGLIGIBLE * max(float(sizes.amax()), 1.0)]
    return kept.contiguous()
