"""Several inputs in one command: a folder of adapters, or several paths and an output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_ADAPTER_SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin", ".gguf")
_ADAPTER_MARKS = (
    "adapter_config.json",
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
"""Files that make a folder an adapter."""
_MODEL_MARKS = ("config.json", "model_index.json", "*.index.json")
"""Files that make a folder a model or a pipeline."""


def split_inputs(paths: Sequence[str]) -> tuple[list[str], bool]:
    """Return the single adapters that ``paths`` mean, and whether they are several by nature."""
    found: list[str] = []
    many = len(paths) > 1
    for path in paths:
        inside = _adapters_inside(Path(path))
        many = many or len(inside) > 1
        found += inside or [path]
    return found, many


def _adapters_inside(folder: Path) -> list[str]:
    """Return the adapter files and folders in a folder that is neither adapter nor model itself."""
    if not folder.is_dir() or _holds(folder, (*_ADAPTER_MARKS, *_MODEL_MARKS)):
        return []
    return [
        str(child)
        for child in sorted(folder.iterdir())
        if (_holds(child, _ADAPTER_MARKS) if child.is_dir() else child.suffix in _ADAPTER_SUFFIXES)
    ]


def _holds(folder: Path, marks: Sequence[str]) -> bool:
    return any(next(folder.glob(mark), None) is not None for mark in marks)


def output_for(path: str, output: str, *, many: bool, to: str | None = None) -> str:
    """Return where one of several results goes: in the output folder, under its own name."""
    if not many:
        return output
    source = Path(path)
    name = source.stem if source.is_file() else source.name
    suffix = {"peft": "", "gguf": ".gguf"}.get(to or "", ".safetensors")
    return str(Path(output) / f"{name}{suffix}")
