"""Several deltas on stacked rows as one: the inverse of ``LayerDelta.split_rows``."""

from __future__ import annotations

from collections.abc import Sequence

from loratools.deltas.base import AdditiveDelta, LayerDelta
from loratools.deltas.sums import SumDelta


def fuse_rows(parts: Sequence[LayerDelta | None], sizes: Sequence[int]) -> LayerDelta:
    """Return the delta of the weight whose blocks of rows the parts change.

    Parts that share an input-side factor share it in the result; others stand side by side, so
    that ranks add up; scales that differ are folded into the rows. What has no exact fused form of
    its own kind becomes a LoRA, and additive parts of several kinds become a sum.

    Args:
        parts: one for each block; ``None`` where nothing changes, but not everywhere.
        sizes: number of rows of each block.

    Raises:
        UnsupportedError: parts that one delta cannot express.
    """
    present = [part for part in parts if part is not None]
    first = next((part for part in present if part.changes_weight), present[0])
    fitted = [
        None if part is None else _fitted(part, (size, *first.weight_shape[1:]))
        for part, size in zip(parts, sizes, strict=True)
    ]
    kinds = {type(part) for part in present}
    if len(kinds) == 1:
        return kinds.pop().fused(fitted, sizes)
    additive = [part for part in fitted if part is None or isinstance(part, AdditiveDelta)]
    if len(additive) == len(fitted):
        return SumDelta.fused(additive, sizes)
    words = ", ".join(sorted(part.kind for part in present))
    raise first.refusal("fused with others", f"they are of kinds that do not add up: {words}")


def _fitted(part: LayerDelta, wanted: tuple[int, ...]) -> LayerDelta:
    """Return the part with its rows counted and its columns shaped as the first one's."""
    if part.out_rows not in (None, wanted[0]):
        raise part.refusal(f"fused as {wanted[0]} rows", "it has another number of rows")
    if not part.changes_weight or part.weight_shape[1:] == wanted[1:]:
        return part
    return part.reshaped(wanted)
