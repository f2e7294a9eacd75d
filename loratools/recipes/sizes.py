"""Estimates of what a step reads, writes and holds in memory, from sizes and headers alone."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from loratools.errors import LoratoolsError
from loratools.held import held_bytes, is_held
from loratools.hub.references import is_reference
from loratools.recipes.remote import Remotes
from loratools.recipes.steps import Step
from loratools.report import Json, Report
from loratools.tensorfiles.header import TensorSpec, read_header

_WIDE = 3
"""Memory per stored byte of an adapter: what is read, and float32 of half precision."""

_BLOCKS = 100_000_000
"""Bytes of buffers with which a model is rewritten, whatever its size."""

_MATRICES = 12
"""Float32 copies of the largest matrix where two models are compared.

With these numbers estimates were 1.0 to 2.8 times the measured peaks of merge, compose, resize and
extract (Linux, 2 cores, 48 matrices of 2048 x 2048, adapters of rank 64).
"""

_SIZES = ("bytes_written", "bytes_after")
"""Facts that say what a dry run would write."""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a step takes, in bytes.

    Attributes:
        read: of all inputs.
        written: to disk; 0 for what stays in memory.
        held: of its result, wherever that goes.
        memory: at its peak, beside what other steps hold, Python and torch.
    """

    read: int
    written: int
    held: int
    memory: int


def estimate(
    step: Step, reports: Sequence[Report], sizes: Mapping[str, int], remotes: Remotes
) -> Cost:
    """Return a step's cost.

    Args:
        step: the step.
        reports: of its dry run, if there was one.
        sizes: result → bytes, of the steps before it.
        remotes: what the Hub says.
    """
    read = {path: _read(step, path, sizes, remotes) for path in step.inputs}
    models = sum(read[path] for path in step.models)
    adapters = sum(read.values()) - models
    makes_adapter = bool(step.verb.result and step.verb.result.adapter and step.result)
    like_a_model = step.models and not (makes_adapter and adapters)
    result = _result(step, reports, read[step.models[0]] if like_a_model else adapters)
    memory = _WIDE * adapters
    if makes_adapter:
        memory += _WIDE * result
    if step.models:
        memory += _MATRICES * _largest(step.models, remotes) if makes_adapter else _BLOCKS
    return Cost(sum(read.values()), 0 if step.held else result, result, memory)


def _read(step: Step, path: str, sizes: Mapping[str, int], remotes: Remotes) -> int:
    if is_reference(path):
        whole = path in step.repositories
        return remotes[path].nbytes(adapter=path not in step.models, whole=whole)
    return sizes[path] if path in sizes else stored_bytes(path)


def _result(step: Step, reports: Sequence[Report], otherwise: int) -> int:
    """Return the bytes of a step's result: made, said by its dry run, or as much as its input."""
    if step.result is None:
        return 0
    if found := held_bytes(step.result):
        return found
    said = [report.facts[name] for report in reports for name in _SIZES if name in report.facts]
    return sum(said) + bytes_beside(reports) if said else otherwise


def bytes_beside(reports: Sequence[Report]) -> int:
    """Return the bytes of what is written beside the results."""
    return sum((report.facts.get("residual") or {}).get("bytes", 0) for report in reports)


def stored_bytes(path: str) -> int:
    """Return the size of a file, of all files in a folder, or of a value in memory."""
    if is_held(path):
        return held_bytes(path)
    place = Path(path)
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(file.stat().st_size for file in files if file.is_file())


def _largest(paths: Iterable[str], remotes: Remotes) -> int:
    """Return the bytes in float32 of the largest tensor in safetensors files."""
    most = 0
    for path in paths:
        with remotes[path].headers() if is_reference(path) else nullcontext(Path(path)) as place:
            sizes = [spec.elements for file in _safetensors(place) for spec in _header(file)]
        most = max(most, *sizes, 0)
    return 4 * most


def _safetensors(place: Path) -> Iterator[Path]:
    if place.is_dir():
        yield from place.rglob("*.safetensors")
    elif place.suffix == ".safetensors":
        yield place


def _header(file: Path) -> Sequence[TensorSpec]:
    try:
        return tuple(read_header(file).tensors.values())
    except LoratoolsError:
        # The step itself will say so.
        return ()


def totals(rows: Sequence[tuple[Step, Cost]]) -> dict[str, Json]:
    """Return the sums, and the peak of memory: a step's own and what is held for later ones."""
    peak = 0
    for position, (_, cost) in enumerate(rows):
        later = {path for step, _ in rows[position:] for path in step.inputs}
        kept = [c.held for s, c in rows[:position] if s.held and s.result in later]
        peak = max(peak, cost.memory + sum(kept))
    return {
        "bytes_read": sum(cost.read for _, cost in rows),
        "bytes_written": sum(cost.written for _, cost in rows),
        "bytes_memory": peak,
    }


def shortages(rows: Sequence[tuple[Step, Cost]]) -> Iterator[str]:
    """Yield what does not fit on the disks that it goes to."""
    wanted: dict[int, int] = {}
    free: dict[int, tuple[int, str]] = {}
    for step, cost in rows:
        for output in step.outputs[:1]:
            place = Path(output).absolute()
            while not place.exists():
                place = place.parent
            device = place.stat().st_dev
            wanted[device] = wanted.get(device, 0) + cost.written
            free[device] = shutil.disk_usage(place).free, output
    for device, size in wanted.items():
        left, output = free[device]
        if size > left:
            yield f"{size} bytes are needed where {output} goes, and {left} are free"
