"""The input directions that adapters act on, and what rounding to few bits leaves of a change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from loratools.codecs.grid import Grid
from loratools.codecs.rounding import nearest_codes, shaped_codes, weight_of

MakeBases = Callable[[str], Sequence[Tensor]]

# Float32 ends at 3e38 and 1e-38: sums of squares near either end are taken again in float64.
_SMALL = 1e-30


@dataclass(frozen=True, slots=True, eq=False)
class Rounding:
    """How the codes of a touched tensor are chosen.

    Attributes:
        bases: makes, on a device, orthonormal columns (columns, r) that span the inputs which the
            adapters act on, one tensor for each matrix of a stack; none if they are unknown.
        strength: weight of the error along them against the whole (see ``weight_of``), or None
            to round to nearest.
    """

    bases: MakeBases
    strength: float | None = None


class Subspaces:
    """The bases of one tensor of ``rows`` rows: one for all of them, or one for each matrix."""

    def __init__(self, rounding: Rounding | None, rows: int, columns: int, device: str) -> None:
        found = list(rounding.bases(device)) if rounding else []
        fits = found and rows % len(found) == 0 and all(len(b) == columns for b in found)
        self.bases = found if fits else []
        self.height = rows // len(found) if fits else rows
        self.strength = rounding.strength if rounding and fits else None

    def parts(self, start: int, count: int) -> Iterator[tuple[slice, Tensor]]:
        """Yield the pieces of ``count`` rows from row ``start`` on that share a basis."""
        done = 0
        while self.bases and done < count:
            matrix, row = divmod(start + done, self.height)
            size = min(self.height - row, count - done)
            yield slice(done, done + size), self.bases[matrix]
            done += size

    def codes(self, target: Tensor, grid: Grid, start: int) -> Tensor:
        """Return the codes (rows, columns) for ``target``, whose first row is ``start``."""
        strength = self.strength
        if strength is None:
            return nearest_codes(target, grid)
        found = [
            shaped_codes(
                target[rows],
                grid.rows(rows.start, rows.stop),
                basis,
                weight_of(strength, basis),
            )
            for rows, basis in self.parts(start, len(target))
        ]
        return torch.cat(found) if len(found) != 1 else found[0]


class Losses:
    """Sums over blocks of what rounding did to a change."""

    def __init__(self, subspaces: Subspaces) -> None:
        self.subspaces = subspaces
        self.kept = self.made = self.added = self.inside = self.made_inside = 0.0
        self.codes = self.moved = 0

    def add(self, made: Tensor, error: Tensor, start: int) -> None:
        """Count a block of the change and of the rounding's error, (rows, columns)."""
        self.kept += dot(error, made)
        self.made += dot(made, made)
        self.added += dot(error, error)
        for rows, basis in self.subspaces.parts(start, len(made)):
            left, whole = error[rows] @ basis, made[rows] @ basis
            self.inside += dot(left, left)
            self.made_inside += dot(whole, whole)

    def count(self, before: Tensor, after: Tensor) -> None:
        """Count codes and those of them that changed."""
        self.codes += before.numel()
        self.moved += int((before != after).sum())

    @property
    def retained(self) -> float | None:
        """⟨Δ′, Δ⟩/‖Δ‖² of the stored change Δ′ = Δ + error."""
        return 1.0 + self.kept / self.made if self.made else None

    @property
    def subspace_error(self) -> float | None:
        """‖(Δ′ − Δ)V‖/‖ΔV‖ on the inputs V that the adapters act on."""
        return math.sqrt(self.inside / self.made_inside) if self.made_inside else None

    def added_error(self, norm: float) -> float | None:
        """‖Δ′ − Δ‖/‖W′‖ for a weight of this norm."""
        return math.sqrt(self.added) / norm if norm else None

    @property
    def codes_changed(self) -> float | None:
        """Share of the codes that are not the source's, where codes can be compared."""
        return self.moved / self.codes if self.codes else None


def dot(one: Tensor, other: Tensor) -> float:
    """Return the sum of the products of two blocks' elements; squares may exceed float32."""
    flat, same = one.flatten(), other.flatten()
    found = float(torch.dot(flat, same))
    if math.isfinite(found) and abs(found) > _SMALL:
        return found
    # On the CPU, since not every device knows float64.
    return float(torch.dot(flat.cpu().to(torch.float64), same.cpu().to(torch.float64)))
