"""Merging into checkpoints whose weights are packed: in 16 bits, or again in their own scheme."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loratools.basemodel import BaseModel, BaseTensor
from loratools.basetensors import as_stored, quantisation_fields, quantisation_words
from loratools.codecs.rounding import STRENGTH
from loratools.codecs.scheme_floats import CAST
from loratools.codecs.scheme_torchao import header_words
from loratools.deltas import ExpertLoRA, LoRA
from loratools.errors import OptionError, UnsupportedError
from loratools.planning.placement import Placement
from loratools.planning.quantising import DEQUANTIZE, KEEP, check_quant
from loratools.planning.subspaces import rounding_for
from loratools.report import Note
from loratools.streaming.checkpoint import REMOVED, dtype_fields, output_dtype
from loratools.streaming.works import TensorWork

NEAREST, ADAPTER_AWARE = ROUNDINGS = ("nearest", "adapter-aware")
"""The words of ``--rounding``."""

# Side files that tell a reader that the weights are quantised.
_SIDE_FILES = frozenset({"quantize_config.json", "quant_config.json", "hf_quant_config.json"})
# A tensor and a field of the file's header by which ComfyUI knows scaled float8.
_MARKS = frozenset({"scaled_fp8", "model.diffusion_model.scaled_fp8"})
_HEADER_MARK = "_quantization_metadata"


def resolve_quant(base: BaseModel, quant: str | None, *, shaped: bool) -> str:
    """Return ``keep``, ``dequantize`` or a ggml type: what becomes of a quantised base.

    A packed base is written in 16 bits unless the user says otherwise: its adapters were trained
    on the dequantised weights, and coding the sum again in 4 bits erases most of a small change.
    A GGUF file keeps its types: it is made for a runtime that expects them.

    Args:
        base: the base.
        quant: the user's word, or None.
        shaped: whether codes are to be chosen by the adapters, which only ``keep`` has any of.

    Raises:
        OptionError: an unknown word.
        UnsupportedError: a ggml type for a base that is not GGUF; a base that is quantised by its
            config alone.
    """
    _refuse_contradiction(base)
    if quant is None:
        return DEQUANTIZE if base.packed and not shaped else KEEP
    word = check_quant(quant)
    if base.packed and word not in (KEEP, DEQUANTIZE):
        raise UnsupportedError(
            f"--quant {quant}: {base.path} is stored as {schemes(base)}, not as GGUF",
            hint="use --quant keep or --quant dequantize, and `loratools quantize` after that",
        )
    return word


def _refuse_contradiction(base: BaseModel) -> None:
    """Raise UnsupportedError where the config says quantised and every tensor is a plain float."""
    method = quantisation_words(base.config).get("quant_method")
    if method and not base.packed:
        raise UnsupportedError(
            f"{base.path}: the base is quantised ({method}) by its config.json, and no tensor is "
            "stored so",
            hint="take quantization_config out of config.json if the weights are plain floats",
        )


def shaping_strength(rounding: str, strength: float | None) -> float | None:
    """Return the strength of adapter-aware rounding, or None to round to nearest.

    Raises OptionError for an unknown word, or a strength that is none or has nothing to act on.
    """
    if rounding not in ROUNDINGS:
        raise OptionError(
            f"unknown rounding {rounding!r}", hint=f"use {' or '.join(ROUNDINGS)} with --rounding"
        )
    if rounding == NEAREST:
        if strength is not None:
            raise OptionError(
                "--rounding-strength has nothing to act on", hint=f"add --rounding {ADAPTER_AWARE}"
            )
        return None
    if strength is not None and not 0 < strength < math.inf:
        raise OptionError(
            f"--rounding-strength {strength}: not a positive number",
            hint=f"leave it out for {STRENGTH:g}",
        )
    return STRENGTH if strength is None else strength


def schemes(base: BaseModel) -> str:
    """Return the names of the schemes in a base, the most frequent first."""
    counts = Counter(weight.packed.scheme for weight in base.packed if weight.packed)
    return ", ".join(name for name, _ in counts.most_common())


def kept_work(
    name: str, placements: Sequence[Placement], source: BaseTensor, strength: float | None
) -> TensorWork:
    """Return the work that folds into a packed weight and codes it again in its own scheme.

    Raises UnsupportedError for a change that only fits the other order of its axes.
    """
    assert source.packed is not None
    stored = as_stored(source)
    if source.packed.turned:
        placements = [_turned(name, placement) for placement in placements]

    def folds(device: str) -> list[Any]:
        return [placement.fold(device) for placement in placements]

    rounding = rounding_for(placements, strength)
    return TensorWork(name, source.packed.scheme, stored.shape, stored, folds, rounding)


def _turned(name: str, placement: Placement) -> Placement:
    if not isinstance(placement.delta, ExpertLoRA | LoRA):
        raise UnsupportedError(
            f"{name}: {placement.delta.kind} changes cannot be coded in its scheme, which stores "
            "the experts turned over",
            hint="--quant dequantize",
        )
    return replace(placement, transposed=not placement.transposed)


def dequantised_works(
    base: BaseModel, works: Mapping[str, TensorWork], dtype: str
) -> dict[str, TensorWork]:
    """Return the works that write every packed weight as the float weight it stands for."""
    return {
        weight.name: TensorWork(
            weight.name, output_dtype(weight.dtype, dtype), weight.shape, weight
        )
        for weight in base.packed
        if weight.name not in works
    }


def dequantised_config(base: BaseModel, works: Mapping[str, TensorWork]) -> dict[str, Any]:
    """Return the config's fields to take out, and its dtype where it says another."""
    config = base.config or {}
    edits: dict[str, Any] = dict.fromkeys(quantisation_fields(config), REMOVED)
    words = Counter(works[weight.name].dtype for weight in base.packed if weight.name in works)
    if words:
        edits |= dtype_fields(base, words.most_common(1)[0][0])
    return edits


def without_marks(base: BaseModel) -> tuple[BaseModel, frozenset[str]]:
    """Return the base without what tells readers that it is quantised, and tensors to drop."""
    shards = tuple(replace(shard, metadata=_plain_words(shard.metadata)) for shard in base.shards)
    gone = {path for path in base.side_files if path.name in _SIDE_FILES}
    side = tuple(path for path in base.side_files if path not in gone)
    left = (*base.left_out, *sorted(gone, key=Path.as_posix))
    marks = frozenset(name for name in _MARKS if name in base.tensors)
    return replace(base, shards=shards, side_files=side, left_out=left), marks


def _plain_words(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return a header's words but for those that describe quantised tensors."""
    gone = {_HEADER_MARK, *header_words(metadata)}
    return {key: word for key, word in metadata.items() if key not in gone}


_REASON = ": what the adapter was trained on (--quant keep codes the sum in the base's scheme)"
_CAST_REASON = ": float8 is too coarse for most changes (--quant keep casts the sum back)"


def packed_notes(
    base: BaseModel, quant: str, *, asked: bool, works: Mapping[str, TensorWork]
) -> Iterator[Note]:
    """Yield what was decided about a packed base, and why."""
    if not base.packed:
        return
    if quant == DEQUANTIZE:
        words = sorted({works[w.name].dtype for w in base.packed if w.name in works})
        reason = "" if asked else _CAST_REASON if schemes(base) == CAST else _REASON
        yield Note(
            f"the base is {schemes(base)}: its {len(base.packed)} weights are written "
            f"dequantised, in {', '.join(words)}{reason}"
        )
    else:
        scales = "" if schemes(base) == CAST else ", their scales as they are"
        yield Note(f"touched weights are coded again as {schemes(base)}{scales}")
