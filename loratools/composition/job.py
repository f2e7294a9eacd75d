"""What a composition will do, checked before the first layer is combined."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.adapter import Adapter
from loratools.adapter_io import find_weights, open_adapter
from loratools.composition.layers import Recipe
from loratools.composition.matching import (
    Column,
    base_notes,
    check_additive,
    check_architectures,
    line_up,
)
from loratools.composition.weights import Weights, check_weights
from loratools.errors import OptionError
from loratools.formats import get_written_format
from loratools.formats.format import Format
from loratools.keymaps.gguf_base import GGUFBase
from loratools.keymaps.gguf_naming import concerns_gguf, in_transformers_naming
from loratools.keymaps.mlx_base import MLXBase
from loratools.keymaps.mlx_naming import concerns_mlx, meeting
from loratools.keymaps.target import NAMINGS, Naming
from loratools.keymaps.translate import in_one_naming
from loratools.merge_methods.method import Method
from loratools.planning.finite import check_finite
from loratools.report import Note
from loratools.tensorfiles.destination import check_destination


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """Everything that is known before the first layer is combined."""

    names: Sequence[str]
    adapters: Sequence[Adapter]
    columns: Mapping[str, Column]
    weights: Weights
    recipe: Recipe
    notes: tuple[Note, ...]


def make_recipe(method: Method, rank: int | None, density: float | None, seed: int) -> Recipe:
    """Return what is done to every layer; raises OptionError for what the method cannot do."""
    if rank is not None and rank < 1:
        raise OptionError(f"rank {rank} is no rank", hint="give --rank of at least 1")
    if method.needs_rank and rank is None:
        core = "" if method.name.startswith("peft-") else f", or use core-{method.name}"
        raise OptionError(
            f"{method.name} changes single elements, so that its result has no exact low rank",
            hint=f"choose one with --rank{core}",
        )
    _check_density(method, density)
    return Recipe(method, density or method.density or 1.0, seed, rank)


def _check_density(method: Method, density: float | None) -> None:
    if density is None:
        return
    if not 0 < density <= 1:
        raise OptionError(
            f"density {density:g} is outside (0, 1]",
            hint="it is the share of elements that are kept; 1 keeps all",
        )
    if method.density is None:
        raise OptionError(
            f"{method.name} has no density", hint="leave --density out, or use a pruning method"
        )


def check_count(method: Method, count: int) -> None:
    """Raise OptionError if the method does not take so many adapters."""
    if not count:
        raise OptionError("no adapter given", hint="name the adapters to combine")
    if method.inputs is not None and count != method.inputs:
        raise OptionError(
            f"{method.name} combines {method.inputs} adapters, and {count} are given",
            hint="karcher is its generalisation to any number",
        )


def open_checked(name: str) -> tuple[Format, Adapter]:
    """Read an adapter, refusing NaN and infinity."""
    found, adapter = open_adapter(name)
    check_finite(adapter, name)
    return found, adapter


def settle_target(to: str | None, first: Format) -> Format:
    """Return the output's format: the one that is asked for, or that of the first adapter."""
    return get_written_format(first.name if to is None else to)


def check_output(
    target: Format, output: str | os.PathLike[str], names: Sequence[str], *, overwrite: bool
) -> None:
    """Raise OutputError if the destination exists, or would destroy an input."""
    folder = target.is_folder(output)
    inputs = [find_weights(Path(name)) for name in names]
    check_destination(Path(output), folder=folder, overwrite=overwrite, inputs=inputs)


def plan_job(
    names: Sequence[str],
    loaded: Sequence[Adapter],
    weights: Weights,
    recipe: Recipe,
    target: Format,
    arch: str | None,
    language_base: GGUFBase | None = None,
    mlx_base: MLXBase | None = None,
) -> Job:
    """Line the adapters up in one naming and check all that can be checked from their shapes."""
    check_architectures(names, loaded, arch)
    check_additive(names, loaded)
    if concerns_gguf(*(adapter.naming for adapter in loaded)) and not _are_in(target, loaded):
        loaded = in_transformers_naming(loaded, language_base)
    if concerns_mlx(*(adapter.naming for adapter in loaded)):
        loaded = meeting(loaded, mlx_base)
    adapters, _ = in_one_naming(loaded, arch, _meeting_naming(loaded, target))
    columns = line_up(names, adapters)
    paths = [*columns, *(name for adapter in adapters for name in adapter.extras)]
    check_weights(weights, paths, recipe.method)
    notes = tuple(base_notes(names, adapters))
    return Job(
        names, adapters, columns, weights, recipe, (*notes, *_rank_notes(columns, recipe.rank))
    )


def _are_in(target: Format, adapters: Sequence[Adapter]) -> bool:
    return all(adapter.naming == target.naming for adapter in adapters)


def _meeting_naming(adapters: Sequence[Adapter], target: Format) -> Naming | None:
    """Return the target's naming, where fused projections are as the result will have them.

    PEFT's names are no naming of image models' networks; such adapters meet in diffusers'.
    """
    if _are_in(target, adapters):
        return None
    return next((naming for naming in NAMINGS if naming == target.naming), None)


def _rank_notes(columns: Mapping[str, Column], rank: int | None) -> list[Note]:
    """Return a note on layers too small for the rank; raises OptionError if all of them are."""
    if rank is None:
        return []
    sides = {path: _side(column) for path, column in columns.items()}
    small = [path for path, side in sides.items() if side is not None and side < rank]
    largest = max((side for side in sides.values() if side is not None), default=None)
    if largest is not None and largest < rank:
        raise OptionError(
            f"rank {rank} is above the shape of every layer", hint=f"give at most {largest}"
        )
    if not small:
        return []
    words = f"{len(small)} layers have a side below {rank}, which is the rank they get"
    return [Note(words, "note", small[0] if len(small) == 1 else None)]


def _side(column: Column) -> int | None:
    """Return the smaller side of a layer's matrix, of each expert's; None for a vector."""
    shape = next(d for d in column if d is not None).weight_shape
    delta = next(d for d in column if d is not None)
    if delta.kind == "expert_lora":
        return min(shape[1:])
    return min(shape[0], math.prod(shape[1:])) if len(shape) > 1 else None
