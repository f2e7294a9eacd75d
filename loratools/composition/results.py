"""What a composition reports: ranks, what they cost, how the inputs lie to each other."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import combinations

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.composition.job import Job
from loratools.composition.layers import Outcome
from loratools.errors import NonFiniteError
from loratools.formats.format import Format
from loratools.linalg.finite import is_finite
from loratools.merge_methods.span import cosines
from loratools.report import Json, Note, Report


def result_notes(job: Job, outcomes: Mapping[str, Outcome], made: Adapter) -> Iterator[Note]:
    """Yield what the user did not ask for: zero results, a wider float type."""
    zeros = [path for path, one in outcomes.items() if one.is_zero]
    if zeros and len(zeros) == len(outcomes):
        yield Note("the result changes nothing: every layer is zero", "warning")
    elif zeros:
        yield Note(f"{len(zeros)} layers of the result are zero", "warning", zeros[0])
    read = {tensor.dtype for adapter in job.adapters for _, tensor in adapter.named_tensors()}
    written = {tensor.dtype for _, tensor in made.named_tensors()}
    if torch.float32 in written and torch.float32 not in read:
        yield Note("factors are computed and written in fp32; --dtype bf16 or fp16 halves the file")


def check_results(outcomes: Mapping[str, Outcome]) -> None:
    """Raise NonFiniteError for changes that float32 cannot hold, naming the first."""
    for path, one in outcomes.items():
        finite = all(is_finite(tensor) for tensor in one.delta.tensors().values())
        if not finite or not one.norm <= torch.finfo(torch.float32).max:
            raise NonFiniteError(
                f"{path}: the combined change is beyond float32",
                hint="give smaller weights, or leave out the adapter of so large a change",
            )


def describe(
    job: Job, outcomes: Mapping[str, Outcome], made: Adapter, target: Format, output: str | None
) -> Report:
    """Return the report of a composition."""
    recipe = job.recipe
    ranks = Counter(
        rank for d in made.layers.values() if (rank := getattr(d, "rank", None)) is not None
    )
    error = _overall_error(outcomes)
    total = torch.zeros(len(job.names), len(job.names), dtype=torch.float64)
    for one in outcomes.values():
        total += one.gram
    facts: dict[str, Json] = {
        "method": recipe.method.name,
        "paper": recipe.method.paper,
        "density": recipe.density if recipe.method.density is not None else None,
        "seed": recipe.seed if recipe.method.seeded else None,
        "adapters": [
            {"path": name, "weight": weight, "layers": len(adapter.layers)}
            for name, weight, adapter in zip(
                job.names, job.weights.usual, job.adapters, strict=True
            )
        ],
        "to": target.name,
        "layers": len(made.layers),
        "layers_shared": sum(None not in column for column in job.columns.values()),
        "extras": len(made.extras),
        "ranks": {str(rank): count for rank, count in sorted(ranks.items())},
        "relative_error": error,
        "retained_energy": 1 - error**2,
        "cosines": _cosines(total),
        "parameters": made.parameters,
    }
    items = tuple(_row(path, one, job) for path, one in outcomes.items())
    return Report(
        "compose", tuple(job.names), output, facts, items, job.notes, dry_run=output is None
    )


def _overall_error(outcomes: Mapping[str, Outcome]) -> float:
    missed = math.fsum(one.missed for one in outcomes.values())
    whole = missed + math.fsum(one.norm**2 for one in outcomes.values())
    return math.sqrt(missed / whole) if whole else 0.0


def _cosines(gram: Tensor) -> dict[str, float]:
    """Return the cosine of each pair of adapters, by their numbers from 1."""
    found = cosines(gram)
    return {f"{i + 1}-{j + 1}": float(found[i, j]) for i, j in combinations(range(len(found)), 2)}


def _row(path: str, one: Outcome, job: Job) -> dict[str, Json]:
    column = job.columns[path]
    return {
        "module": path,
        "kind": one.delta.kind,
        "adapters": sum(delta is not None for delta in column),
        "rank": getattr(one.delta, "rank", None),
        "shape": list(one.delta.weight_shape),
        "norm": one.norm,
        "retained_energy": 1 - one.error**2,
        "relative_error": one.error,
        "cosines": _cosines(one.gram),
    }
