"""Planning a merge from headers alone: what lands on which tensor, and what the output is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loratools.basemodel import BaseModel, BaseTensor
from loratools.deltas import Replacement, RowReplacement
from loratools.errors import MatchError, OptionError, UnsupportedError
from loratools.planning.base_names import in_base_names
from loratools.planning.labels import label_words
from loratools.planning.loading import AdapterInput, LoadedAdapter, PathLike, load_adapters
from loratools.planning.packed_bases import (
    dequantised_config,
    dequantised_works,
    kept_work,
    packed_notes,
    resolve_quant,
    without_marks,
)
from loratools.planning.placement import Placement, place_adapters
from loratools.planning.provenance import provenance
from loratools.planning.quantising import DEQUANTIZE, KEEP, row_length, written_type
from loratools.planning.subspaces import rounding_for
from loratools.planning.tied_embeddings import Tie, find_tie, resolve_tie
from loratools.planning.widening import Widening, describe_widening, widened_config
from loratools.report import Json, Level, Note
from loratools.streaming.checkpoint import (
    DTYPE_WORDS,
    REMOVED,
    Checkpoint,
    output_dtype,
    plan_checkpoint,
    unchanged,
    with_words,
)
from loratools.streaming.works import MakeFolds, TensorWork
from loratools.tensorfiles.dtypes import DTYPES, FLOAT_WORDS, dtype_word, torch_dtype

__all__ = [
    "AdapterInput", "LoadedAdapter", "MergePlan", "PathLike", "json_word", "load_adapters",
    "plan_merge",
]  # fmt: skip

_WHOLE_WORDS = frozenset({"BOOL", "I8", "I16", "I32", "I64", "U8", "U16", "U32", "U64"})
_ONE_OF_THEM = "merge one of them first, or take the tensor out of the other"


@dataclass(frozen=True, slots=True)
class MergePlan:
    """What a merge will do, from headers alone.

    Attributes:
        checkpoint: the output.
        placements: output tensor name → what lands on it.
        notes: decisions to report.
    """

    checkpoint: Checkpoint
    placements: Mapping[str, tuple[Placement, ...]]
    notes: tuple[Note, ...]


def plan_merge(
    base: BaseModel,
    loaded: Sequence[LoadedAdapter],
    *,
    dtype: str = "keep",
    residual_base: bool = False,
    arch: str | None = None,
    quant: str | None = None,
    shaping: float | None = None,
) -> MergePlan:
    """Decide from headers alone what lands where, and lay out the output.

    Args:
        base: the checkpoint.
        loaded: adapters with their strengths.
        dtype: see ``merge_into_base``.
        residual_base: see ``merge_into_base``.
        arch: see ``merge_into_base``.
        quant: see ``resolve_quant``.
        shaping: strength of adapter-aware rounding, or None to round to nearest.

    Raises:
        MatchError, UnsupportedError: see ``place_adapters`` and ``resolve_tie``.
        OptionError: an unknown dtype or type.
    """
    asked = quant is not None
    quant = resolve_quant(base, quant, shaped=shaping is not None)
    if dtype != "keep" and dtype not in DTYPE_WORDS:
        raise OptionError(
            f"unknown dtype {dtype!r}", hint=f"use keep, {', '.join(DTYPE_WORDS)} with --dtype"
        )
    loaded = [replace(one, adapter=in_base_names(one.adapter, base, arch)) for one in loaded]
    tie = find_tie(base)
    tied_heads = dict.fromkeys(tie.unstored(base), tie.input) if tie and tie.tied else {}
    placed = place_adapters(
        base,
        [(one.adapter, one.strength) for one in loaded],
        names=[one.path for one in loaded],
        tied_heads=tied_heads,
        residual_base=residual_base,
    )
    untied = resolve_tie(base, tie, placed.by_tensor)
    works: dict[str, TensorWork] = {}
    notes: list[Note] = []
    written = _Written(quant, dtype, shaping)
    for name, placements in untied.by_tensor.items():
        source = base.tensors.get(untied.sources.get(name, name))
        works[name] = _work(name, placements, source, base, written)
        notes += _work_notes(works[name], placements, source)
    if base.packed and quant == DEQUANTIZE:
        works |= dequantised_works(base, works, dtype)
    works |= _widened(placed.widened, works, base, dtype)
    notes += _widening_notes(base, placed.widened)
    config: dict[str, Any] = {**untied.config, **_vocabulary(base, tie, works)}
    config |= {**widened_config(base, placed.widened), **label_words(base, works)}
    dropped: frozenset[str] = frozenset()
    if base.packed and quant == DEQUANTIZE:
        config |= dequantised_config(base, works)
        base, dropped = without_marks(base)
    notes += packed_notes(base, quant, asked=asked, works=works)
    others = "keep" if base.is_gguf else dtype
    checkpoint = plan_checkpoint(base, works, dropped=dropped, config=config, dtype=others)
    if base.is_gguf:
        checkpoint = with_words(checkpoint, provenance(base, loaded))
    words = [*(f"{one.path}: {n}" for one in loaded for n in one.adapter.notes), *placed.notes]
    words += [*untied.notes, *(f"added to the base: {name}" for name in placed.added)]
    words += [*_config_notes(base, config), *_container_notes(base, dtype)]
    all_notes = (*(Note(word) for word in words), *notes, *_left_out(base))
    return MergePlan(checkpoint, untied.by_tensor, all_notes)


def _container_notes(base: BaseModel, dtype: str) -> Iterator[str]:
    kept = sorted(
        {t.dtype for t in base.tensors.values() if t.dtype.startswith(("F8", "F6", "F4"))}
    )
    if dtype != "keep" and kept:
        yield f"--dtype leaves {', '.join(kept)} tensors as they are"
    if any(shard.header is None for shard in base.shards):
        yield "torch's .bin files are written as .safetensors"


@dataclass(frozen=True, slots=True)
class _Written:
    """How touched tensors are written: the options of ``plan_merge``."""

    quant: str
    dtype: str
    shaping: float | None


def _work(
    name: str,
    placements: tuple[Placement, ...],
    source: BaseTensor | None,
    base: BaseModel,
    written: _Written,
) -> TensorWork:
    """Return the output tensor: a new or resized one starts from the adapter's own values."""
    replacement = _replacement(name, placements)
    if replacement and (source is None or _is_taken_whole(replacement, source)):
        word = _own_word(replacement, base) if source is None else source.dtype
        source = _own_values(name, replacement, word)
        placements = tuple(p for p in placements if p.new_shape is None)
    else:
        assert source is not None
        word = source.dtype
        if source.packed and written.quant == KEEP and source.name == name:
            return kept_work(name, placements, source, written.shaping)
    quant, dtype = written.quant, written.dtype
    if not placements and word in DTYPES:
        return TensorWork(name, output_dtype(word, dtype), source.shape, source)
    word = written_type(name, word, row_length(base, source), quant, dtype)
    if not placements:
        return TensorWork(name, word, source.shape, source)
    rounding = None if word in DTYPES else rounding_for(placements, written.shaping)
    return TensorWork(name, word, source.shape, source, _fold_maker(placements), rounding)


def _widened(
    widened: Mapping[str, Widening],
    works: Mapping[str, TensorWork],
    base: BaseModel,
    dtype: str,
) -> dict[str, TensorWork]:
    """Return the works of widened tensors in their new shape, also where nothing else changes."""
    found = {}
    for name, widening in widened.items():
        work = works.get(name) or unchanged(base.tensors[name], dtype)
        if work.is_packed or work.source.dtype not in DTYPES:
            raise UnsupportedError(
                f"{name}: a weight stored as {work.dtype} cannot be widened in its scheme",
                hint="--quant dequantize",
            )
        found[name] = replace(work, shape=widening.after)
    return found


def _widening_notes(base: BaseModel, widened: Mapping[str, Widening]) -> Iterator[Note]:
    for widening in widened.values():
        level: Level = "note" if widening.stated else "warning"
        yield Note(describe_widening(base, widening), level, widening.tensor)


def _fold_maker(placements: tuple[Placement, ...]) -> MakeFolds:
    return lambda device: [placement.fold(device) for placement in placements]


def _replacement(name: str, placements: Sequence[Placement]) -> Placement | None:
    """Return the placement that replaces the tensor as a whole; two different ones collide."""
    found = [p for p in placements if isinstance(p.delta, Replacement)]
    _refuse_row_conflicts(name, placements, replaced=bool(found))
    values = [p.delta.tensors()["value"] for p in found]
    for placement, value in zip(found[1:], values[1:], strict=True):
        if value.shape != values[0].shape or not torch.equal(value, values[0]):
            raise MatchError(
                f"{name}: adapters {found[0].adapter + 1} and {placement.adapter + 1} both replace "
                "it, with different values",
                hint=_ONE_OF_THEM,
            )
    if len(found) > 1 and any(placement.strength != 1.0 for placement in found):
        raise MatchError(
            f"{name}: several adapters replace it, at strengths other than 1",
            hint="give them strength 1, or take the tensor out of all but one",
        )
    return found[0] if found else None


def _refuse_row_conflicts(name: str, placements: Sequence[Placement], *, replaced: bool) -> None:
    """Refuse two adapters that set the same row of a table, unless to one value at strength 1."""
    rows: dict[int, tuple[Placement, Tensor]] = {}
    for placement in placements:
        if not isinstance(placement.delta, RowReplacement):
            continue
        for index, row in zip(placement.delta.indices, placement.delta.rows, strict=True):
            other, value = rows.setdefault(index, (placement, row))
            if replaced:
                raise MatchError(
                    f"{name}: one adapter replaces the table and another its row {index}",
                    hint=_ONE_OF_THEM,
                )
            if not torch.equal(value, row):
                raise MatchError(
                    f"{name}: adapters {other.adapter + 1} and {placement.adapter + 1} both "
                    f"replace row {index}",
                    hint=_ONE_OF_THEM,
                )
            if other is not placement and (other.strength, placement.strength) != (1.0, 1.0):
                raise MatchError(
                    f"{name}: several adapters replace row {index}, at strengths other than 1",
                    hint="give them strength 1, or take the row out of all but one",
                )


def _is_taken_whole(replacement: Placement, source: BaseTensor) -> bool:
    """Return whether nothing of the base's tensor can remain: another size, or whole numbers."""
    stored = dtype_word(replacement.delta.tensors()["value"].dtype)
    return replacement.new_shape != source.shape or {stored, source.dtype} <= _WHOLE_WORDS


def _own_word(replacement: Placement, base: BaseModel) -> str:
    """Return the dtype of a tensor that the base lacks: the base's, unless it is a buffer's."""
    stored = dtype_word(replacement.delta.tensors()["value"].dtype)
    return base.main_dtype if stored in FLOAT_WORDS else stored


def _own_values(name: str, placement: Placement, word: str) -> BaseTensor:
    value = placement.delta.tensors()["value"]
    if word not in FLOAT_WORDS:
        # Blocks convert through float32, which has no room for large whole numbers.
        value = value.to(torch_dtype(word))
    return BaseTensor(
        name, dtype_word(value.dtype), tuple(value.shape), Path(placement.module), values=value
    )


def _work_notes(
    work: TensorWork, placements: Sequence[Placement], source: BaseTensor | None
) -> Iterator[Note]:
    replacement = _replacement(work.name, placements)
    if replacement is None:
        return
    stored = dtype_word(replacement.delta.tensors()["value"].dtype)
    if stored != work.dtype:
        yield Note(f"replaced: stored as {stored}, written as {work.dtype}", subject=work.name)
    resized = source is not None and work.shape != source.shape
    if source is not None and resized:
        yield Note(f"resized from {source.shape} to {work.shape}", subject=work.name)
    if replacement.strength != 1.0 and (source is None or _is_taken_whole(replacement, source)):
        yield Note(
            f"strength {replacement.strength} has nothing to act on: written as the adapter has it",
            "warning",
            work.name,
        )


def _vocabulary(
    base: BaseModel, tie: Tie | None, works: Mapping[str, TensorWork]
) -> dict[str, int]:
    """Return the new vocabulary size, if the embeddings were resized; both must agree."""
    if tie is None or tie.input not in base.tensors:
        return {}
    before = base.tensors[tie.input].shape[0]

    def rows(name: str) -> int | None:
        if name in works:
            return works[name].shape[0]
        return base.tensors[name].shape[0] if name in base.tensors else None

    after, head = rows(tie.input), rows(tie.head)
    if head is not None and after != head and (after != before or head != before):
        raise MatchError(
            f"{tie.input} has {after} rows but {tie.head} has {head}",
            hint="save the adapter with save_embedding_layers=True so that it brings both",
        )
    changed = after is not None and after != before
    return {"vocab_size": after} if changed and after is not None else {}


def _config_notes(base: BaseModel, config: Mapping[str, Any]) -> list[str]:
    if base.is_gguf:
        return []
    if not config or base.config is None:
        return [f"no config.json to correct: {k} should be {v}" for k, v in config.items()]
    return [
        f"config.json: {key} is taken out"
        if value is REMOVED
        else f"config.json: {key} is now {json_word(value)}"
        for key, value in config.items()
    ]


def json_word(value: Json) -> str:
    """Return a config value as JSON spells it, a table by its size."""
    if isinstance(value, Mapping):
        return f"a table of {len(value)}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _left_out(base: BaseModel) -> list[Note]:
    if not base.left_out:
        return []
    names = ", ".join(str(path) for path in base.left_out[:6])
    more = f" and {len(base.left_out) - 6} more" if len(base.left_out) > 6 else ""
    return [Note(f"left out, because the merge makes them stale: {names}{more}")]
