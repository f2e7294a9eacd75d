"""What ``quantize`` and ``dequantize`` write: plans of whole outputs, with what is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.basemodel import BaseModel
from loratools.basetensors import quantisation_fields
from loratools.codecs.ggml_mixes import Mix, choose_types
from loratools.errors import OptionError, UnsupportedError
from loratools.planning.for_adapter import plan_trained_packing, plan_trained_unpacking
from loratools.planning.gguf_checkpoint import as_folder, from_checkpoint, to_checkpoint
from loratools.planning.loading import PathLike
from loratools.planning.pack_targets import PACKED_TARGETS
from loratools.planning.packing import plan_packing
from loratools.planning.recoding import (
    FLOAT_MIXES,
    first_header,
    model_facts,
    plan_recoding,
    size_facts,
    type_words,
)
from loratools.planning.trained_base import find_trained
from loratools.planning.trained_schemes import is_named
from loratools.planning.unpacking import plan_unpacking
from loratools.report import Json, Note
from loratools.streaming.checkpoint import REMOVED, Checkpoint, dtype_fields
from loratools.streaming.layouts import FileWork
from loratools.streaming.works import TensorWork
from loratools.tensorfiles.dtypes import DTYPES

_CONVERT = (
    "llama.cpp's convert_hf_to_gguf.py makes a GGUF of a Hugging Face folder, tokenizer included; "
    "or give a GGUF of the same model with --template"
)


@dataclass(frozen=True, slots=True)
class Job:
    """A planned output, a file or a folder.

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


def recoded_job(model: BaseModel, mix: Mix) -> Job:
    """Plan a GGUF model in the types of a mix; see ``plan_recoding``."""
    _refuse_no_gguf(model, _CONVERT)
    plan = plan_recoding(model, mix)
    return gguf_job(model, plan.checkpoint, plan.mix, plan.notes)


def gguf_job(model: BaseModel, checkpoint: Checkpoint, mix: str, notes: Sequence[Note]) -> Job:
    """Return the output that a plan of a GGUF model makes."""
    facts: dict[str, Json] = {"mix": mix, **size_facts(model, checkpoint)}
    return Job(checkpoint, model.path, model.files, facts, notes)


def packed_job(model: BaseModel, word: str, template: PathLike | None) -> Job:
    """Plan a checkpoint in the packed scheme that a word of ``--to`` names."""
    if template is not None:
        raise OptionError(f"--to {word} is no GGUF type", hint="leave out --template")
    checkpoint, notes = plan_packing(model, PACKED_TARGETS[word], word)
    facts: dict[str, Json] = {"mix": word, **size_facts(model, checkpoint)}
    return Job(checkpoint, model.path, model.files, facts, notes)


def unpacked_job(model: BaseModel, dtype: str | None, base_config: PathLike | None) -> Job:
    """Plan a quantised checkpoint in plain numbers."""
    if base_config is not None:
        raise OptionError(f"{model.path} has a config of its own", hint="leave out --base-config")
    checkpoint, word, notes = plan_unpacking(model, dtype)
    facts: dict[str, Json] = {"dtype": word, **size_facts(model, checkpoint)}
    return Job(checkpoint, model.path, model.files, facts, notes)


def job_for_adapter(
    model: BaseModel, adapter: PathLike, to: str | None, template: PathLike | None
) -> Job:
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
    return Job(checkpoint, model.path, model.files, facts, notes)


def seen_by_adapter_job(
    model: BaseModel, adapter: PathLike, dtype: str | None, base_config: PathLike | None
) -> Job:
    """Plan the weights of a base as an adapter saw them."""
    _refuse_gguf(model)
    if base_config is not None:
        raise OptionError(f"{model.path} has a config of its own", hint="leave out --base-config")
    trained = find_trained(adapter)
    checkpoint, word, notes = plan_trained_unpacking(model, trained, dtype)
    facts: dict[str, Json] = {"dtype": word, "trained_base": trained.base}
    facts |= size_facts(model, checkpoint)
    return Job(checkpoint, model.path, model.files, facts, notes)


def template_job(folder: BaseModel, template: BaseModel, mix: Mix) -> Job:
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
    return Job(checkpoint, template.path, (*folder.files, *template.files), facts, (told, *notes))


def _kept(template: BaseModel, name: str) -> str:
    """Return the type of a tensor that is never quantised: the template's, if it is plain."""
    tensor = template.tensors[name]
    return tensor.dtype if tensor.dtype in DTYPES else "F32"


def checkpoint_job(model: BaseModel, config: BaseModel | None, dtype: str, output: Path) -> Job:
    """Plan a GGUF model as a checkpoint, beside a folder's config if one is given."""
    tensors, notes = to_checkpoint(model, config.path if config else None)
    word = FLOAT_MIXES[dtype]
    works = tuple(TensorWork(n, word, tensor.shape, tensor) for n, tensor in tensors.items())
    stand_in = as_folder(config, model)
    edits = {} if config is None else _config_edits(config, word)
    files = (FileWork("model.safetensors", works, stand_in.shards[0]),)
    checkpoint = Checkpoint(stand_in, files, edits)
    facts: dict[str, Json] = {"dtype": word, **size_facts(model, checkpoint)}
    if config is None:
        lone = Note(
            "only the weights: config.json and the tokenizer are not in a GGUF file in this form; "
            "--base-config FOLDER brings them along",
            "warning",
        )
        return Job(checkpoint, output, model.files, facts, (lone, *notes))
    return Job(checkpoint, config.path, (*model.files, *config.files), facts, notes)


def _config_edits(config: BaseModel, word: str) -> dict[str, Any]:
    """Return the words of ``config.json`` that no longer hold."""
    gone = dict.fromkeys(quantisation_fields(config.config or {}), REMOVED)
    return {**gone, **dtype_fields(config, word)}


def _refuse_no_gguf(model: BaseModel, hint: str) -> None:
    if not model.is_gguf:
        raise UnsupportedError(f"{model.path}: not a GGUF model", hint=hint)


def refuse_plain(model: BaseModel) -> None:
    """Raise UnsupportedError for a checkpoint that is not quantised."""
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
