"""Models in types of fewer bits, and back in plain numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.basemodel import BaseModel, open_base, open_side_files
from loratools.codecs.ggml_mixes import Mix, choose_types
from loratools.compute import resolve_compute
from loratools.errors import OptionError, UnsupportedError
from loratools.hub.taking import takes_references
from loratools.planning.for_adapter import plan_trained_packing, plan_trained_unpacking
from loratools.planning.gguf_checkpoint import as_folder, from_checkpoint, to_checkpoint
from loratools.planning.merge_plan import PathLike
from loratools.planning.packing import PACKED_TARGETS, plan_packing
from loratools.planning.recoding import (
    FLOAT_MIXES,
    first_header,
    is_copied,
    model_facts,
    plan_dequantising,
    plan_recoding,
    size_facts,
    type_words,
    writable_mix,
)
from loratools.planning.trained_base import find_trained
from loratools.planning.trained_schemes import is_named
from loratools.planning.unpacking import plan_unpacking
from loratools.report import Json, Note, Report
from loratools.streaming.blocks import TensorWork
from loratools.streaming.checkpoint import (
    REMOVED,
    Checkpoint,
    check_suffix,
    write_checkpoints,
)
from loratools.streaming.layouts import FileWork
from loratools.streaming.rewriting import Progress
from loratools.tensorfiles.atomic import require_space
from loratools.tensorfiles.destination import check_destination
from loratools.tensorfiles.dtypes import DTYPES

_CONVERT = (
    "llama.cpp's convert_hf_to_gguf.py makes a GGUF of a Hugging Face folder, tokenizer included; "
    "or give a GGUF of the same model with --template"
)

_QUANTISED = ("quantization_config", "compression_config", "quantization")
"""Words of ``config.json`` that plain numbers make wrong."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A planned output.

    Attributes:
        checkpoint: what is written.
        root: what the output is like: a file or a folder.
        inputs: files that must survive.
        facts: what the report says first.
        notes: decisions to report.
    """

    checkpoint: Checkpoint
    root: Path
    inputs: Sequence[Path]
    facts: dict[str, Json]
    notes: Sequence[Note] = ()


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
        job = _for_adapter(model, for_adapter, to, template)
        return _write("quantize", base, job, output, device, overwrite, dry_run, progress)
    if to is None:
        raise OptionError(
            "neither --to nor --for-adapter", hint="say the type: --to nf4, --to q8_0 ..."
        )
    if to.lower() in PACKED_TARGETS:
        job = _packed(model, to.lower(), template)
        return _write("quantize", base, job, output, device, overwrite, dry_run, progress)
    mix = writable_mix(to)
    if template is not None:
        job = _by_template(model, open_base(Path(template)), mix)
    else:
        job = _recoded(model, mix)
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
        job = _seen_by_adapter(model, for_adapter, dtype, base_config)
        return _write("dequantize", base, job, output, device, overwrite, dry_run, progress)
    if model.packed:
        job = _unpacked(model, dtype, base_config)
        return _write("dequantize", base, job, output, device, overwrite, dry_run, progress)
    _refuse_plain(model)
    if base_config is not None or Path(output).suffix == ".safetensors":
        config = None if base_config is None else open_side_files(Path(base_config))
        job = _as_checkpoint(model, config, dtype or "fp16", Path(output))
    else:
        plan = plan_dequantising(model, dtype)
        job = _gguf_job(model, plan.checkpoint, plan.mix, plan.notes)
    return _write("dequantize", base, job, output, device, overwrite, dry_run, progress)


# ── plans ────────────────────────────────────────────────────────────────────────────────────


def _recoded(model: BaseModel, mix: Mix) -> _Job:
    _refuse_no_gguf(model, _CONVERT)
    plan = plan_recoding(model, mix)
    return _gguf_job(model, plan.checkpoint, plan.mix, plan.notes)


def _gguf_job(model: BaseModel, checkpoint: Checkpoint, mix: str, notes: Sequence[Note]) -> _Job:
    facts: dict[str, Json] = {"mix": mix, **size_facts(model, checkpoint)}
    return _Job(checkpoint, model.path, model.files, facts, notes)


def _packed(model: BaseModel, word: str, template: PathLike | None) -> _Job:
    if template is not None:
        raise OptionError(f"--to {word} is no GGUF type", hint="leave out --template")
    checkpoint, notes = plan_packing(model, PACKED_TARGETS[word], word)
    facts: dict[str, Json] = {"mix": word, **size_facts(model, checkpoint)}
    return _Job(checkpoint, model.path, model.files, facts, notes)


def _unpacked(model: BaseModel, dtype: str | None, base_config: PathLike | None) -> _Job:
    if base_config is not None:
        raise OptionError(f"{model.path} has a config of its own", hint="leave out --base-config")
    checkpoint, word, notes = plan_unpacking(model, dtype)
    facts: dict[str, Json] = {"dtype": word, **size_facts(model, checkpoint)}
    return _Job(checkpoint, model.path, model.files, facts, notes)


def _for_adapter(
    model: BaseModel, adapter: PathLike, to: str | None, template: PathLike | None
) -> _Job:
    """Plan a base in the scheme that an adapter was trained against."""
    _refuse_gguf(model)
    if template is not None:
        raise OptionError("--for-adapter makes no GGUF model", hint="leave out --template")
    trained = find_trained(adapter)
    if to is not None and not is_named(trained.scheme, to.lower()):
        raise OptionError(
            f"--to {to}: {adapter} was trained against {trained.scheme.title}",
            hint="leave out --to or --for-adapter",
        )
    checkpoint, notes = plan_trained_packing(model, trained)
    facts: dict[str, Json] = {"mix": trained.scheme.title, "trained_base": trained.base}
    facts |= size_facts(model, checkpoint)
    return _Job(checkpoint, model.path, model.files, facts, notes)


def _seen_by_adapter(
    model: BaseModel, adapter: PathLike, dtype: str | None, base_config: PathLike | None
) -> _Job:
    """Plan the weights of a base as an adapter saw them."""
    _refuse_gguf(model)
    if base_config is not None:
        raise OptionError(f"{model.path} has a config of its own", hint="leave out --base-config")
    trained = find_trained(adapter)
    checkpoint, word, notes = plan_trained_unpacking(model, trained, dtype)
    facts: dict[str, Json] = {"dtype": word, "trained_base": trained.base}
    facts |= size_facts(model, checkpoint)
    return _Job(checkpoint, model.path, model.files, facts, notes)


def _by_template(folder: BaseModel, template: BaseModel, mix: Mix) -> _Job:
    """Plan a folder's weights in the place of a GGUF model's own."""
    header = first_header(template)
    if folder.is_gguf:
        raise OptionError(f"{folder.path}: already is a GGUF model", hint="leave out --template")
    if folder.packed:
        raise UnsupportedError(
            f"{folder.path}: quantised already, in a format of its own",
            hint="give the 16-bit original of this model",
        )
    tensors, notes = from_checkpoint(folder, template)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    types = choose_types(mix, shapes, model_facts(header, template))
    works = {
        name: TensorWork(name, types[name] or _kept(template, name), tensor.shape, tensor)
        for name, tensor in tensors.items()
    }
    files = tuple(
        FileWork(shard.path.name, tuple(works[t.name] for t in shard.tensors), shard)
        for shard in template.shards
    )
    files = (replace(files[0], words=type_words(mix)), *files[1:])
    checkpoint = Checkpoint(template, files, {})
    facts: dict[str, Json] = {"mix": mix.name, **size_facts(folder, checkpoint)}
    told = Note(f"metadata and tokenizer are those of {template.path}")
    return _Job(checkpoint, template.path, (*folder.files, *template.files), facts, (told, *notes))


def _kept(template: BaseModel, name: str) -> str:
    """Return the type of a tensor that is never quantised: the template's, if it is plain."""
    tensor = template.tensors[name]
    return tensor.dtype if tensor.dtype in DTYPES else "F32"


def _as_checkpoint(model: BaseModel, config: BaseModel | None, dtype: str, output: Path) -> _Job:
    tensors, notes = to_checkpoint(model, config.path if config else None)
    word = FLOAT_MIXES[dtype]
    works = tuple(TensorWork(n, word, tensor.shape, tensor) for n, tensor in tensors.items())
    stand_in = as_folder(config, model)
    edits = {} if config is None else _config_edits(config, dtype)
    files = (FileWork("model.safetensors", works, stand_in.shards[0]),)
    checkpoint = Checkpoint(stand_in, files, edits)
    facts: dict[str, Json] = {"dtype": word, **size_facts(model, checkpoint)}
    if config is None:
        lone = Note(
            "only the weights: config.json and the tokenizer are not in a GGUF file in this form; "
            "--base-config FOLDER brings them along",
            "warning",
        )
        return _Job(checkpoint, output, model.files, facts, (lone, *notes))
    return _Job(checkpoint, config.path, (*model.files, *config.files), facts, notes)


def _config_edits(config: BaseModel, dtype: str) -> dict[str, Json]:
    """Return the words of ``config.json`` that no longer hold."""
    said = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}[dtype]
    edits = {word: said for word in ("dtype", "torch_dtype") if config.config_word(word)}
    return {**edits, **{word: REMOVED for word in _QUANTISED if config.config_word(word)}}


def _refuse_no_gguf(model: BaseModel, hint: str) -> None:
    if not model.is_gguf:
        raise UnsupportedError(f"{model.path}: not a GGUF model", hint=hint)


def _refuse_plain(model: BaseModel) -> None:
    if not model.is_gguf:
        raise UnsupportedError(
            f"{model.path}: neither quantised nor a GGUF model: its weights are "
            f"{model.main_dtype} already",
            hint="use it as it is, or name the quantised model",
        )


def _refuse_gguf(model: BaseModel) -> None:
    if model.is_gguf:
        raise UnsupportedError(
            f"{model.path}: a GGUF model, and adapters are trained on checkpoints",
            hint="give the Hugging Face folder of the base",
        )


# ── writing ──────────────────────────────────────────────────────────────────────────────────


def _write(
    operation: str,
    base: PathLike,
    job: _Job,
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
