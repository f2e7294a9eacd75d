"""A quantised checkpoint in plain numbers."""

from __future__ import annotations

from collections import Counter

from loratools.basemodel import BaseModel
from loratools.planning.packed_bases import (
    dequantised_config,
    dequantised_works,
    schemes,
    without_marks,
)
from loratools.report import Note
from loratools.streaming.checkpoint import Checkpoint, plan_checkpoint


def plan_unpacking(base: BaseModel, dtype: str | None) -> tuple[Checkpoint, str, tuple[Note, ...]]:
    """Plan every packed weight as the float weight it stands for; returns its dtype word too.

    Args:
        base: a checkpoint with packed weights.
        dtype: ``fp32``, ``fp16`` or ``bf16`` for every float tensor; None for the type that the
            config or the weight itself names, and the others as they are.
    """
    word = dtype or "keep"
    works = dequantised_works(base, {}, word)
    config = dequantised_config(base, works)
    plain, dropped = without_marks(base)
    checkpoint = plan_checkpoint(plain, works, dropped=dropped, config=config, dtype=word)
    left = [path for path in plain.left_out if path not in base.left_out]
    notes = [Note(f"the base is {schemes(base)}: {len(works)} weights are dequantised")]
    notes += [Note(f"left out, because it speaks of quantised weights: {path}") for path in left]
    words = Counter(work.dtype for work in works.values())
    return checkpoint, words.most_common(1)[0][0], tuple(notes)
