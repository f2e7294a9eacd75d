"""Models in types of fewer bits, and back in plain numbers."""

from __future__ import annotations

from pathlib import Path

from loratools.basemodel import open_base, open_side_files
from loratools.compute import resolve_compute
from loratools.errors import OptionError
from loratools.hub.taking import takes_references
from loratools.planning.merge_plan import PathLike
from loratools.planning.pack_targets import PACKED_TARGETS
from loratools.planning.quantised_outputs import (
    Job,
    checkpoint_job,
    gguf_job,
    job_for_adapter,
    packed_job,
    recoded_job,
    refuse_plain,
    seen_by_adapter_job,
    template_job,
    unpacked_job,
)
from loratools.planning.recoding import (
    FLOAT_MIXES,
    is_copied,
    plan_dequantising,
    writable_mix,
)
from loratools.report import Json, Report
from loratools.streaming.checkpoint import (
    check_suffix,
    write_checkpoints,
)
from loratools.streaming.rewriting import Progress
from loratools.streaming.works import TensorWork
from loratools.tensorfiles.atomic import require_space
from loratools.tensorfiles.destination import check_destination


@takes_references(base="planned", template="planned", for_adapter="adapter")
def quantize_base(
    base: PathLike,
    output: PathLike,
    *,
    to: str | None = None,
    template: PathLike | None = None,
    for_adapter: PathLike | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the model at ``base`` in the types that ``to`` names.

    Args:
        base: a GGUF model, in one or several files; or a Hugging Face folder.
        output: a .gguf file; a folder for a model in several, and for one of Hugging Face.
        to: a GGUF type or one of llama-quantize's mixes (``q8_0``, ``q4_k_m`` ...), in any case,
            for a GGUF model, and for a folder with ``template``. For a folder without: ``nf4``,
            ``nf4-double``, ``fp4``, ``fp4-double``, ``int8`` (bitsandbytes), ``fp8`` (blocks of
            128×128), ``mlx-2`` ... ``mlx-8`` (groups of 64).
        template: a GGUF of the same architecture and sizes, whose metadata (tokenizer), tensor
            names and order the output takes.
        for_adapter: an adapter whose base was quantised: ``base`` is written in that scheme, and
            ``to`` need not be said.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``auto``.
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        progress: called with the bytes just written and those of the whole job, from several
            threads.

    Raises:
        OptionError: no such type, none at all, or another than the adapter's.
        UnsupportedError: a type that takes an importance matrix, a base that cannot be read or
            whose tensors have no place in GGUF.
        MatchError: base and template are not the same model.
        InputError: nothing would change.
        OutputError: the destination is refused.
    """
    model = open_base(Path(base))
    if for_adapter is not None:
        job = job_for_adapter(model, for_adapter, to, template)
        return _write("quantize", base, job, output, device, overwrite, dry_run, progress)
    if to is None:
        raise OptionError(
            "neither --to nor --for-adapter", hint="say the type: --to nf4, --to q8_0 ..."
        )
    if to.lower() in PACKED_TARGETS:
        job = packed_job(model, to.lower(), template)
        return _write("quantize", base, job, output, device, overwrite, dry_run, progress)
    mix = writable_mix(to)
    if template is not None:
        job = template_job(model, open_base(Path(template)), mix)
    else:
        job = recoded_job(model, mix)
    return _write("quantize", base, job, output, device, overwrite, dry_run, progress)


@takes_references(base="planned", base_config="side", for_adapter="adapter")
def dequantize_base(
    base: PathLike,
    output: PathLike,
    *,
    dtype: str | None = None,
    base_config: PathLike | None = None,
    for_adapter: PathLike | None = None,
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Report:
    """Write the quantised model at ``base`` in plain numbers: a GGUF one as GGUF or a checkpoint.

    Args:
        base: a GGUF model, in one or several files, or a quantised checkpoint (bitsandbytes, GPTQ,
            AWQ, FP8, MLX ...), which stays what it is, a folder or a .safetensors file.
        output: a .gguf file (a folder for a model in several files), a .safetensors file, or
            with ``base_config`` a folder.
        dtype: ``fp32``, ``fp16`` or ``bf16``. By default float16 for what was quantised; other
            tensors of a GGUF output stay as they are, those of a checkpoint are float16 too.
        base_config: a Hugging Face folder of the same architecture, whose config and tokenizer
            come along, and whose weights, if it has any, settle the names.
        for_adapter: an adapter whose base was quantised: what it saw of the weights is written,
            of a base in that scheme or of its 16-bit original, by default in the type that they
            had in training.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``mps`` or ``auto``.
        overwrite: replace an existing output.
        dry_run: plan and check everything, write nothing.
        progress: called with the bytes just written and those of the whole job, from several
            threads.

    Raises:
        UnsupportedError: a base that is no GGUF model, tensors without a place in a checkpoint.
        OptionError: an unknown dtype.
        MatchError: the folder is another model's.
        InputError: nothing would change.
        OutputError: the destination is refused.
    """
    if dtype is not None and dtype not in FLOAT_MIXES:
        raise OptionError(f"unknown dtype {dtype!r}", hint=f"use {', '.join(FLOAT_MIXES)}")
    model = open_base(Path(base))
    if for_adapter is not None:
        job = seen_by_adapter_job(model, for_adapter, dtype, base_config)
        return _write("dequantize", base, job, output, device, overwrite, dry_run, progress)
    if model.packed:
        job = unpacked_job(model, dtype, base_config)
        return _write("dequantize", base, job, output, device, overwrite, dry_run, progress)
    refuse_plain(model)
    if base_config is not None or Path(output).suffix == ".safetensors":
        config = None if base_config is None else open_side_files(Path(base_config))
        job = checkpoint_job(model, config, dtype or "fp16", Path(output))
    else:
        plan = plan_dequantising(model, dtype)
        job = gguf_job(model, plan.checkpoint, plan.mix, plan.notes)
    return _write("dequantize", base, job, output, device, overwrite, dry_run, progress)


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def _write(
    operation: str,
    base: PathLike,
    job: Job,
    output: PathLike,
    device: str,
    overwrite: bool,
    dry_run: bool,
    progress: Progress | None,
) -> Report:
    target, compute = Path(output), resolve_compute(device)
    folder = job.root.is_dir() or job.checkpoint.base.is_folder
    check_suffix(job.root, target, folder=folder)
    if dry_run:
        check_destination(target, folder=folder, overwrite=overwrite, inputs=list(job.inputs))
        require_space(target.parent, job.checkpoint.nbytes)
    else:
        write_checkpoints(
            {"": job.checkpoint},
            target,
            compute=compute,
            root=job.root,
            overwrite=overwrite,
            inputs=list(job.inputs),
            progress=progress,
        )
    return Report(
        operation,
        (str(base),),
        None if dry_run else str(output),
        job.facts,
        tuple(_item(work) for work in job.checkpoint.works.values()),
        tuple(job.notes),
        dry_run=dry_run,
    )


def _item(work: TensorWork) -> dict[str, Json]:
    return {
        "tensor": work.name,
        "from": work.source.dtype,
        "dtype": work.dtype,
        "shape": list(work.shape),
        "bytes": work.nbytes,
        "copied": is_copied(work),
    }
