"""What GGUF's layout steps do to the factors of a LoRA or a stack of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from loratools.deltas import ExpertLoRA, LoRA
from loratools.deltas import rows as pieces
from loratools.deltas.fusing import fuse_rows
from loratools.errors import MatchError, UnsupportedError

Change = LoRA | ExpertLoRA
Parts = list[LoRA | ExpertLoRA | None]


def with_rows(part: Change, order: Tensor) -> Change:
    """Return the change with its output rows in another order."""
    return replace(part, up=pieces.take(part.up, order, axis=part.up.dim() - 2))


def with_columns(part: Change, order: Tensor) -> Change:
    """Return the change with its input columns in another order."""
    return replace(part, down=pieces.take(part.down, order, axis=part.down.dim() - 1))


def with_scaled_rows(part: Change, factors: Tensor) -> Change:
    """Return the change with each output row multiplied; signs keep the dtype."""
    signs_only = bool((factors.abs() == 1).all())
    up = part.up if signs_only else part.up.to(torch.float32)
    return replace(part, up=up * factors[:, None].to(up.dtype))


def equal_blocks(part: Change, count: int) -> tuple[int, ...]:
    """Return the sizes of ``count`` equal blocks of output rows; raises MatchError."""
    each, odd = divmod(part.weight_shape[-2], count)
    if odd:
        raise MatchError(f"{part.weight_shape[-2]} rows are not {count} equal blocks")
    return (each,) * count


def like_present(parts: Parts) -> tuple[int, ...]:
    """Return as many rows for every part as the ones there have."""
    size = next(part.weight_shape[-2] for part in parts if part is not None)
    return (size,) * len(parts)


def join_rows(parts: Parts, sizes: Sequence[int]) -> Change:
    """Return the parts one below the other, ``None`` as rows of zeros.

    Raises MatchError for parts of other sizes.
    """
    for part, size in zip(parts, sizes, strict=True):
        if part is not None and part.weight_shape[-2] != size:
            raise MatchError(f"{part.weight_shape[-2]} rows where the base has {size}")
    if any(isinstance(part, ExpertLoRA) for part in parts):
        return _join_stacks(parts, sizes)
    fused = fuse_rows(parts, sizes)
    assert isinstance(fused, LoRA)
    return fused


def split_stack(part: ExpertLoRA, sizes: Sequence[int]) -> Parts:
    """Return the blocks of output rows of every expert; ``None`` for those that are zero."""
    if part.weight_shape[1] != sum(sizes):
        raise MatchError(f"{part.weight_shape[1]} rows where the base has {sum(sizes)}")
    ups = part.up.split(list(sizes), dim=1)
    used = [(up != 0).any(dim=0).any(dim=0) for up in ups]
    apart = not bool((torch.stack(used).sum(dim=0) > 1).any())
    blocks: Parts = []
    for up, own in zip(ups, used, strict=True):
        keep = own if apart and bool(own.any()) and not bool(own.all()) else torch.ones_like(own)
        count = int(keep.sum())
        block = ExpertLoRA(part.down[:, keep], up[..., keep], part.scale * count)
        whole = replace(part, up=up) if count == part.rank else block
        blocks.append(whole if bool(own.any()) else None)
    if all(block is None for block in blocks):
        return [replace(part, up=up) for up in ups]
    return blocks


def _join_stacks(parts: Parts, sizes: Sequence[int]) -> ExpertLoRA:
    present = [part for part in parts if isinstance(part, ExpertLoRA)]
    first = present[0]
    owners = pieces.shared_groups(
        [(part.down,) if isinstance(part, ExpertLoRA) else None for part in parts]
    )
    heads = [part for n, part in enumerate(parts) if part is not None and owners[n] == n]
    scale = pieces.common_scale([part.scale for part in present])
    widths = [head.rank for head in heads]
    places = pieces.places(owners)
    ups = [None if part is None else pieces.times(part.up, part.scale / scale) for part in parts]
    experts = first.weight_shape[0]
    stacked = torch.stack(
        [
            pieces.spread_columns(
                [None if up is None else up[number] for up in ups], sizes, places, widths
            )
            for number in range(experts)
        ]
    )
    downs = pieces.join([head.down for head in heads], axis=1)
    return ExpertLoRA(downs, stacked, scale * sum(widths))


def usual(values: Sequence[float]) -> float:
    """Return the most frequent value."""
    return max(values, key=values.count)


def padded(part: LoRA, rank: int, alpha: float) -> LoRA:
    """Return the LoRA with zeros up to a rank, its scale folded so that ``alpha`` is right."""
    wanted = alpha / rank if alpha else 1.0
    up = pieces.times(part.up, part.scale / wanted)
    more = rank - part.rank
    return LoRA(
        torch.nn.functional.pad(part.down, (0, 0, 0, more)),
        torch.nn.functional.pad(up, (0, more)),
        alpha or float(rank),
    )


def trimmed(part: LoRA) -> LoRA | None:
    """Return the LoRA without ranks that are zero in both factors; ``None`` if all are."""
    used = (part.down != 0).any(dim=1) | (part.up != 0).any(dim=0)
    if bool(used.all()):
        return part
    if not bool(used.any()):
        return None
    last = int(used.nonzero().max()) + 1
    return LoRA(part.down[:last], part.up[:, :last], part.scale * last)


def check_alike(parts: Sequence[LoRA]) -> None:
    """Raise UnsupportedError for experts of different shapes."""
    shapes = {part.weight_shape for part in parts}
    if len(shapes) > 1:
        raise UnsupportedError(
            f"experts of different shapes: {', '.join(map(str, sorted(shapes)))}",
            hint="merge the adapter into its base and convert that",
        )
