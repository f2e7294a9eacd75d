"""Folding adapters into a base checkpoint, and taking them out again.

W' = W + Σ strength·(change), summed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loratools.adapter_io import find_weights
from loratools.basemodel import BaseModel, open_base
from loratools.compute import Compute, resolve_compute
from loratools.deltas import Replacement
from loratools.errors import MatchError
from loratools.planning.merge_plan import (
    AdapterInput,
    LoadedAdapter,
    MergePlan,
    PathLike,
    load_adapters,
    plan_merge,
)
from loratools.planning.placement import Placement
from loratools.planning.unmerge_plan import (
    bound_notes,
    error_bounds,
    plan_restore,
    plan_subtraction,
)
from loratools.report import Json, Note, Report
from loratools.streaming.blocks import TensorResult, TensorWork
from loratools.streaming.checkpoint import check_suffix, write_checkpoint
from loratools.streaming.rewriting import Progress
from loratools.tensorfiles.destination import check_destination


def merge_into_base(
    base: PathLike,
    adapters: AdapterInput | Sequence[AdapterInput],
    output: PathLike,
    *,
    dtype: str = "keep",
    device: str = "cpu",
    residual_base: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Fold ``adapters`` into the checkpoint at ``base`` and write the result to ``output``.

    Every byte that no adapter touches is copied. Each touched weight becomes
    W + Σ strength·(W′ − W), every W′ of the unmerged W, summed in float32 and rounded once.

    Args:
        base: a Hugging Face folder, a diffusers component folder or one weights file.
        adapters: paths, or (path, strength) pairs.
        output: a folder if the base is one, else a .safetensors file.
        dtype: ``keep``, ``fp32``, ``bf16`` or ``fp16`` for every float tensor of the output.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``auto``.
        residual_base: the base already lacks what PiSSA, OLoRA ... took out of it.
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        progress: called with counts of bytes written, from several threads.

    Raises:
        InputError: files that cannot be used (see the subclasses in ``loratools.errors``).
        MatchError: an adapter tensor without a home in the base, or a merge that changes nothing.
        OutputError: the destination is refused.
        OptionError: an unknown dtype or device, or a strength that is 0 or not finite.
    """
    model = open_base(base)
    compute = resolve_compute(device)
    loaded = load_adapters(adapters)
    plan = plan_merge(model, loaded, dtype=dtype, residual_base=residual_base)
    inputs = [find_weights(Path(one.path)) for one in loaded]
    results = _write(plan, Path(output), inputs, compute, overwrite, dry_run, progress)
    return _report("merge", model, loaded, plan, results, None if dry_run else str(output))


def unmerge_from_base(
    merged: PathLike,
    adapters: AdapterInput | Sequence[AdapterInput],
    output: PathLike,
    *,
    base: PathLike | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Take ``adapters`` out of the checkpoint at ``merged`` again and write it to ``output``.

    With ``base`` every tensor the adapters touched is copied back: exact. Without it their change
    is subtracted, and the report bounds the error that two roundings leave.

    Args:
        merged: the merged checkpoint.
        adapters: what was merged, with the same strengths; may be empty if ``base`` is given.
        output: a folder if ``merged`` is one, else a .safetensors file.
        base: the checkpoint they were merged into.
        device: see ``merge_into_base``.
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        progress: called with counts of bytes written, from several threads.

    Raises:
        UnsupportedError: without a base: DoRA, replaced tensors, initialisations that move it.
        OptionError: neither adapters nor a base.
        InputError, MatchError, OutputError: as for ``merge_into_base``.
    """
    model = open_base(merged)
    original = open_base(base) if base is not None else None
    loaded = load_adapters(adapters, allow_none=original is not None)
    compute = resolve_compute(device)
    plan = _unmerge_plan(model, original, loaded)
    inputs = [find_weights(Path(one.path)) for one in loaded]
    inputs += [original.path] if original else []
    results = _write(plan, Path(output), inputs, compute, overwrite, dry_run, progress)
    facts: dict[str, Json] = {"method": "copied from base" if original else "subtracted"}
    notes: list[Note] = []
    if results:
        more, notes = bound_notes(error_bounds(plan.checkpoint.works, results), results)
        facts |= more
    report = _report("unmerge", model, loaded, plan, results, None if dry_run else str(output))
    return replace(report, facts={**report.facts, **facts}, notes=(*report.notes, *notes))


def _unmerge_plan(
    merged: BaseModel, base: BaseModel | None, loaded: Sequence[LoadedAdapter]
) -> MergePlan:
    if base is None:
        return plan_subtraction(merged, loaded)
    checkpoint = plan_restore(merged, base, loaded)
    return MergePlan(checkpoint, {}, ())


def _write(
    plan: MergePlan,
    target: Path,
    inputs: Sequence[Path],
    compute: Compute,
    overwrite: bool,
    dry_run: bool,
    progress: Progress | None,
) -> Mapping[str, TensorResult]:
    """Write the planned checkpoint, or only ask whether its destination would be accepted."""
    model = plan.checkpoint.base
    check_suffix(model, target)
    if dry_run:
        given = [model.path, *inputs]
        check_destination(target, folder=model.is_folder, overwrite=overwrite, inputs=given)
        return {}
    return write_checkpoint(
        plan.checkpoint,
        target,
        compute=compute,
        overwrite=overwrite,
        inputs=inputs,
        accept=_refuse_no_change,
        progress=progress,
    )


def _refuse_no_change(results: Mapping[str, TensorResult]) -> None:
    if not results or any(result.changed for result in results.values()):
        return
    if all(result.change_norm == 0 for result in results.values()):
        raise MatchError(
            "the merge changes nothing: every change is zero",
            hint="is this adapter trained? (lora_B starts at zero)",
        )
    raise MatchError(
        "the merge changes nothing: every change is below the base's precision",
        hint="raise the strength, or write a wider type with --dtype fp32",
    )


def _report(
    operation: str,
    base: BaseModel,
    loaded: Sequence[LoadedAdapter],
    plan: MergePlan,
    results: Mapping[str, TensorResult],
    output: str | None,
) -> Report:
    items = [
        _item(plan.checkpoint.works[name], placement, results.get(name))
        for name, placements in plan.placements.items()
        for placement in placements
    ]
    return Report(
        operation,
        (str(base.path), *(one.path for one in loaded)),
        output,
        {"adapters": [_adapter_fact(one) for one in loaded], **_tensor_facts(base, plan, results)},
        tuple(items),
        (*plan.notes, *_replacement_notes(plan, results), *_unchanged_notes(plan, results)),
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


def _tensor_facts(
    base: BaseModel, plan: MergePlan, results: Mapping[str, TensorResult]
) -> dict[str, Json]:
    works = plan.checkpoint.works
    touched = [work for work in works.values() if _moved(work, base)]
    facts: dict[str, Json] = {
        "tensors": len(works),
        "tensors_touched": len(touched),
        "tensors_added": sorted(name for name in works if name not in base.tensors),
        "parameters_touched": sum(work.elements for work in touched),
        "bytes_written": plan.checkpoint.nbytes,
        "bytes_copied": sum(work.nbytes for work in works.values() if work.is_copy),
        "dtypes": sorted({work.dtype for work in works.values()}),
    }
    if results:
        facts["tensors_changed"] = sum(result.changed for result in results.values())
        facts["relative_change"] = _relative_change(results)
    return facts


def _moved(work: TensorWork, base: BaseModel) -> bool:
    """Return whether a work does more to the base's own tensor than copy or convert it."""
    return work.folds is not None or work.source is not base.tensors.get(work.name)


def _relative_change(results: Mapping[str, TensorResult]) -> float:
    change = sum(result.change_norm**2 for result in results.values())
    weight = sum(result.result_norm**2 for result in results.values())
    return float((change / weight) ** 0.5) if weight else math.inf


def _item(work: TensorWork, placement: Placement, result: TensorResult | None) -> dict[str, Json]:
    delta = placement.delta
    return {
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
        "dtype": work.dtype,
        "changed": result.changed if result else None,
        "change_norm": result.change_norm if result else None,
        "result_norm": result.result_norm if result else None,
    }


def _replacement_notes(plan: MergePlan, results: Mapping[str, TensorResult]) -> Iterator[Note]:
    for name, placements in plan.placements.items():
        if any(isinstance(placement.delta, Replacement) for placement in placements):
            kept = name in results and not results[name].changed
            word = "the adapter's copy equals the base's" if kept else "replaced by the adapter's"
            yield Note(word, subject=name)


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
