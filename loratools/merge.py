"""Folding adapters into a base checkpoint, and taking them out again.

W' = W + Σ strength·(change), summed in float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from loratools.adapter_io import find_weights
from loratools.basemodel import BaseModel, Pipeline, is_pipeline, open_base, open_pipeline
from loratools.compute import Compute, resolve_compute
from loratools.errors import MatchError
from loratools.hub.taking import takes_references
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
from loratools.planning.merge_report import MergeJob, merge_report, touched_tensors
from loratools.planning.networks import plan_pipeline
from loratools.planning.no_change import refuse_no_change, refuse_untrained
from loratools.planning.packed_bases import NEAREST, shaping_strength
from loratools.planning.quantising import check_quant
from loratools.planning.residual import ResidualPlan, left_nothing, plan_residual
from loratools.planning.unmerge_plan import (
    bound_notes,
    error_bounds,
    plan_pipeline_unmerge,
    plan_unmerge,
)
from loratools.report import Json, Note, Report
from loratools.streaming.checkpoint import Results, check_suffix, write_checkpoints
from loratools.streaming.rewriting import Progress
from loratools.streaming.works import TensorResult
from loratools.tensorfiles.atomic import require_space
from loratools.tensorfiles.beside import residual_places
from loratools.tensorfiles.destination import check_destination


@takes_references(base="planned", adapters="adapter")
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
    quant: str | None = None,
    rounding: str = NEAREST,
    rounding_strength: float | None = None,
    residual_rank: int | None = None,
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
        quant: what becomes of a quantised base: ``keep`` codes touched tensors again in their own
            type (the default for GGUF), ``dequantize`` writes plain numbers (the default for the
            others: all of their weights; GGUF: touched tensors in float16, or ``dtype``); for
            GGUF also a type such as ``q8_0``.
        rounding: ``nearest``, or ``adapter-aware``: scales stay, and codes are chosen so that the
            error avoids the inputs that the adapters act on.
        rounding_strength: how much more an error there counts than one elsewhere.
        residual_rank: also write what rounding to few bits left out, as an adapter of this rank
            beside ``output``, with ``-residual`` behind its name: a GGUF file for a GGUF model, a
            PEFT folder for a checkpoint, one of diffusers' for a pipeline.
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
    if quant is not None:
        # Bases that are not quantised have no use for it, and a mistyped word would pass unseen.
        check_quant(quant)
    opened = _open(root, "the base comes first, then the adapters")
    loaded = load_adapters(adapters)
    shaping = shaping_strength(rounding, rounding_strength)
    plan = partial(
        plan_merge,
        dtype=dtype,
        residual_base=residual_base,
        arch=arch,
        quant=quant,
        shaping=shaping,
    )
    shares = read_all_as_tool(loaded, compat) if compat else loaded
    shares = share_by_block(shares, block_strengths, arch) if block_strengths else shares
    if isinstance(opened, Pipeline):
        plans = plan_pipeline(opened, shares, plan, arch)
        job = MergeJob(root, plans, loaded, opened.files, opened.other_files)
    else:
        job = MergeJob(root, {"": plan(opened, shares)}, loaded, opened.files)
    residual = None
    if residual_rank is not None:
        residual = plan_residual(job.plans, Path(output), residual_rank, arch)
        job = replace(job, plans=residual.plans)
    results = _write(job, Path(output), compute, overwrite, dry_run, progress, residual)
    report = merge_report("merge", job, results, None if dry_run else str(output))
    notes = [*report.notes, *_absent_notes(opened, loaded)]
    if residual is None:
        return replace(report, notes=(*notes, *_stale_notes(Path(output))))
    facts: dict[str, Json] = {**report.facts, "residual": residual.facts(results)}
    return replace(report, facts=facts, notes=(*notes, *residual.notes(results)))


def _stale_notes(output: Path) -> Iterator[Note]:
    """Yield a warning for the residual of another merge, which looks like one of this."""
    for place in residual_places(output):
        if place.exists():
            words = "what an earlier merge left out: it is not of this model; remove it"
            yield Note(words, "warning", str(place))


def _absent_notes(base: BaseModel | Pipeline, loaded: Sequence[LoadedAdapter]) -> Iterator[Note]:
    """Yield a warning for every adapter that lacks layers which its config announces."""
    if isinstance(base, Pipeline):
        return
    for one in loaded:
        if absent := find_absent_layers(base, one.adapter):
            yield Note(describe_absent(one.path, absent), "warning")


@takes_references(merged="model", adapters="adapter", base="model")
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
    model = _open(Path(merged), "the merged model comes first, then the adapters")
    original = _open(Path(base)) if base is not None else None
    loaded = load_adapters(adapters, allow_none=original is not None)
    compute = resolve_compute(device)
    plans = _unmerge_plans(model, original, loaded, arch)
    files = (*model.files, *(original.files if original else ()))
    others = model.other_files if isinstance(model, Pipeline) else ()
    job = MergeJob(Path(merged), plans, loaded, files, others)
    results = _write(job, Path(output), compute, overwrite, dry_run, progress)
    facts: dict[str, Json] = {"method": "copied from base" if original else "subtracted"}
    facts |= {"base": str(base)} if original else {}
    more, notes = _bounds(plans, results)
    report = merge_report("unmerge", job, results, None if dry_run else str(output))
    facts = {**report.facts, **facts, **more}
    return replace(report, facts=facts, notes=(*report.notes, *notes))


def _open(path: Path, instead: str = "") -> BaseModel | Pipeline:
    return open_pipeline(path) if is_pipeline(path) else open_base(path, instead=instead)


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


def _write(
    job: MergeJob,
    target: Path,
    compute: Compute,
    overwrite: bool,
    dry_run: bool,
    progress: Progress | None,
    residual: ResidualPlan | None = None,
) -> Results:
    """Write the planned checkpoints, or only ask whether their destination would be accepted.

    Beside a ``residual`` they may be the base's own bytes: what they lack is written with them.
    """
    refuse_untrained(
        p for plan in job.plans.values() for ps in plan.placements.values() for p in ps
    )
    inputs = [*job.files, *(find_weights(Path(one.path)) for one in job.loaded)]
    folder = job.root.is_dir() or any(p.checkpoint.base.is_folder for p in job.plans.values())
    check_suffix(job.root, target, folder=folder)
    if residual:
        residual.check(inputs, overwrite=overwrite)
    if dry_run:
        check_destination(target, folder=folder, overwrite=overwrite, inputs=inputs)
        require_space(target.parent, sum(p.checkpoint.nbytes for p in job.plans.values()))
        return {}
    beside = residual.staged(inputs, overwrite=overwrite) if residual else nullcontext()
    with beside as staged:

        def accept(results: Results) -> None:
            if residual is None or left_nothing(results):
                refuse_no_change(touched_tensors(job, results))
            if residual and staged:
                residual.write(results, staged)

        return write_checkpoints(
            {name: plan.checkpoint for name, plan in job.plans.items()},
            target,
            compute=compute,
            root=job.root,
            other_files=job.other_files,
            overwrite=overwrite,
            inputs=inputs,
            accept=accept,
            progress=progress,
        )
