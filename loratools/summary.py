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
from loratools.adapter_io import WEIGHT_NAMES, find_weights, load_adapter
from loratools.basemodel import BaseModel, elements, open_base
from loratools.deltas import AdditiveDelta, LayerDelta
from loratools.errors import UnknownFormatError
from loratools.report import Json, Note, Report
from loratools.tensorfiles.dtypes import DTYPES, dtype_word
from loratools.tensorfiles.header import read_header

_LAYER_NUMBER = re.compile(r"\.(\d+)\.")


def summarize(
    path: str | os.PathLike[str], *, base: str | os.PathLike[str] | None = None
) -> Report:
    """Describe the adapter or base model at ``path``.

    Args:
        path: an adapter file or folder, or a base model.
        base: the adapter's base, to state its share of the parameters.

    Raises:
        InputError: nothing there, or a file that cannot be read (see the subclasses).
    """
    adapter = _load_if_adapter(Path(path))
    if adapter is None:
        return _describe_base(open_base(path), str(path))
    return _describe_adapter(adapter, str(path), open_base(base) if base else None)


def _load_if_adapter(path: Path) -> Adapter | None:
    if path.is_dir():
        # A base folder may hold adapters in sub-folders; its own weights say what it is.
        is_adapter = any((path / name).is_file() for name in (*WEIGHT_NAMES, "adapter_config.json"))
        if not is_adapter and (path / "config.json").is_file():
            return None
        return load_adapter(find_weights(path))
    try:
        return load_adapter(path)
    except UnknownFormatError:
        if _has_adapter_words(path):
            raise
        # A file that is in no adapter format is described as a base model.
        return None


def _has_adapter_words(path: Path) -> bool:
    if path.suffix != ".safetensors":
        return False
    return any("lora" in name for name in read_header(path).tensors)


def _describe_adapter(adapter: Adapter, path: str, base: BaseModel | None) -> Report:
    items = tuple(_layer_item(name, delta) for name, delta in adapter.layers.items())
    norms = [item["delta_norm"] for item in items if item["delta_norm"] is not None]
    words = json.loads(adapter.metadata.get("adapter_config.json", "{}"))
    facts: dict[str, Json] = {
        "what": "adapter",
        "format": "peft",
        "base_model": words.get("base_model_name_or_path"),
        "layers": len(adapter.layers),
        "kinds": dict(Counter(delta.kind for delta in adapter.layers.values())),
        "ranks": _histogram(item["rank"] for item in items),
        "alphas": _histogram(item["alpha"] for item in items),
        "targets": dict(Counter(name.rsplit(".", 1)[-1] for name in adapter.layers)),
        "extras": {name: list(extra.weight_shape) for name, extra in adapter.extras.items()},
        "dtypes": dict(Counter(dtype_word(t.dtype) for _, t in adapter.named_tensors())),
        "parameters": adapter.parameters,
        "bytes": sum(t.numel() * t.element_size() for _, t in adapter.named_tensors()),
        "delta_norm": sum(norm**2 for norm in norms) ** 0.5 if norms else None,
    }
    if base is not None:
        total = sum(elements(tensor.shape) for tensor in base.tensors.values())
        facts["base_parameters"] = total
        facts["share_of_base"] = adapter.parameters / total
    notes = (*(Note(word) for word in adapter.notes), *_anomalies(adapter, items))
    return Report("inspect", (path,), None, facts, items, notes)


def _histogram(values: Iterator[Json]) -> dict[str, int]:
    counts = Counter(value for value in values if value is not None)
    return {f"{value:g}": count for value, count in sorted(counts.items())}


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


def _describe_base(base: BaseModel, path: str) -> Report:
    sizes: dict[str, int] = defaultdict(int)
    for tensor in base.tensors.values():
        sizes[tensor.dtype] += elements(tensor.shape)
    facts: dict[str, Json] = {
        "what": "base model",
        "model_type": base.config_word("model_type"),
        "architectures": base.config_word("architectures"),
        "files": len(base.shards),
        "tensors": len(base.tensors),
        "parameters": sum(sizes.values()),
        "parameters_by_dtype": dict(sizes),
        "bytes": sum(count * DTYPES[word] // 8 for word, count in sizes.items()),
        "tied_embeddings": base.config_word("tie_word_embeddings"),
        "quantisation": _scheme(base.config_word("quantization_config")),
    }
    items = tuple(
        {
            "tensor": tensor.name,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "file": tensor.file.name,
        }
        for tensor in base.tensors.values()
    )
    return Report("inspect", (path,), None, facts, items)


def _scheme(words: Json) -> str | None:
    return str(words.get("quant_method")) if isinstance(words, Mapping) else None
