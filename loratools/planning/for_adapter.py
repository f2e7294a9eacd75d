"""A base as an adapter was trained against it: packed in its scheme, or in the numbers it saw."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from loratools.basemodel import BaseModel, BaseTensor
from loratools.basetensors import float_word, quantisation_words
from loratools.errors import InputError, UnsupportedError
from loratools.planning.base_names import in_base_names
from loratools.planning.pack_targets import Target
from loratools.planning.packed_bases import dequantised_config, schemes, without_marks
from loratools.planning.packing import coded_layers, pack_works, plan_packing
from loratools.planning.placement import place_adapters
from loratools.planning.trained_base import Trained
from loratools.planning.trained_schemes import measured, read_scheme
from loratools.report import Note
from loratools.streaming.checkpoint import (
    DTYPE_WORDS,
    Checkpoint,
    dtype_fields,
    output_dtype,
    plan_checkpoint,
)
from loratools.streaming.derived import round_trip, rounded
from loratools.streaming.works import TensorWork
from loratools.tensorfiles.dtypes import FLOAT_WORDS

_OPTIONS: Mapping[str, str] = {word: option for option, word in DTYPE_WORDS.items()}
_PLAIN = "give the 16-bit original of this base"


def plan_trained_packing(base: BaseModel, trained: Trained) -> tuple[Checkpoint, tuple[Note, ...]]:
    """Plan a base of plain numbers in the scheme that an adapter was trained against.

    Raises:
        InputError: it already is.
        UnsupportedError: it is quantised otherwise, or the scheme is one that is only read.
    """
    if base.packed:
        _refuse_other(base, trained)
        raise InputError(
            f"{base.path}: already is {trained.scheme.title}: nothing would change",
            hint="copy it, or `loratools dequantize` it with --for-adapter",
        )
    target, only = _target(trained), _own_weights(base, trained)
    dtype = _rounded_before(base, trained)
    title = trained.scheme.title
    checkpoint, notes = plan_packing(base, target, title, dtype=dtype, only=only)
    return checkpoint, (Note(trained.origin), *_rounding_notes(base, dtype), *notes)


def plan_trained_unpacking(
    base: BaseModel, trained: Trained, dtype: str | None
) -> tuple[Checkpoint, str, tuple[Note, ...]]:
    """Plan the weights that an adapter saw while it was trained; returns their dtype word too.

    A quantised base is decoded. One of plain numbers is packed and decoded again, weight by weight,
    which gives what packing the whole model and decoding that would.

    Args:
        base: the model.
        trained: what the adapter was trained against.
        dtype: ``fp32``, ``fp16`` or ``bf16`` for every float tensor; None for the type that the
            weights were rounded to when the adapter saw them, and the others as they are there.

    Raises:
        UnsupportedError: the base is quantised otherwise, or plain and the scheme is only read.
    """
    if base.packed:
        _refuse_other(base, trained)
        seen = {weight.name: _seen(weight, weight.dtype, trained) for weight in base.packed}
        others, did = "keep", f"the base is {schemes(base)}: {len(seen)} weights are dequantised"
        notes = [Note(did)]
    else:
        seen, others, notes = _round_trips(base, trained)
    works = {name: _work(tensor, dtype) for name, tensor in seen.items()}
    word = next(iter(works.values())).dtype
    if dtype is not None and others != "keep":
        plain_ones = (t for name, t in base.tensors.items() if name not in seen)
        floats = [tensor for tensor in plain_ones if tensor.dtype in FLOAT_WORDS]
        works |= {t.name: _work(rounded(t, DTYPE_WORDS[others]), dtype) for t in floats}
    plain, dropped = without_marks(base)
    config = {**dequantised_config(base, works), **dtype_fields(base, word)}
    checkpoint = plan_checkpoint(plain, works, dropped=dropped, dtype=dtype or others)
    left = [path for path in plain.left_out if path not in base.left_out]
    notes += [Note(f"left out, because it speaks of quantised weights: {path}") for path in left]
    return replace(checkpoint, config=config), word, (Note(trained.origin), *notes)


def _work(tensor: BaseTensor, dtype: str | None) -> TensorWork:
    word = output_dtype(tensor.dtype, dtype or "keep")
    return TensorWork(tensor.name, word, tensor.shape, tensor)


def _round_trips(
    base: BaseModel, trained: Trained
) -> tuple[dict[str, BaseTensor], str, list[Note]]:
    """Return the weights after packing and decoding, the others' ``--dtype``, and notes."""
    dtype = _rounded_before(base, trained)
    title = trained.scheme.title
    only = _own_weights(base, trained)
    packed = pack_works(base, _target(trained), title, dtype=dtype, only=only)
    config = {**(base.config or {}), **packed.config}
    named = float_word(base.config) if dtype == "keep" else DTYPE_WORDS[dtype]
    seen = {}
    for name, work in packed.works.items():
        decoded = round_trip(base.tensors[name], work, config)
        seen[name] = _seen(decoded, named or work.source.dtype, trained)
    did = f"{len(seen)} weights are what is left of them after coding as {title}"
    return seen, dtype, [*_rounding_notes(base, dtype), Note(did), *packed.notes[1:]]


def _seen(tensor: BaseTensor, state: str, trained: Trained) -> BaseTensor:
    """Return a weight as it enters the product: decoded into one type, computed with in another.

    Computing in float32 rounds no further.
    """
    compute = trained.scheme.compute
    return rounded(tensor, state, state if compute in (None, "F32") else compute)


# ── what fits together ──


def _target(trained: Trained) -> Target:
    if trained.scheme.target is None:
        raise UnsupportedError(
            f"{trained.adapter}: was trained against {trained.base} in {trained.scheme.title}, "
            "which loratools reads and does not write",
            hint=f"use that base itself: {trained.base}",
        )
    return trained.scheme.target


def _own_weights(base: BaseModel, trained: Trained) -> frozenset[str] | None:
    """Return the weights of the adapter's own layers, where only those were quantised."""
    if trained.layers is None:
        return None
    adapter = in_base_names(replace(trained.layers, extras={}), base)
    placed = place_adapters(base, [(adapter, 1.0)], names=[trained.adapter], residual_base=True)
    return frozenset(placed.by_tensor)


def _rounded_before(base: BaseModel, trained: Trained) -> str:
    """Return the ``--dtype`` of the base that was quantised, or ``keep`` where it is this one's."""
    same = trained.dtype == base.main_dtype
    return "keep" if same else _OPTIONS.get(str(trained.dtype), "keep")


def _rounding_notes(base: BaseModel, dtype: str) -> Iterator[Note]:
    if dtype != "keep":
        word = DTYPE_WORDS[dtype]
        yield Note(
            f"the trained base was made in {word} and this one is {base.main_dtype}: rounded to "
            f"{word} first"
        )


def _refuse_other(base: BaseModel, trained: Trained) -> None:
    """Raise UnsupportedError where a quantised base is another than the adapter's."""
    words = quantisation_words(base.config)
    own = measured(read_scheme(words), base) if words else None
    title = own.title if own else schemes(base)
    if trained.layers is not None or own is None or own.identity != trained.scheme.identity:
        raise UnsupportedError(
            f"{base.path}: is {title}, and {trained.adapter} was trained against {trained.base} "
            f"in {trained.scheme.title}",
            hint=f"{_PLAIN}, or {trained.base} itself",
        )
    if own.skip == trained.scheme.skip:
        return
    here, there = (coded_layers(base, skip) for skip in (own.skip, trained.scheme.skip))
    if names := sorted(here ^ there):
        more = f" and {len(names) - 3} more" if names[3:] else ""
        raise UnsupportedError(
            f"{base.path}: is {title} in other layers than {trained.base}, which "
            f"{trained.adapter} was trained against: {', '.join(names[:3])}{more}",
            hint=f"{_PLAIN}, or {trained.base} itself",
        )
