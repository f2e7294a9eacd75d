"""Whole models between GGUF and a Hugging Face checkpoint: names, layout, what is left over."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loratools.adapter import natural_key
from loratools.basemodel import BaseModel, BaseTensor, Shard
from loratools.errors import LoratoolsError, MatchError, UnsupportedError
from loratools.keymaps.gguf_base import GGUFBase, open_gguf_base
from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.gguf_names import Hit, in_memory, is_there, names_of, spell
from loratools.keymaps.gguf_vectors import (
    BUFFERS,
    EXCLUDED_BY,
    FROM_CONFIG,
    is_stored_turned,
    shift_of,
    whole_model,
)
from loratools.keymaps.gguf_weights import Gather, gather_weights
from loratools.report import Note
from loratools.streaming.gathering import gathered
from loratools.suggest import counted

_SHOWN = 12
_ENDS = (".weight", ".bias")
_HEAD, _TABLE = "output.weight", "token_embd.weight"
_SAME = "the template is a GGUF of the same model, or of a fine-tune of it"
_CONVERT = "llama.cpp's convert_hf_to_gguf.py makes a GGUF of the folder, which `quantize` takes"


@dataclass(slots=True)
class _Group:
    """The tensors of one row, block and end of names, by place or expert."""

    step: Step
    block: int | None
    end: str
    parts: dict[int, BaseTensor] = field(default_factory=dict)


def to_checkpoint(
    base: BaseModel, config: Path | None
) -> tuple[dict[str, BaseTensor], tuple[Note, ...]]:
    """Return a GGUF model's tensors in the names and the layout of a checkpoint.

    Args:
        base: a GGUF model.
        config: a folder with the checkpoint's ``config.json``, whose own weights, if there are
            any, settle the names.

    Raises:
        MatchError: the folder is another architecture's; names or shapes that it does not have.
        UnsupportedError: tensors without a place in a checkpoint, all listed; an architecture of
            which only adapters' modules are known.
    """
    known = _known(base, config)
    model = _rows(known, [name.rpartition(".")[0] for name in base.tensors])
    groups: dict[tuple[Step, int | None, str], _Group] = {}
    unknown, computed = [], []
    for name, tensor in base.tensors.items():
        hit = _target(name, model, known)
        if name in FROM_CONFIG:
            computed.append(name)
        elif hit is None:
            unknown.append(name)
        else:
            _add(groups, hit, name, tensor)
    _refuse_unknown(unknown, base, "a Hugging Face checkpoint")
    done: dict[str, BaseTensor] = {}
    for group in groups.values():
        done |= _undone(group, model, known)
    _check_shapes(done, known)
    notes = [Note(f"left out, because it follows from config.json: {n}") for n in computed]
    return dict(sorted(done.items(), key=lambda item: natural_key(item[0]))), tuple(notes)


def from_checkpoint(
    folder: BaseModel, template: BaseModel
) -> tuple[dict[str, BaseTensor], tuple[Note, ...]]:
    """Return a checkpoint's tensors in the names, the layout and the order of a GGUF model.

    Args:
        folder: a Hugging Face folder with ``config.json``.
        template: a GGUF model of the same architecture and sizes.

    Raises:
        MatchError: another architecture, or tensors that one has and the other lacks.
        UnsupportedError: see ``to_checkpoint``.
    """
    known = _known(template, folder.path)
    weights = [name for name in folder.tensors if not name.endswith(BUFFERS)]
    model = _rows(known, [name.rpartition(".")[0] for name in weights])
    groups: dict[tuple[Step, int | None, str], _Group] = {}
    unknown = []
    for name in weights:
        end = next((end for end in _ENDS if name.endswith(end)), "")
        hit = names_of(model).source(name.removesuffix(end))
        if hit is None:
            unknown.append(name)
        else:
            _add(groups, hit, name, folder.tensors[name])
    _refuse_unknown(unknown, folder, f"a GGUF model of {model.arch}")
    found: dict[str, BaseTensor] = {}
    for group in groups.values():
        found |= _done(group, model, known)
    return _as_template(found, folder, template)


def _as_template(
    found: Mapping[str, BaseTensor], folder: BaseModel, template: BaseModel
) -> tuple[dict[str, BaseTensor], tuple[Note, ...]]:
    """Return the tensors that the template lists, those of a shared table twice if it says so."""
    done, notes, missing = {}, [], []
    for name, theirs in template.tensors.items():
        ours = found.get(name)
        if ours is None and name == _HEAD and _TABLE in found:
            ours = replace(found[_TABLE], name=_HEAD)
            notes.append(Note("the head is the embedding, as the folder ties them", subject=name))
        elif ours is None and name in FROM_CONFIG:
            ours = theirs
            notes.append(Note("taken from the template", subject=name))
        if ours is None:
            missing.append(name)
        elif ours.shape != theirs.shape:
            raise MatchError(
                f"{name}: {ours.shape} by {folder.path}, {theirs.shape} in {template.path}",
                hint=_SAME,
            )
        else:
            done[name] = ours
    extra = [n for n in found if n not in template.tensors and not _is_tied_copy(n, found, folder)]
    for lacking, having, names in ((folder, template, missing), (template, folder, extra)):
        if names:
            raise MatchError(
                f"{lacking.path} lacks {counted(len(names), 'tensor')} that {having.path} has:\n"
                f"{_lines(names)}",
                hint=_SAME,
            )
    return done, tuple(notes)


def _is_tied_copy(name: str, found: Mapping[str, BaseTensor], folder: BaseModel) -> bool:
    """Return whether a checkpoint stores its table once more as the head that it is tied to."""
    return name == _HEAD and _TABLE in found and bool(folder.config_word("tie_word_embeddings"))


def as_folder(config: BaseModel | None, base: BaseModel) -> BaseModel:
    """Return what stands for the output: the config folder's side files, or the lone file."""
    shard = Shard(Path("model.safetensors"), (), {"format": "pt"})
    if config is None:
        return BaseModel(base.path, (shard,))
    return replace(config, shards=(shard,), index=None, index_metadata=None, packed=())


# ── what is known of the model ───────────────────────────────────────────────────────────────


def _known(base: BaseModel, config: Path | None) -> GGUFBase:
    own = open_gguf_base(base.path)
    if config is None:
        return own
    theirs = open_gguf_base(config)
    arches = sorted({model.arch for model in theirs.models})
    arch = own.models[0].arch
    if arch not in arches:
        raise MatchError(
            f"{base.path} is {arch}, and {config} is {' or '.join(arches)}",
            hint="name the folder of the model that the GGUF file was made of",
        )
    models = tuple(model for model in theirs.models if model.arch == arch)
    # Weights in few bits have other shapes than what they stand for.
    coded = "quantization_config" in theirs.config.fields
    parameters = None if coded else theirs.parameters
    return replace(theirs, models=models, tensors=own.tensors, parameters=parameters)


def _rows(known: GGUFBase, names: Sequence[str]) -> GGUFModel:
    """Return the rows of the whole model; raises UnsupportedError where those of norms lack."""
    model = known.model_for(names)
    whole = whole_model(model)
    if whole is None:
        raise UnsupportedError(
            f"{known.source}: of {model.arch} models only the modules that adapters change have "
            "known names, not the norms",
            hint=_CONVERT,
        )
    return whole


def _target(name: str, model: GGUFModel, known: GGUFBase) -> Hit | None:
    """Return the row of a GGUF tensor, the one whose names the checkpoint has if there is one."""
    hits = names_of(model).targets(name.rpartition(".")[0])
    if known.parameters is not None:
        names = frozenset(known.named_parameters)
        hits = [hit for hit in hits if is_there(hit.step, hit.block, names)] or hits
    tensors = known.tensors or {}
    fitting = [hit for hit in hits if not _is_excluded(hit, tensors)]
    return fitting[0] if fitting else None


def _is_excluded(hit: Hit, tensors: Collection[str]) -> bool:
    other = EXCLUDED_BY.get(hit.step.sources[0])
    return other is not None and spell(other, hit.block, None, 0) in tensors


def _add(
    groups: dict[tuple[Step, int | None, str], _Group], hit: Hit, name: str, tensor: BaseTensor
) -> None:
    end = ".bias" if name.endswith(".bias") else ".weight"
    group = groups.setdefault((hit.step, hit.block, end), _Group(hit.step, hit.block, end))
    place = hit.place if hit.expert is None else hit.expert
    if place in group.parts:
        raise MatchError(f"{name}: stands where {group.parts[place].name} is already")
    group.parts[place] = tensor


# ── layout ───────────────────────────────────────────────────────────────────────────────────


def _undone(group: _Group, model: GGUFModel, known: GGUFBase) -> dict[str, BaseTensor]:
    step, block = group.step, group.block
    sources = _in_order(group, len(step.targets), step.targets)
    turned = is_stored_turned(model, step.sources[0])
    gathers = _gathered(group, known, sources, undo=True, turned=turned)
    if step.stacks:
        paths = [spell(step.sources[0], block, expert, 0) for expert in range(len(gathers))]
    else:
        paths = [spell(name, block, None, 0) for name in step.sources]
    names = [_parameter(path, group.end, known) for path in paths]
    shift = -shift_of(model.arch, spell(step.targets[0], block, None, 0) + group.end)
    return {n: gathered(n, g, sources, shift) for n, g in zip(names, gathers, strict=True)}


def _done(group: _Group, model: GGUFModel, known: GGUFBase) -> dict[str, BaseTensor]:
    step = group.step
    count = max(group.parts) + 1 if step.stacks else len(step.sources)
    sources = _in_order(group, count, step.sources)
    turned = is_stored_turned(model, step.sources[0])
    gathers = _gathered(group, known, sources, undo=False, turned=turned)
    names = [spell(name, group.block, None, 0) + group.end for name in step.targets]
    return {
        n: gathered(n, g, sources, shift_of(model.arch, n))
        for n, g in zip(names, gathers, strict=True)
    }


def _in_order(group: _Group, count: int, names: Sequence[str]) -> list[BaseTensor]:
    missing = [place for place in range(count) if place not in group.parts]
    if missing:
        what = names[missing[0] if len(names) > 1 else 0]
        there = next(iter(group.parts.values())).name
        raise MatchError(
            f"{there} is there without {spell(what, group.block, missing[0], 0)}{group.end}",
            hint="is the model complete?",
        )
    return [group.parts[place] for place in range(count)]


def _gathered(
    group: _Group, known: GGUFBase, sources: Sequence[BaseTensor], *, undo: bool, turned: bool
) -> list[Gather]:
    shapes = [source.shape for source in sources]
    try:
        return gather_weights(group.step, known, group.block, shapes, undo=undo, turned=turned)
    except LoratoolsError as error:
        raise type(error)(f"{sources[0].name}: {error.message}", error.hint or _CONVERT) from error


def _parameter(path: str, end: str, known: GGUFBase) -> str:
    """Return a checkpoint's name: stacked experts are parameters, everything else modules'."""
    _, stacked, leaf = path.partition(".experts.")
    bare = stacked and not leaf.partition(".")[0].isdecimal()
    return in_memory(path, known.class_name) + ("" if bare else end)


def _check_shapes(done: Mapping[str, BaseTensor], known: GGUFBase) -> None:
    """Raise MatchError for tensors that the folder's own weights lack or have in another shape."""
    if known.parameters is None:
        return
    wrong = [
        f"{name}: {tensor.shape}, {known.parameters.get(name, 'missing')} in the folder"
        for name, tensor in done.items()
        if known.parameters.get(name) != tensor.shape
    ]
    if wrong:
        raise MatchError(
            f"{known.source} does not have {counted(len(wrong), 'tensor')} as the GGUF file has "
            f"them:\n{_lines(wrong)}",
            hint="name the folder of the model that the GGUF file was made of",
        )


def _refuse_unknown(names: Sequence[str], base: BaseModel, where: str) -> None:
    if names:
        raise UnsupportedError(
            f"{base.path}: {counted(len(names), 'tensor has', 'tensors have')} no known place in "
            f"{where}:\n{_lines(names)}",
            hint=_CONVERT,
        )


def _lines(names: Iterable[str]) -> str:
    found = list(names)
    more = [f"  ... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "\n".join([*(f"  {name}" for name in found[:_SHOWN]), *more])
