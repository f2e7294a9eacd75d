"""What is in a file: an adapter's layers and oddities, or a base model's tensors."""

from __future__ import annotations

import json
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from loratools.adapter import Adapter, natural_key
from loratools.adapter_io import WEIGHT_NAMES, find_weights, open_adapter
from loratools.basemodel import (
    BaseModel,
    elements,
    is_pipeline,
    open_base,
    open_pipeline,
    read_json_object,
)
from loratools.deltas import AdditiveDelta, LayerDelta
from loratools.errors import UnknownArchitectureError, UnknownFormatError
from loratools.keymaps.translate import detect_architecture, detect_base
from loratools.report import Json, Note, Report
from loratools.tensorfiles.dtypes import DTYPES, dtype_word
from loratools.tensorfiles.header import read_header

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")
_KOHYA_NETWORK = re.compile(r"lora_[a-z]+\d?")
_ADAPTER_WORDS = ("lora", "hada_w", "lokr_w", "dora_scale", "oft_blocks")
_WORDS = {
    "base_model": ("ss_sd_model_name", "ss_base_model_version", "modelspec.architecture"),
    "name": ("ss_output_name", "modelspec.title", "name"),
    "trigger": ("modelspec.trigger_phrase", "instance_prompt"),
    "network": ("ss_network_module",),
    "resolution": ("modelspec.resolution", "ss_resolution"),
    "steps": ("ss_steps",),
    "epochs": ("ss_epoch",),
    "license": ("modelspec.license",),
}
"""Fact → the words of a file's metadata that say it, the first that is there."""


def summarize(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Report:
    """Describe the adapter, base model or diffusers pipeline at ``path``.

    Args:
        path: an adapter file or folder of any format, a base model, or a pipeline's folder.
        base: the adapter's base, to state its share of the parameters.

    Raises:
        InputError: nothing there, or a file that cannot be read (see the subclasses).
    """
    where = Path(path)
    if is_pipeline(where):
        return _describe_pipeline(where, str(path))
    found = _open_if_adapter(where)
    if found is None:
        return _describe_base(open_base(path), str(path))
    return _describe_adapter(*found, str(path), _sizes_of(Path(base)) if base else None)


def _open_if_adapter(path: Path) -> tuple[str, Adapter] | None:
    """Return the format's name and the adapter, or None for what is no adapter."""
    if path.is_dir():
        # A base folder may hold adapters in sub-folders; its own weights say what it is.
        is_adapter = any((path / name).is_file() for name in (*WEIGHT_NAMES, "adapter_config.json"))
        if not is_adapter and (path / "config.json").is_file():
            return None
        path = find_weights(path)
    try:
        found, adapter = open_adapter(path)
    except UnknownFormatError:
        if _has_adapter_words(path):
            raise
        # A file that is in no adapter format is described as a base model.
        return None
    return found.name, adapter


def _has_adapter_words(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    names = read_header(path).tensors
    return any(word in name for name in names for word in _ADAPTER_WORDS)


def _sizes_of(path: Path) -> int:
    """Return the number of parameters of a base model or pipeline."""
    models = open_pipeline(path).components.values() if is_pipeline(path) else [open_base(path)]
    return sum(elements(tensor.shape) for model in models for tensor in model.tensors.values())


def _describe_adapter(found: str, adapter: Adapter, path: str, base: int | None) -> Report:
    items = tuple(_layer_item(name, delta) for name, delta in adapter.layers.items())
    norms = [item["delta_norm"] for item in items if item["delta_norm"] is not None]
    words = _metadata_words(adapter)
    architecture, undecided = _architecture(found, adapter)
    facts: dict[str, Json] = {
        "what": "adapter",
        "format": found,
        "naming": adapter.naming,
        "architecture": architecture,
        **words,
        "layers": len(adapter.layers),
        "kinds": dict(Counter(delta.kind for delta in adapter.layers.values())),
        "ranks": _histogram(item["rank"] for item in items),
        "alphas": _histogram(item["alpha"] for item in items),
        "components": _components(adapter),
        "targets": _targets(adapter),
        "extras": {name: list(extra.weight_shape) for name, extra in adapter.extras.items()},
        "dtypes": dict(Counter(dtype_word(t.dtype) for _, t in adapter.named_tensors())),
        "parameters": adapter.parameters,
        "bytes": sum(t.numel() * t.element_size() for _, t in adapter.named_tensors()),
        "delta_norm": sum(norm**2 for norm in norms) ** 0.5 if norms else None,
    }
    if base is not None:
        facts["base_parameters"] = base
        facts["share_of_base"] = adapter.parameters / base
    notes = (
        *([undecided] if undecided else []),
        *(Note(word) for word in adapter.notes),
        *_anomalies(adapter, items),
    )
    return Report("inspect", (path,), None, facts, items, notes)


def _metadata_words(adapter: Adapter) -> dict[str, str | None]:
    """Return what the file's own metadata says of itself, in one vocabulary."""
    words = {
        fact: next((adapter.metadata[key] for key in keys if adapter.metadata.get(key)), None)
        for fact, keys in _WORDS.items()
    }
    config = json.loads(adapter.metadata.get("adapter_config.json", "{}"))
    return {**words, "base_model": config.get("base_model_name_or_path") or words["base_model"]}


def _architecture(found: str, adapter: Adapter) -> tuple[str | None, Note | None]:
    """Return the architecture's id, or None and why; PEFT's files name their base instead."""
    if found == "peft":
        return adapter.arch, None
    try:
        return detect_architecture(adapter).id, None
    except UnknownArchitectureError as error:
        return None, Note(error.message, subject="architecture")


def _components(adapter: Adapter) -> dict[str, int]:
    """Return the number of layers of each network, where the paths name networks."""
    if adapter.naming == "transformers":
        return {}
    return dict(Counter(map(_network_of, adapter.layers)))


def _network_of(path: str) -> str:
    flattened = _KOHYA_NETWORK.match(path)
    return flattened[0] if flattened else path.partition("." if "." in path else "_")[0]


def _targets(adapter: Adapter) -> dict[str, int]:
    """Return the number of layers with the same last words: what follows the block's number."""
    return dict(Counter(map(_leaf, adapter.layers)))


def _leaf(path: str) -> str:
    if "." not in path:
        return re.split(r"\d_", path)[-1]
    *_, before, last = path.split(".")
    return f"{before}.{last}" if last.isdigit() else last


def _histogram(values: Iterator[Json]) -> dict[str, int]:
    # Alphas that differ in the last place print alike and count as one.
    return dict(Counter(f"{value:g}" for value in sorted(v for v in values if v is not None)))


def _layer_item(name: str, delta: LayerDelta) -> dict[str, Json]:
    tensors = delta.tensors()
    return {
        "module": name,
        "kind": delta.kind,
        "rank": getattr(delta, "rank", None),
        "alpha": getattr(delta, "alpha", None),
        "scale": getattr(delta, "scale", None),
        "shape": list(delta.weight_shape),
        "dtype": dtype_word(next(iter(tensors.values())).dtype),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "delta_norm": delta.norm(),
    }


def _anomalies(adapter: Adapter, items: tuple[dict[str, Json], ...]) -> Iterator[Note]:
    yield from _non_finite(adapter)
    zero = [item["module"] for item in items if item["delta_norm"] == 0]
    if zero:
        yield Note(f"{len(zero)} layers change nothing (an untrained lora_B is zero)", "warning")
    for delta in adapter.layers.values():
        if delta.obstacle:
            yield Note(f"cannot be merged into the original base: {delta.obstacle}", "warning")
            break
        if not isinstance(delta, AdditiveDelta) and delta.kind == "moved_base":
            yield Note("its initialisation moved the base; merging recomputes the start")
            break
    yield from _gaps(list(adapter.layers))


def _non_finite(adapter: Adapter) -> Iterator[Note]:
    for name, tensor in adapter.named_tensors():
        if not bool(torch.isfinite(tensor).all()):
            yield Note("holds NaN or infinity; merging it is refused", "warning", name)


def _gaps(names: list[str]) -> Iterator[Note]:
    """Note targets that some layers have and others in between lack."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        match = _LAYER_NUMBER.search(name)
        if match:
            numbers[name.replace(match[0], ".N.", 1)].add(int(match[1]))
    present = {number for group in numbers.values() for number in group}
    for pattern, found in sorted(numbers.items(), key=lambda item: natural_key(item[0])):
        missing = sorted(present - found)
        if missing:
            shown = ", ".join(str(number) for number in missing[:8])
            yield Note(f"adapted in {len(found)} layers, but not in: {shown}", subject=pattern)


def _describe_pipeline(path: Path, given: str) -> Report:
    pipeline = open_pipeline(path)
    index = read_json_object(path / "model_index.json")
    sizes = {name: _sizes(model) for name, model in pipeline.components.items()}
    every: Counter[str] = Counter()
    for of_one in sizes.values():
        every.update(of_one)
    networks = [name for name in pipeline.components if not name.startswith("text_encoder")]
    facts: dict[str, Json] = {
        "what": "diffusers pipeline",
        "class": index.get("_class_name"),
        "architecture": _base_architecture(pipeline.components[networks[0]]) if networks else None,
        "components": {name: sum(of_one.values()) for name, of_one in sizes.items()},
        "other_files": len(pipeline.other_files),
        "parameters": sum(every.values()),
        "parameters_by_dtype": dict(every),
        "bytes": _bytes(every),
    }
    items = tuple(
        {"component": name, **item}
        for name, model in pipeline.components.items()
        for item in _tensor_items(model)
    )
    return Report("inspect", (given,), None, facts, items)


def _sizes(base: BaseModel) -> Counter[str]:
    """Return the number of parameters by dtype."""
    sizes: Counter[str] = Counter()
    for tensor in base.tensors.values():
        sizes[tensor.dtype] += elements(tensor.shape)
    return sizes


def _bytes(sizes: Mapping[str, int]) -> int:
    return sum(count * DTYPES[word] // 8 for word, count in sizes.items())


def _base_architecture(base: BaseModel) -> str | None:
    """Return the id of a diffusion model's architecture, or None."""
    try:
        return detect_base({name: tensor.shape for name, tensor in base.tensors.items()}).id
    except UnknownArchitectureError:
        return None


def _describe_base(base: BaseModel, path: str) -> Report:
    sizes = _sizes(base)
    model_type = base.config_word("model_type")
    facts: dict[str, Json] = {
        "what": "base model",
        "model_type": model_type,
        "architecture": None if model_type else _base_architecture(base),
        "architectures": base.config_word("architectures"),
        "files": len(base.shards),
        "tensors": len(base.tensors),
        "parameters": sum(sizes.values()),
        "parameters_by_dtype": dict(sizes),
        "bytes": _bytes(sizes),
        "tied_embeddings": base.config_word("tie_word_embeddings"),
        "quantisation": _scheme(base.config_word("quantization_config")),
    }
    return Report("inspect", (path,), None, facts, tuple(_tensor_items(base)))


def _tensor_items(base: BaseModel) -> Iterator[dict[str, Json]]:
    for tensor in base.tensors.values():
        yield {
            "tensor": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "file": tensor.file.name,
        }


def _scheme(words: Json) -> str | None:
    return str(words.get("quant_method")) if isinstance(words, Mapping) else None
