"""Several inputs in one command: a folder of adapters, or several paths and an output folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

from loratools.errors import LoratoolsError, OptionError, OutputError
from loratools.report import Report

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


def run_each(
    paths: Sequence[str],
    output: str,
    work: Callable[[str, str], Report],
    *,
    many: bool,
    to: Callable[[str], str | None],
    overwrite: bool = False,
) -> list[Report]:
    """Return the report of ``work`` on each path and its output.

    Args:
        paths: from ``split_inputs``, as ``many`` is.
        output: the only result's, or the folder of several.
        work: makes one result: path, output → report.
        many: whether they are several by nature.
        to: path → the name of its result's format, or None for a safetensors file.
        overwrite: whether results may be replaced.

    Raises:
        OptionError: two results of one name.
        OutputError: a result that exists, before the first is made.
        LoratoolsError: what ``work`` raises, with the results that were written before.
    """
    pairs = [(path, output_for(path, output, many=many, to=to(path))) for path in paths]
    if many:
        _check_pairs(pairs, overwrite=overwrite)
    reports: list[Report] = []
    try:
        # One by one: what is there when one fails is told.
        reports.extend(work(path, target) for path, target in pairs)
    except LoratoolsError as error:
        failed = paths[len(reports)]
        if many and failed not in error.message:
            error.message = f"{failed}: {error.message}"
        written = [report.output for report in reports if report.output]
        if written:
            error.message += f"\n(written before: {', '.join(written)})"
        raise
    return reports


def _check_pairs(pairs: Sequence[tuple[str, str]], *, overwrite: bool) -> None:
    owners: dict[str, str] = {}
    for path, target in pairs:
        if target in owners:
            raise OptionError(
                f"{owners[target]} and {path} would both be written to {target}",
                hint="rename one of them, or run the command for each",
            )
        if os.path.lexists(target) and not overwrite:
            raise OutputError(f"{target}: already exists", "Pass --overwrite to replace it.")
        owners[target] = path


def output_for(path: str, output: str, *, many: bool, to: str | None = None) -> str:
    """Return where one of several results goes: in the output folder, under its own name."""
    if not many:
        return output
    source = Path(path)
    name = source.stem if source.is_file() else source.name
    suffix = {"peft": "", "gguf": ".gguf"}.get(to or "", ".safetensors")
    return str(Path(output) / f"{name}{suffix}")
