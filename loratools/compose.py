"""Several adapters combined into one: a sum, or another of the methods in METHODS."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from loratools.adapter import Adapter, Extra
from loratools.adapter_io import save_adapter
from loratools.basemodel import open_base
from loratools.composition.extras import combine_extras
from loratools.composition.job import (
    Job,
    check_count,
    check_output,
    make_recipe,
    open_checked,
    plan_job,
    settle_target,
)
from loratools.composition.layers import Outcome, combine_layer
from loratools.composition.matching import Column
from loratools.composition.results import check_results, describe, result_notes
from loratools.composition.weights import parse_weights
from loratools.compute import one_thread_kernels, resolve_compute
from loratools.conversion import cast_adapter, convert_value, rounding_notes
from loratools.deltas import LayerDelta, LoRA
from loratools.deltas.one_scale import padded_to
from loratools.formats.format import Format
from loratools.formats.kohya_metadata import with_comment
from loratools.hub.taking import takes_references
from loratools.keymaps.gguf_base import GGUFBase, open_gguf_base
from loratools.keymaps.gguf_naming import concerns_gguf
from loratools.keymaps.mlx_base import MLXBase, open_mlx_base
from loratools.keymaps.mlx_naming import concerns_mlx
from loratools.merge_methods import get_method
from loratools.planning.merge_plan import AdapterInput
from loratools.report import Note, Report

PathLike = str | os.PathLike[str]


@takes_references(adapters="adapter", base="model")
def compose_adapters(  # noqa: PLR0913 - one keyword for each option of the command
    adapters: PathLike | Sequence[AdapterInput],
    output: PathLike,
    *,
    method: str = "linear",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    weights: Sequence[str] = (),
    to: str | None = None,
    dtype: str = "keep",
    arch: str | None = None,
    base: PathLike | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Combine ``adapters`` into one adapter and write it to ``output``.

    Args:
        adapters: paths, or (path, weight) pairs, in any formats.
        output: a file, or a folder where the format is one.
        method: a name that ``loratools methods`` lists; ``linear`` is the sum.
        rank: the largest rank of a layer; the exact result is approximated best. Without it the
            result is exact, for the methods that have an exact one of low rank.
        density: share of elements that pruning methods keep, in (0, 1]; each has a default.
        seed: settles the chance in DARE and DELLA.
        weights: ``PATTERN=w1,w2,...``: other weights for the layers and tensors whose name the
            regular expression is found in.
        to: the output's format; the first adapter's by default.
        dtype: ``keep``, ``fp32``, ``bf16`` or ``fp16``; ``keep`` is float32 for what is computed.
        arch: the adapters' architecture, where the files do not tell.
        base: the base model; needed where replaced tensors have weights that do not sum to 1, and
            for GGUF where the files do not tell the names.
        overwrite: replace an existing output.
        dry_run: compute and check everything, write nothing.

    Raises:
        OptionError: an unknown method, format or dtype; a rank, density or weight out of range.
        InputError: a file that cannot be used; different architectures; shapes that differ.
        MatchError: no module in common.
        UnsupportedError: changes that depend on the base (DoRA ...), or that the format lacks.
        OutputError: the destination is refused.
    """
    recipe = make_recipe(get_method(method), rank, density, seed)
    listed = [adapters] if isinstance(adapters, (str, os.PathLike)) else adapters
    given = [item if isinstance(item, tuple) else (item, 1.0) for item in listed]
    names = [str(path) for path, _ in given]
    check_count(recipe.method, len(names))
    shares = parse_weights([float(weight) for _, weight in given], weights)
    opened = [open_checked(name) for name in names]
    target = settle_target(to, opened[0][0])
    loaded = [adapter for _, adapter in opened]
    language_base = _language_base(loaded, target, base)
    mlx_base = _mlx_base(loaded, target, base)
    job = plan_job(names, loaded, shares, recipe, target, arch, language_base, mlx_base)
    check_output(target, output, names, overwrite=overwrite)
    # First, because it may be refused.
    extras, notes = combine_extras(job.adapters, shares, base)
    outcomes = _combine_all(job)
    check_results(outcomes)
    made = _adapter(job, outcomes, extras)
    converted = convert_value(
        made, target, arch=arch, language_base=language_base, mlx_base=mlx_base
    )
    final = cast_adapter(converted.adapter, dtype)
    if not dry_run:
        save_adapter(final, output, format=target.name, overwrite=overwrite)
    notes += [Note(word) for word in (*made.notes, *converted.notes)]
    notes += rounding_notes(converted.adapter, dtype)
    done = replace(job, notes=(*job.notes, *result_notes(job, outcomes, final), *notes))
    return describe(done, outcomes, final, target, None if dry_run else str(output))


def _language_base(
    adapters: Sequence[Adapter], target: Format, base: PathLike | None
) -> GGUFBase | None:
    """Return what the base tells of names in GGUF, if they matter; InputError for no model."""
    if base is None:
        return None
    if not concerns_gguf(target.naming, *(a.naming for a in adapters)):
        open_base(base)
        return None
    return open_gguf_base(Path(base))


def _mlx_base(adapters: Sequence[Adapter], target: Format, base: PathLike | None) -> MLXBase | None:
    """Return what the base tells of names in mlx-lm, if they matter."""
    matters = concerns_mlx(target.naming, *(a.naming for a in adapters))
    if base is None or not matters or Path(base).suffix == ".gguf":
        return None
    return open_mlx_base(Path(base))


def _combine_all(job: Job) -> dict[str, Outcome]:
    """Combine every layer, several at a time; the result does not depend on how many.

    Dense layers go one by one, because T of them at a time are in memory as it is.
    """

    def one(item: tuple[str, Column]) -> tuple[str, Outcome]:
        path, column = item
        return path, combine_layer(path, column, job.weights.of(path), job.recipe)

    if job.recipe.method.space == "dense":
        return dict(map(one, job.columns.items()))
    with one_thread_kernels(), ThreadPoolExecutor(resolve_compute().workers) as pool:
        return dict(pool.map(one, job.columns.items()))


def _adapter(job: Job, outcomes: Mapping[str, Outcome], extras: Mapping[str, Extra]) -> Adapter:
    """Return the combined layers in the first adapter's words."""
    first = job.adapters[0]
    layers: Mapping[str, LayerDelta] = {path: one.delta for path, one in outcomes.items()}
    metadata = first.metadata
    if any(key.startswith("ss_") for key in metadata):
        weights = " + ".join(f"{w:g}" for w in job.weights.usual)
        text = f"{len(job.names)} adapters composed ({job.recipe.method.name}, {weights})"
        metadata = with_comment(metadata, text)
    notes = tuple(dict.fromkeys(note for adapter in job.adapters for note in adapter.notes))
    return replace(first, layers=_levelled(layers), extras=extras, metadata=metadata, notes=notes)


def _levelled(layers: Mapping[str, LayerDelta]) -> Mapping[str, LayerDelta]:
    """Give both layers of an attention module one rank: PEFT has one word for the two."""
    levelled = dict(layers)
    for path, outer in layers.items():
        module = path.removesuffix(".out_proj")
        inner = layers.get(module)
        if not isinstance(outer, LoRA) or outer.role != "attention_out":
            continue
        if isinstance(inner, LoRA) and inner.role == "attention_in":
            rank = max(inner.rank, outer.rank)
            levelled[module], levelled[path] = padded_to(inner, rank), padded_to(outer, rank)
    return levelled
