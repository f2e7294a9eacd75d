"""What is in a base model or a diffusers pipeline, from headers alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from loratools.basemodel import BaseModel, BaseTensor, elements, open_pipeline
from loratools.errors import UnknownArchitectureError
from loratools.keymaps.translate import detect_base
from loratools.report import Json, Report
from loratools.streaming.stored import stored_bytes
from loratools.summary.gguf_words import gguf_facts
from loratools.tensorfiles.inputs import read_json_object


def describe_pipeline(path: Path, given: str) -> Report:
    """Return the report of a diffusers pipeline; ``given`` is the path in the user's words."""
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
        "bytes": sum(_bytes(model) for model in pipeline.components.values()),
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
        sizes[_kind(tensor)] += elements(tensor.shape)
    return sizes


def _kind(tensor: BaseTensor) -> str:
    """Return the dtype word of a plain tensor, the scheme of a packed one."""
    return tensor.packed.scheme if tensor.packed else tensor.dtype


def _bytes(base: BaseModel) -> int:
    stored = (tensor for shard in base.shards for tensor in shard.tensors)
    return sum(stored_bytes(tensor.dtype, tensor.shape) for tensor in stored)


def _base_architecture(base: BaseModel) -> str | None:
    """Return the id of a diffusion model's architecture, or None."""
    try:
        return detect_base({name: tensor.shape for name, tensor in base.tensors.items()}).id
    except UnknownArchitectureError:
        return None


def describe_base(base: BaseModel, path: str) -> Report:
    """Return the report of a base model."""
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
        "bytes": _bytes(base),
        "tied_embeddings": base.config_word("tie_word_embeddings"),
        "quantisation": _scheme(base),
    }
    facts |= gguf_facts(base)
    return Report("inspect", (path,), None, facts, tuple(_tensor_items(base)))


def _tensor_items(base: BaseModel) -> Iterator[dict[str, Json]]:
    for tensor in base.tensors.values():
        yield {
            "tensor": tensor.name,
            "dtype": _kind(tensor),
            "shape": list(tensor.shape),
            "file": tensor.file.name,
        }


def _scheme(base: BaseModel) -> str | None:
    """Return the config's word for how the weights are quantised, else the schemes found."""
    words = base.config_word("quantization_config")
    if isinstance(words, Mapping) and words.get("quant_method"):
        return str(words["quant_method"])
    return ", ".join(sorted({w.packed.scheme for w in base.packed if w.packed})) or None
