"""Folding adapters into a base checkpoint, and taking them out again.

W' = W + Σ strength·(change), summed in float32 and rounded once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from loratools.adapter_io import find_weights
from loratools.basemodel import BaseModel, Pipeline, is_pipeline, open_base, open_pipeline
from loratools.compute import Compute, resolve_compute
from loratools.deltas import Replacement
from loratools.errors import MatchError
from loratools.planning.absent_layers import describe_absent, find_absent_layers
from loratools.planning.block_shares import share_by_block
from loratools.planning.compat import read_all_as_tool
from loratools.planning.merge_plan import (
    AdapterInput,
    LoadedAdapter,
    MergePlan,
    PathLike,
    load_adapters,
    plan_merge,
)
from loratools.planning.networks import plan_pipeline
from loratools.planning.no_change import Touched, refuse_no_change, refuse_untrained
from loratools.planning.placement import Placement
from loratools.planning.quantising import KEEP, retained_fact, retention_notes
from loratools.planning.unmerge_plan import (
    bound_notes,
    error_bounds,
    plan_pipeline_unmerge,
    plan_unmerge,
)
from loratools.report import Json, Note, Report
from loratools.streaming.blocks import TensorResult, TensorWork
from loratools.streaming.checkpoint import Results, check_suffix, write_checkpoints
from loratools.streaming.rewriting import Progress
from loratools.tensorfiles.atomic import require_space
from loratools.tensorfiles.destination import check_destination


def merge_into_base(  # noqa: PLR0913 - one keyword for each option of the command
    base: PathLike,
    adapters: AdapterInput | Sequence[AdapterInput],
    output: PathLike,
    *,
    dtype: str = "keep",
    device: str = "cpu",
    arch: str | None = None,
    block_strengths: str | None = None,
    compat: str | None = None,
    quant: str = KEEP,
    residual_base: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Fold ``adapters`` into the checkpoint at ``base`` and write the result to ``output``.

    Every byte that no adapter touches is copied. Each touched weight becomes
    W + Σ strength·(W′ − W), every W′ of the unmerged W, summed in float32 and rounded once.

    Args:
        base: a Hugging Face folder, a diffusers pipeline or component folder, or one weights file
            (of a language model, LDM, BFL, ComfyUI ...).
        adapters: paths, or (path, strength) pairs, in any format.
        output: a folder if the base is one, else a .safetensors file.
        dtype: ``keep``, ``fp32``, ``bf16`` or ``fp16`` for every float tensor of the output.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``auto``.
        arch: the adapters' architecture, where the files do not tell.
        block_strengths: 12, 17, 20 or 26 numbers for Stable Diffusion's blocks, or
            ``PATTERN=NUMBER`` pairs, separated by commas; they multiply the strengths.
        compat: fold as ``comfyui``, ``lycoris``, ``sd-scripts`` or ``a1111`` does where that is
            not the formula.
        quant: type of touched tensors that are stored in blocks (GGUF): ``keep``,
            ``dequantize`` (float16, or ``dtype``) or a type such as ``q8_0``.
        residual_base: the base already lacks what PiSSA, OLoRA ... took out of it.
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        progress: called with the bytes just written and those of the whole job, from several
            threads.

    Raises:
        InputError: files that cannot be used (see the subclasses in ``loratools.errors``).
        MatchError: an adapter tensor without a home in the base, or a merge that changes nothing.
        OutputError: the destination is refused.
        OptionError: an unknown dtype, device or tool, or a strength that is 0 or not finite.
    """
    root = Path(base)
    compute = resolve_compute(device)
    opened = _open(root)
    loaded = load_adapters(adapters)
    plan = partial(plan_merge, dtype=dtype, residual_base=residual_base, arch=arch, quant=quant)
    shares = read_all_as_tool(loaded, compat) if compat else loaded
    shares = share_by_block(shares, block_strengths, arch) if block_strengths else shares
    if isinstance(opened, Pipeline):
        plans = plan_pipeline(opened, shares, plan, arch)
        job = _Job(root, plans, loaded, opened.files, opened.other_files)
    else:
        job = _Job(root, {"": plan(opened, shares)}, loaded, opened.files)
    results = _write(job, Path(output), compute, overwrite, dry_run, progress)
    report = _report("merge", job, results, None if dry_run else str(output))
    return replace(report, notes=(*report.notes, *_absent_notes(opened, loaded)))


def _absent_notes(base: BaseModel | Pipeline, loaded: Sequence[LoadedAdapter]) -> Iterator[Note]:
    """Yield a warning for every adapter that lacks layers which its config announces."""
    if isinstance(base, Pipeline):
        return
    for one in loaded:
        if absent := find_absent_layers(base, one.adapter):
            yield Note(describe_absent(one.path, absent), "warning")


def unmerge_from_base(
    merged: PathLike,
    adapters: AdapterInput | Sequence[AdapterInput],
    output: PathLike,
    *,
    base: PathLike | None = None,
    device: str = "cpu",
    arch: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Take ``adapters`` out of the checkpoint at ``merged`` again and write it to ``output``.

    With ``base`` every tensor the adapters touched is copied back: exact. Without it their change
    is subtracted, and the report bounds the error that two roundings leave.

    Args:
        merged: the merged checkpoint: a model or a diffusers pipeline folder, or one weights file.
        adapters: what was merged, with the same strengths; may be empty if ``base`` is given.
        output: a folder if ``merged`` is one, else a .safetensors file.
        base: the checkpoint they were merged into.
        device: see ``merge_into_base``.
        arch: the adapters' architecture, where the files do not tell.
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        progress: called with the bytes just written and those of the whole job, from several
            threads.

    Raises:
        UnsupportedError: without a base: DoRA, replaced tensors, initialisations that move it.
        OptionError: neither adapters nor a base.
        InputError, MatchError, OutputError: as for ``merge_into_base``.
    """
    model = _open(Path(merged))
    original = _open(Path(base)) if base is not None else None
    loaded = load_adapters(adapters, allow_none=original is not None)
    compute = resolve_compute(device)
    plans = _unmerge_plans(model, original, loaded, arch)
    files = (*model.files, *(original.files if original else ()))
    others = model.other_files if isinstance(model, Pipeline) else ()
    job = _Job(Path(merged), plans, loaded, files, others)
    results = _write(job, Path(output), compute, overwrite, dry_run, progress)
    facts: dict[str, Json] = {"method": "copied from base" if original else "subtracted"}
    facts |= {"base": str(base)} if original else {}
    more, notes = _bounds(plans, results)
    report = _report("unmerge", job, results, None if dry_run else str(output))
    facts = {**report.facts, **facts, **more}
    return replace(report, facts=facts, notes=(*report.notes, *notes))


def _open(path: Path) -> BaseModel | Pipeline:
    return open_pipeline(path) if is_pipeline(path) else open_base(path)


def _unmerge_plans(
    merged: BaseModel | Pipeline,
    base: BaseModel | Pipeline | None,
    loaded: Sequence[LoadedAdapter],
    arch: str | None,
) -> Mapping[str, MergePlan]:
    if isinstance(merged, Pipeline) and not isinstance(base, BaseModel):
        return plan_pipeline_unmerge(merged, base, loaded, arch)
    if isinstance(merged, BaseModel) and not isinstance(base, Pipeline):
        return {"": plan_unmerge(merged, base, loaded, arch)}
    raise MatchError(
        "one of merged and base is a whole pipeline, the other is one model",
        hint="give two pipelines, or the same network's folder of both",
    )


def _bounds(
    plans: Mapping[str, MergePlan], results: Results
) -> tuple[dict[str, Json], Sequence[Note]]:
    """Return facts and notes on what subtraction may have left, over all networks."""
    bounds: dict[str, float] = {}
    changed: dict[str, TensorResult] = {}
    for component, found in results.items():
        of_one = error_bounds(plans[component].checkpoint.works, found)
        bounds |= {f"{component}/{name}": bound for name, bound in of_one.items()}
        changed |= {f"{component}/{name}": result for name, result in found.items()}
    return bound_notes(bounds, changed) if changed else ({}, [])


@dataclass(frozen=True, slots=True)
class _Job:
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


def _write(
    job: _Job,
    target: Path,
    compute: Compute,
    overwrite: bool,
    dry_run: bool,
    progress: Progress | None,
) -> Results:
    """Write the planned checkpoints, or only ask whether their destination would be accepted."""
    refuse_untrained(
        p for plan in job.plans.values() for ps in plan.placements.values() for p in ps
    )
    inputs = [*job.files, *(find_weights(Path(one.path)) for one in job.loaded)]
    folder = job.root.is_dir() or any(p.checkpoint.base.is_folder for p in job.plans.values())
    check_suffix(job.root, target, folder=folder)
    if dry_run:
        check_destination(target, folder=folder, overwrite=overwrite, inputs=inputs)
        require_space(target.parent, sum(p.checkpoint.nbytes for p in job.plans.values()))
        return {}
    return write_checkpoints(
        {name: plan.checkpoint for name, plan in job.plans.items()},
        target,
        compute=compute,
        root=job.root,
        other_files=job.other_files,
        overwrite=overwrite,
        inputs=inputs,
        accept=lambda results: refuse_no_change(_touched(job, results)),
        progress=progress,
    )


def _touched(job: _Job, results: Results) -> list[Touched]:
    found = []
    for component, plan in job.plans.items():
        works = plan.checkpoint.works
        for name, result in results[component].items():
            found.append(Touched(plan.placements.get(name, ()), works[name].dtype, result))
    return found


def _report(operation: str, job: _Job, results: Results, output: str | None) -> Report:
    items: list[dict[str, Json]] = []
    notes: list[Note] = []
    for component, plan in job.plans.items():
        found = results.get(component, {})
        works = plan.checkpoint.works
        for name, placements in plan.placements.items():
            items += [_item(component, works[name], p, found.get(name)) for p in placements]
        notes += [*plan.notes, *_replacement_notes(plan, found), *_unchanged_notes(plan, found)]
        notes += retention_notes(found)
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


def _tensor_facts(job: _Job, results: Results) -> dict[str, Json]:
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
