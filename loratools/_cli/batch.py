"""Several inputs in one command: a folder of adapters, or several paths and an output folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

_ADAPTER_SUFFIXES = (".safetensors", ".pt", ".ckpt", ".bin")
_FOLDER_MARKS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


def split_inputs(paths: Sequence[str]) -> tuple[list[str], bool]:
    """Return the single adapters that ``paths`` mean, and whether they are several by nature."""
    found: list[str] = []
    many = len(paths) > 1
    for path in paths:
        inside = _adapters_inside(Path(path))
        many = many or len(inside) > 1
        found += inside if len(inside) > 1 else [path]
    return found, many


def _adapters_inside(folder: Path) -> list[str]:
    """Return the adapter files of a folder that is no adapter itself."""
    if not folder.is_dir() or any((folder / mark).exists() for mark in _FOLDER_MARKS):
        return []
    return [str(file) for file in sorted(folder.iterdir()) if file.suffix in _ADAPTER_SUFFIXES]


def output_for(path: str, output: str, *, many: bool, to: str | None = None) -> str:
    """Return where one of several results goes: in the output folder, under its own name."""
    if not many:
        return output
    source = Path(path)
    name = source.stem if source.is_file() else source.name
    return str(Path(output) / (name if to == "peft" else f"{name}.safetensors"))
