"""The report of a merge: what landed where, and what became of it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loratools.basemodel import BaseModel
from loratools.codecs.ggml import GGML_TYPES
from loratools.codecs.ggml_grids import GGML_GRIDS
from loratools.deltas import Replacement
from loratools.planning.merge_plan import LoadedAdapter, MergePlan
from loratools.planning.no_change import Touched
from loratools.planning.placement import Placement
from loratools.planning.quantising import retained_fact, retention_notes
from loratools.report import Json, Note, Report
from loratools.streaming.checkpoint import Results
from loratools.streaming.works import TensorResult, TensorWork
from loratools.tensorfiles.dtypes import DTYPES

_TYPES_WITHOUT_GRID = GGML_TYPES.keys() - GGML_GRIDS.keys() - DTYPES.keys()


@dataclass(frozen=True, slots=True)
class MergeJob:
    """What will be written, and from what.

    Attributes:
        root: the base or pipeline, as the user gave it.
        plans: sub-folder → plan; the empty name for a model by itself.
        loaded: the adapters.
        files: every file that is read, since any may be a link to somewhere else.
        other_files: files below ``root`` that are copied as they are.
    """

    root: Path
    plans: Mapping[str, MergePlan]
    loaded: Sequence[LoadedAdapter]
    files: Sequence[Path]
    other_files: Sequence[Path] = ()


def touched_tensors(job: MergeJob, results: Results) -> list[Touched]:
    """Return every folded tensor with what landed on it."""
    found = []
    for component, plan in job.plans.items():
        works = plan.checkpoint.works
        for name, result in results[component].items():
            work = works[name]
            landed = plan.placements.get(name, ())
            shaped = work.rounding is not None and work.rounding.strength is not None
            found.append(Touched(landed, work.dtype, result, shaped))
    return found


def merge_report(operation: str, job: MergeJob, results: Results, output: str | None) -> Report:
    """Return the report of what was planned and, but for a dry run, of what became of it."""
    items: list[dict[str, Json]] = []
    notes: list[Note] = []
    for component, plan in job.plans.items():
        found = results.get(component, {})
        works = plan.checkpoint.works
        for name, placements in plan.placements.items():
            items += [_item(component, works[name], p, found.get(name)) for p in placements]
        notes += [*plan.notes, *_replacement_notes(plan, found), *_unchanged_notes(plan, found)]
        notes += [*retention_notes(found), *_unshaped_notes(plan, found)]
    return Report(
        operation,
        (str(job.root), *(one.path for one in job.loaded)),
        output,
        {"adapters": [_adapter_fact(one) for one in job.loaded], **_tensor_facts(job, results)},
        tuple(items),
        tuple(dict.fromkeys(notes)),
        dry_run=output is None,
    )


def _adapter_fact(one: LoadedAdapter) -> dict[str, Json]:
    return {
        "path": one.path,
        "strength": one.strength,
        "layers": len(one.adapter.layers),
        "extras": len(one.adapter.extras),
        "parameters": one.adapter.parameters,
    }


def _tensor_facts(job: MergeJob, results: Results) -> dict[str, Json]:
    works = [
        (w, plan.checkpoint.base)
        for plan in job.plans.values()
        for w in plan.checkpoint.works.values()
    ]
    touched = [work for work, base in works if _moved(work, base)]
    every = [result for of_one in results.values() for result in of_one.values()]
    facts: dict[str, Json] = {
        "tensors": len(works),
        "tensors_touched": len(touched),
        "tensors_added": sorted(work.name for work, base in works if work.name not in base.tensors),
        "parameters_touched": sum(work.elements for work in touched),
        "bytes_written": sum(work.nbytes for work, _ in works),
        "bytes_copied": sum(work.nbytes for work, _ in works if work.is_copy),
        "dtypes": sorted({work.dtype for work, _ in works}),
    }
    if len(job.plans) > 1:
        facts["components"] = list(job.plans)
    if every:
        facts["tensors_changed"] = sum(result.changed for result in every)
        facts["relative_change"] = _relative_change(every)
        facts |= retained_fact(every)
    return facts


def _moved(work: TensorWork, base: BaseModel) -> bool:
    """Return whether a work does more to the base's own tensor than copy or convert it."""
    return work.folds is not None or work.source is not base.tensors.get(work.name)


def _relative_change(results: Sequence[TensorResult]) -> float:
    change = sum(result.change_norm**2 for result in results)
    weight = sum(result.result_norm**2 for result in results)
    return float((change / weight) ** 0.5) if weight else math.inf


def _item(
    component: str, work: TensorWork, placement: Placement, result: TensorResult | None
) -> dict[str, Json]:
    delta = placement.delta
    return {
        "component": component or None,
        "tensor": work.name,
        "module": placement.module,
        "adapter": placement.adapter,
        "kind": delta.kind,
        "part": placement.part,
        "rank": getattr(delta, "rank", None),
        "alpha": getattr(delta, "alpha", None),
        "strength": placement.strength,
        "transposed": placement.transposed,
        "shape": list(work.shape),
        "file": work.source.file.name,
        "dtype": work.dtype,
        "changed": result.changed if result else None,
        "change_norm": result.change_norm if result else None,
        "result_norm": result.result_norm if result else None,
        "retained": result.retained if result else None,
        "subspace_error": result.subspace_error if result else None,
        "added_error": result.added_error if result else None,
        "codes_changed": result.codes_changed if result else None,
    }


def _replacement_notes(plan: MergePlan, results: Mapping[str, TensorResult]) -> Iterator[Note]:
    for name, placements in plan.placements.items():
        if any(isinstance(placement.delta, Replacement) for placement in placements):
            kept = name in results and not results[name].changed
            word = "the adapter's copy equals the base's" if kept else "replaced by the adapter's"
            yield Note(word, subject=name)


def _unshaped_notes(plan: MergePlan, results: Mapping[str, TensorResult]) -> Iterator[Note]:
    """Yield notes on tensors that adapter-aware rounding was asked for and could not do."""
    works = plan.checkpoint.works
    wanted = [n for n in results if (r := works[n].rounding) and r.strength is not None]
    loose = [n for n in wanted if works[n].dtype in _TYPES_WITHOUT_GRID]
    plain = [n for n in wanted if results[n].subspace_error is None and n not in loose]
    types = ", ".join(sorted({works[name].dtype for name in loose}))
    for names, reason in (
        (plain, "their changes are no low-rank product of inputs"),
        (loose, f"adapter-aware rounding has no grid of {types}"),
    ):
        if names:
            shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if names[4:] else "")
            yield Note(
                f"{len(names)} tensors are rounded to nearest, since {reason}: {shown}", "warning"
            )


def _unchanged_notes(plan: MergePlan, results: Mapping[str, TensorResult]) -> list[Note]:
    same = [
        name
        for name, result in results.items()
        if not result.changed and any(p.new_shape is None for p in plan.placements.get(name, ()))
    ]
    if not same:
        return []
    names = ", ".join(same[:4]) + (f" and {len(same) - 4} more" if len(same) > 4 else "")
    return [
        Note(
            f"{len(same)} touched tensors kept every value (zero, or below their precision): "
            f"{names}",
            "warning",
        )
    ]
