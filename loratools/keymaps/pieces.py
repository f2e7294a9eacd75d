"""The changes of an adapter as pieces: each knows which of diffusers' modules it is about."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from loratools.deltas import LayerDelta
from loratools.errors import MatchError
from loratools.keymaps import layout
from loratools.keymaps.architecture import Fused, Row
from loratools.keymaps.vocabulary import Hit


@dataclass(slots=True)
class Piece:
    """A change of one or several of diffusers' modules, on its way."""

    source: str
    hit: Hit
    delta: LayerDelta

    def expanded(self) -> Iterator[tuple[str, Piece]]:
        """Yield each module of diffusers' with its own change, its rows in diffusers' order."""
        row, paths = self.hit.row, self.hit.paths
        parts: Sequence[LayerDelta | None] = [self.delta]
        if isinstance(row, Fused):
            parts = layout.split(row, self.delta)
        else:
            parts = [layout.in_diffusers_layout(row, self.delta)]
        for path, part in zip(paths, parts, strict=True):
            if part is not None:
                hit = Hit(self.hit.component, (path,), None, {}, path)
                yield path, Piece(self.source, hit, part)


def distinct(pieces: Iterable[Piece], notes: list[str]) -> list[Piece]:
    """Return the pieces without second copies of a module (files that hold qkv and q, k, v).

    Appends what was left out to ``notes``. Raises MatchError where two copies differ.
    """
    claimed: dict[tuple[str, str], Piece] = {}
    kept: list[Piece] = []
    for piece in pieces:
        keys = [(piece.hit.component.name, path) for path in piece.hit.paths]
        if any(key in claimed for key in keys):
            kept += _without_copies(piece, claimed, notes)
        else:
            kept.append(piece)
            claimed.update((key, piece) for key in keys)
    return kept


def _without_copies(
    piece: Piece, claimed: dict[tuple[str, str], Piece], notes: list[str]
) -> Iterator[Piece]:
    for path, part in piece.expanded():
        first = claimed.setdefault((piece.hit.component.name, path), part)
        if first is part:
            yield part
            continue
        other = dict(first.expanded()).get(path)
        if other is None or not layout.same_change(other.delta, part.delta):
            raise MatchError(
                f"{piece.source} and {first.source} change the same module ({path}) differently",
                hint="remove one of them",
            )
        notes.append(f"{piece.source}: the same change as in {first.source}; kept once")


def is_same_layout(hit: Hit, row: Row | Fused) -> bool:
    """Return whether source and target hold the same modules in one weight."""
    if hit.row is None or isinstance(hit.row, Row):
        return isinstance(row, Row)
    return isinstance(row, Fused) and (row.parts, row.sizes) == (hit.row.parts, hit.row.sizes)


def reordered(piece: Piece, row: Row | Fused) -> Piece:
    """Return the piece with its halves and its shape as the target's row has them."""
    if layout.has_same_layout(piece.hit.row, row):
        return piece
    ours = layout.in_diffusers_layout(piece.hit.row, piece.delta)
    return replace(piece, delta=layout.in_own_layout(row, ours))
