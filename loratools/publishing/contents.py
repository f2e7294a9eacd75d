"""What is at a path that is to be published, as far as its files tell."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.adapter import Adapter
from loratools.adapter_io import find_weights, open_adapter
from loratools.basemodel import BaseModel, is_pipeline, open_base, open_pipeline
from loratools.errors import InputError, UnknownArchitectureError, UnknownFormatError
from loratools.formats import get_format, get_row
from loratools.keymaps.detection import detect_architecture
from loratools.planning.provenance import merged_adapters
from loratools.publishing.staying import staying, told
from loratools.publishing.words import (
    IMAGE_ARCHITECTURES,
    LIBRARIES,
    LORA_KINDS,
    TASKS,
    repo_id_of,
)
from loratools.tensorfiles.file_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    TORCH_SUFFIXES,
    WEIGHT_SUFFIXES,
)
from loratools.tensorfiles.inputs import open_input, read_json_object
from loratools.tensorfiles.missing import no_such_path

CARD = "README.md"
_BASE_WORDS = ("ss_base_model", "base_model", "ss_sd_model_name")
_TRIGGER_WORDS = ("modelspec.trigger_phrase", "instance_prompt")
_RUNTIME_TAGS = {"gguf": ("llama-cpp",), "mlx": ("mlx",)}


@dataclass(frozen=True)
class Contents:
    """What is to be published.

    Attributes:
        what: ``adapter``, ``model`` or ``pipeline``.
        format: the adapter's format; ``gguf``, ``transformers``, ``diffusers`` or ``safetensors``.
        files: path in the repository → the file, or bytes that replace it.
        weights: the (first) weights file's path in the repository.
        library: the Hub's word for the library that loads it, or ``None``.
        relation: to the base model, in the Hub's words, if the files say it.
        tags: words to find it by.
        named_bases: what the files call the base: names on the Hub, or local paths.
        license: as the file's metadata says.
        pipeline_tag: the task in the Hub's words, where the files leave no doubt.
        trigger: the words that an image adapter was trained on.
        task: PEFT's word for the task, or the class of a transformers model.
        made_of: name and strength of each adapter that was merged.
        facts: rows for a table.
        local_card: the text of a ``README.md`` beside the files.
        left: what lies beside them and stays there.
    """

    what: str
    format: str
    files: Mapping[str, Path | bytes]
    weights: str
    library: str | None = None
    relation: str | None = None
    tags: tuple[str, ...] = ()
    named_bases: tuple[str, ...] = ()
    license: str | None = None
    pipeline_tag: str | None = None
    trigger: str | None = None
    task: str | None = None
    made_of: tuple[tuple[str, float], ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    local_card: str | None = None
    left: tuple[str, ...] = ()

    @property
    def bases(self) -> tuple[str, ...]:
        """The named bases that are names on the Hub."""
        found = (repo_id_of(name) for name in self.named_bases)
        return tuple(dict.fromkeys(name for name in found if name))

    @property
    def pickled(self) -> bool:
        """Whether weights are in Python's own serialisation, which may run code."""
        return any(name.endswith(TORCH_SUFFIXES) for name in self.files)


def read_contents(path: Path) -> Contents:
    """Look at what is to be published; raises InputError as the readers do."""
    if is_pipeline(path):
        return _pipeline(path)
    if not _is_model_folder(path):
        try:
            found, adapter = open_adapter(path, activated=True)
        except UnknownFormatError:
            # A file that is in no adapter format is taken for a model's.
            return _model(open_base(path))
        return _adapter(path, found.name, adapter)
    return _model(open_base(path))


def _is_model_folder(path: Path) -> bool:
    own = (*ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    return (path / "config.json").is_file() and not any((path / name).is_file() for name in own)


def _adapter(path: Path, name: str, adapter: Adapter) -> Contents:
    weights = find_weights(path)
    config = json.loads(adapter.metadata.get(ADAPTER_CONFIG, "{}"))
    architecture = _architecture(name, adapter)
    kinds = sorted({delta.kind for delta in adapter.layers.values()})
    file = _weights_name(name, weights)
    files, left = _adapter_files(path, weights, file, name)
    words = adapter.metadata
    return Contents(
        what="adapter",
        format=name,
        files=files,
        weights=file,
        library=LIBRARIES.get(name, "diffusers"),
        relation="adapter",
        tags=tuple(_adapter_tags(kinds, architecture, name)),
        named_bases=tuple(_adapter_bases(config, words)),
        license=words.get("modelspec.license") or words.get("license"),
        pipeline_tag=TASKS.get(str(config.get("task_type")))
        or ("text-generation" if name == "mlx" else None)
        or ("text-to-image" if architecture in IMAGE_ARCHITECTURES else None),
        trigger=next((words[key] for key in _TRIGGER_WORDS if words.get(key)), None),
        task=config.get("task_type"),
        facts=_adapter_facts(name, adapter, kinds, architecture),
        local_card=_card_beside(weights.parent if path.is_file() else path),
        left=left,
    )


def _architecture(name: str, adapter: Adapter) -> str | None:
    if name in ("peft", "gguf", "mlx"):
        return adapter.arch
    try:
        return detect_architecture(adapter).id
    except UnknownArchitectureError:
        return None


def _weights_name(name: str, weights: Path) -> str:
    """Return the name under which the format's tools look for the weights."""
    known = Path(get_row(name).file)
    if known.stem == "*":
        return weights.stem + (".gguf" if known.suffix == ".gguf" else weights.suffix)
    return known.stem + (".bin" if weights.suffix in TORCH_SUFFIXES else known.suffix)


def _adapter_files(
    path: Path, weights: Path, file: str, name: str
) -> tuple[dict[str, Path | bytes], tuple[str, ...]]:
    """Return what is published, and what lies beside it and is not."""
    files: dict[str, Path | bytes] = {file: weights}
    folder = weights.parent
    if get_format(name).has_side_files and (folder / ADAPTER_CONFIG).is_file():
        files[ADAPTER_CONFIG] = folder / ADAPTER_CONFIG
    stayed: list[Path] = []
    for child in sorted(folder.rglob("*")) if path.is_dir() else ():
        inner = child.relative_to(folder)
        if not child.is_file() or inner.name in (CARD, ADAPTER_CONFIG) or child == weights:
            continue
        if stays := staying(inner) or (inner if inner.suffix in WEIGHT_SUFFIXES else None):
            stayed.append(stays)
        else:
            files[inner.as_posix()] = child
    return files, told(stayed)


def _adapter_tags(kinds: list[str], architecture: str | None, name: str) -> Iterator[str]:
    if any(kind in LORA_KINDS for kind in kinds):
        yield "lora"
    yield from (kind for kind in kinds if kind in ("dora", "loha", "lokr", "oft", "boft", "ia3"))
    if architecture and name not in ("peft", "gguf", "mlx"):
        yield architecture
    yield from _RUNTIME_TAGS.get(name, ())
    yield "loratools"


def _adapter_bases(config: Mapping[str, Any], words: Mapping[str, str]) -> Iterator[str]:
    if config.get("base_model_name_or_path"):
        yield str(config["base_model_name_or_path"])
    yield from (words[key] for key in _BASE_WORDS if words.get(key))
    yield from (word for key, word in sorted(words.items()) if key.endswith(".repo_url"))


def _adapter_facts(
    name: str, adapter: Adapter, kinds: list[str], architecture: str | None
) -> dict[str, str]:
    deltas = adapter.layers.values()
    ranks = sorted({r for d in deltas if isinstance(r := getattr(d, "rank", None), int)})
    alphas = sorted({a for d in deltas if (a := getattr(d, "alpha", None)) is not None})
    facts = {
        "Format": name,
        "Kind": ", ".join(kinds),
        "Rank": _few(ranks),
        "Alpha": _few(alphas),
        "Layers": str(len(adapter.layers)),
        "Parameters": f"{adapter.parameters:,}",
        "Architecture": architecture or "",
    }
    return {title: value for title, value in facts.items() if value}


def _few(numbers: Sequence[float]) -> str:
    values = [f"{number:g}" for number in numbers]
    return ", ".join(values) if len(values) <= 4 else f"{values[0]} to {values[-1]}"


def _card_beside(folder: Path) -> str | None:
    file = folder / CARD
    return read_card_file(file) if file.is_file() else None


def read_card_file(file: Path) -> str:
    """Return a card's text, its line ends untouched; raises InputError if absent or no text."""
    if not file.is_file():
        raise no_such_path(file, "file")
    with open_input(file) as opened:
        raw = opened.read()
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text", "save it again as UTF-8") from error


def _model(base: BaseModel) -> Contents:
    folder = base.path if base.path.is_dir() else base.path.parent
    files: dict[str, Path | bytes] = {
        shard.path.relative_to(folder).as_posix(): shard.path for shard in base.shards
    }
    weights = next(iter(files))
    if base.index:
        files[base.index] = folder / base.index
    stayed = {name: staying(name) for name in base.side_files}
    files |= {name.as_posix(): folder / name for name in base.side_files if not stayed[name]}
    card = files.pop(CARD, None)
    config = base.config or {}
    made_of = tuple(merged_adapters(base)) if base.is_gguf else ()
    return Contents(
        what="model",
        format="gguf" if base.is_gguf else "transformers" if config else "safetensors",
        files=files,
        weights=weights,
        library="gguf" if base.is_gguf else _library(config),
        relation=_relation(base, made_of),
        tags=("gguf", "llama-cpp", "loratools") if base.is_gguf else ("loratools",),
        named_bases=tuple(_model_bases(base)),
        task=next(iter(config.get("architectures") or ()), None),
        made_of=made_of,
        facts=_model_facts(base),
        local_card=_card_beside(folder) if card else None,
        left=told([*base.left_out, *filter(None, stayed.values())]),
    )


def _library(config: Mapping[str, Any]) -> str | None:
    if "_class_name" in config:
        return "diffusers"
    return "transformers" if config.get("model_type") or config.get("architectures") else None


def _relation(base: BaseModel, made_of: tuple[tuple[str, float], ...]) -> str | None:
    if made_of:
        return "merge"
    return "quantized" if base.is_gguf or base.packed else None


def _model_bases(base: BaseModel) -> Iterator[str]:
    if (base.config or {}).get("_name_or_path"):
        yield str((base.config or {})["_name_or_path"])
    header = base.shards[0].header
    if base.is_gguf and header is not None:
        words = ((key, header.metadata[key]) for key in sorted(header.metadata))
        yield from (
            str(getattr(value, "data", ""))
            for key, value in words
            if key.startswith("general.base_model.") and key.endswith(".repo_url")
        )


def _model_facts(base: BaseModel) -> dict[str, str]:
    return {
        "Type": base.main_dtype,
        "Files": str(len(base.shards)),
        "Tensors": str(len(base.tensors)),
    }


def _pipeline(path: Path) -> Contents:
    pipeline = open_pipeline(path)
    inside: dict[str, Path | bytes] = {}
    left: list[Path] = []
    for name, model in pipeline.components.items():
        part = _model(model)
        inside |= {f"{name}/{inner}": file for inner, file in part.files.items()}
        left += [Path(name, inner) for inner in part.left]
    stayed = {name: staying(name) for name in pipeline.other_files}
    others = {name.as_posix(): path / name for name, stays in stayed.items() if not stays}
    others.pop(CARD, None)
    index = read_json_object(path / "model_index.json")
    return Contents(
        what="pipeline",
        format="diffusers",
        files={**others, **inside},
        weights=next(iter(inside)),
        library="diffusers",
        tags=("loratools",),
        named_bases=tuple(str(index[key]) for key in ("_name_or_path",) if index.get(key)),
        task=index.get("_class_name"),
        facts={"Pipeline": str(index.get("_class_name", ""))},
        local_card=_card_beside(path),
        left=told([*filter(None, stayed.values()), *left]),
    )
