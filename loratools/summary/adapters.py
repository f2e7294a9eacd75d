"""What is in an adapter: format, ranks, targets, sizes, what its metadata says of itself."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from functools import partial

from loratools.adapter import Adapter
from loratools.compute import resolve_compute
from loratools.deltas import LayerDelta
from loratools.deltas.spectra import in_threads
from loratools.errors import UnknownArchitectureError
from loratools.keymaps.detection import certain_architecture, detect_architecture
from loratools.report import Json, Note, Report
from loratools.spectra.places import network_of
from loratools.summary.oddities import find_oddities
from loratools.tensorfiles.dtypes import dtype_word

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


def describe_adapter(
    found: str, adapter: Adapter, path: str, base: int | None, *, values: bool = True
) -> Report:
    """Return the report of an adapter.

    Args:
        found: the name of its format.
        adapter: the adapter.
        path: as the user gave it.
        base: the number of parameters of its base, if it is known.
        values: whether its tensors hold their numbers, and not zeros in their place.
    """
    measure = partial(_layer_item, values=values)
    items = tuple(in_threads(measure, adapter.layers.items(), resolve_compute()))
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
        *find_oddities(adapter, items, values=values),
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
    """Return the architecture's id, or None and why; most of PEFT's files are for other models."""
    if found == "gguf":
        return adapter.arch, None
    if found == "mlx":
        return None, None
    if found == "peft":
        certain = certain_architecture(adapter)
        return (certain.id if certain else adapter.arch), None
    try:
        return detect_architecture(adapter).id, None
    except UnknownArchitectureError as error:
        return None, Note(error.message.partition("\n")[0].rstrip(":"), subject="architecture")


def _components(adapter: Adapter) -> dict[str, int]:
    """Return the number of layers of each network, where the paths name networks."""
    if adapter.naming in ("transformers", "gguf", "mlx"):
        return {}
    return dict(Counter(map(network_of, adapter.layers)))


def _targets(adapter: Adapter) -> dict[str, int]:
    """Return the number of layers with the same last words: what follows the block's number."""
    return dict(Counter(map(_leaf, adapter.layers)))


def _leaf(path: str) -> str:
    if "." not in path:
        inside = path[len(network_of(path)) + 1 :]
        return re.split(r"\d_", inside)[-1] or path
    *_, before, last = path.split(".")
    return f"{before}.{last}" if last.isdigit() else last


def _histogram(values: Iterator[Json]) -> dict[str, int]:
    # Alphas that differ in the last place print alike and count as one.
    return dict(Counter(f"{value:g}" for value in sorted(v for v in values if v is not None)))


def _layer_item(layer: tuple[str, LayerDelta], *, values: bool) -> dict[str, Json]:
    name, delta = layer
    tensors = delta.tensors()
    return {
        "module": name,
        "kind": delta.kind,
        "rank": getattr(delta, "rank", None),
        "alpha": getattr(delta, "alpha", None),
        "scale": getattr(delta, "scale", None),
        "shape": _shape(delta),
        "dtype": dtype_word(next(iter(tensors.values())).dtype),
        "parameters": sum(tensor.numel() for tensor in tensors.values()),
        "delta_norm": delta.norm() if values else None,
    }


def _shape(delta: LayerDelta) -> list[int] | None:
    """Return the weight's shape, or None where only the base knows it (OFT, IA3)."""
    known = delta.additive or getattr(delta, "shape", ()) is not None
    return list(delta.weight_shape) if known else None
