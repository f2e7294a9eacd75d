"""Changing an adapter's rank: the nearest change of each layer, by the SVD of its factors."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from loratools.adapter import Adapter
from loratools.adapter_io import find_weights, open_adapter, save_adapter
from loratools.basemodel import open_base
from loratools.compute import Compute, resolve_compute
from loratools.deltas.resizing import relative_error
from loratools.errors import OptionError, UnsupportedError
from loratools.formats.format import Format
from loratools.held import held_bytes, is_held
from loratools.hub.taking import takes_references
from loratools.keymaps.detection import find_architecture
from loratools.planning.base_rows import BaseRows, layer_norms, locate_layers
from loratools.planning.finite import check_finite
from loratools.report import Json, Note, Report
from loratools.resizing.layers import (
    Resized,
    candidate,
    decompose,
    find_resizable,
    resize_layers,
)
from loratools.resizing.ranks import RankRule, check_rule
from loratools.resizing.reporting import (
    capped_notes,
    item_of,
    overall_retained,
    rank_range,
    resize_notes,
    rule_words,
)
from loratools.resizing.sizing import Sizing, narrow_dtype
from loratools.tensorfiles.destination import check_destination
from loratools.tensorfiles.header import read_header

PathLike = str | os.PathLike[str]

SCORES = ("absolute", "frobenius", "spectral")
_UNITS = {"": 1, "k": 1000, "m": 1000**2, "g": 1000**3, "ki": 1024, "mi": 1024**2, "gi": 1024**3}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Resizing:
    """An adapter at its new ranks.

    Attributes:
        adapter: the result, ready to be written.
        layers: what became of every layer that has a rank.
        others: kind → modules that were carried as they are.
        choices: what other ranks would have cost: the rows of the what-if table.
        notes: what was decided.
    """

    adapter: Adapter
    layers: Sequence[Resized]
    others: Mapping[str, Sequence[str]]
    choices: Sequence[Mapping[str, Json]]
    notes: Sequence[Note]


@takes_references(adapter="adapter", base="model")
def resize_adapter(  # noqa: PLR0913 - one keyword for each option of the command
    adapter: PathLike,
    output: PathLike,
    *,
    rank: int | None = None,
    energy: float | None = None,
    sv_ratio: float | None = None,
    sv_cumulative: float | None = None,
    sv_fro: float | None = None,
    max_size: int | str | None = None,
    mean_rank: float | None = None,
    conv_rank: int | None = None,
    max_rank: int | None = None,
    scope: str = "layer",
    base: PathLike | None = None,
    arch: str | None = None,
    score: str = "absolute",
    unbalanced: bool = False,
    compat: str | None = None,
    dtype: str = "keep",
    device: str = "cpu",
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write ``adapter`` at another rank, in its own format, with ΔW as near as that rank allows.

    Exactly one of the first seven options says how ranks are chosen. σ are the singular values of
    a layer's ΔW.

    Args:
        adapter: an adapter file or folder, of any format that is written too.
        output: a file, or a folder where the format is one.
        rank: the rank of every layer; layers of less get zeros, which change nothing.
        energy: share of Σσ² to keep, above 0 and at most 1.
        sv_ratio: keep singular values above σ₁ divided by this.
        sv_cumulative: share of Σσ to keep.
        sv_fro: share of the Frobenius norm to keep.
        max_size: bytes of the written file's tensors, as a number or a text (``64MiB``).
        mean_rank: mean of all layers' ranks.
        conv_rank: with ``rank``: that of convolutions with kernels larger than 1.
        max_rank: no layer gets more, under the rules other than ``rank``.
        scope: ``global`` makes ``energy`` a share over all layers.
        base: the model it was trained on: for DoRA, and for scores other than ``absolute``.
        arch: the architecture, where the files do not tell.
        score: what is compared between layers under a budget over all of them: σ (``absolute``),
            or σ over the base weight's ``frobenius`` or ``spectral`` norm.
        unbalanced: put all of S into up; else √S goes into both factors.
        compat: ``sd-scripts`` counts singular values as its resize_lora.py does: one too many.
        dtype: ``keep``, ``fp32``, ``bf16`` or ``fp16`` for every float tensor.
        device: ``cpu``, ``cuda``, ``cuda:N``, ``auto``; ``mps`` has no float64, ``cpu`` is taken.
        overwrite: replace an existing output.
        dry_run: choose and compute everything, write nothing.

    Raises:
        OptionError: no rule or several, numbers out of range, a size too small.
        UnsupportedError: nothing that has a rank; DoRA without a base; moved bases.
        InputError: a file that cannot be read (see the subclasses).
        MatchError: layers that the base does not have.
        OutputError: the destination is refused.
    """
    rule = RankRule(
        rank, energy, sv_ratio, sv_cumulative, sv_fro, parse_size(max_size), mean_rank,
        conv_rank, max_rank, everywhere=scope == "global", compat=compat,
    )  # fmt: skip
    check_rule(rule)
    _check_options(scope, score, rule, base)
    narrow_dtype(dtype)
    compute, on_cpu = _with_float64(resolve_compute(device))
    source, loaded = open_adapter(adapter)
    if source.read_only:
        raise UnsupportedError(
            f"{adapter}: {source.title} files are read, not written",
            hint="convert it first: `loratools convert` writes other formats",
        )
    if arch is not None:
        find_architecture(arch)
    weights = find_weights(Path(adapter))
    folder = source.is_folder(output)
    check_destination(Path(output), folder=folder, overwrite=overwrite, inputs=[weights])
    paths, _ = find_resizable(loaded)
    rows = None
    if base is not None:
        rows = locate_layers(loaded, paths, open_base(base), arch, called=str(adapter))
    done = resize_value(
        loaded, rule, source, rows=rows, score=score, balanced=not unbalanced, dtype=dtype,
        compute=compute, source_name=str(adapter), what_if=dry_run,
    )  # fmt: skip
    done = replace(done, notes=[*on_cpu, *done.notes])
    if not dry_run:
        save_adapter(done.adapter, output, format=source.name, overwrite=overwrite)
    written = None if dry_run else str(output)
    return _report(str(adapter), written, source, rule, _tensor_bytes(weights), done)


def parse_size(size: int | str | None) -> int | None:
    """Return bytes: ``64MiB`` is 64·1024², ``64MB`` 64·1000²; raises OptionError."""
    if size is None or isinstance(size, int):
        return size
    found = _SIZE.fullmatch(size.strip())
    if found is None:
        raise OptionError(f"{size!r} is no size", hint="write 64MiB, 1.5GB or a number of bytes")
    return int(float(found[1]) * _UNITS[(found[2] or "").lower()])


def _check_options(scope: str, score: str, rule: RankRule, base: PathLike | None) -> None:
    if scope not in ("layer", "global"):
        raise OptionError(f"unknown scope {scope!r}", hint="use layer or global")
    if score not in SCORES:
        raise OptionError(f"unknown score {score!r}", hint=f"use one of {', '.join(SCORES)}")
    if score != "absolute" and base is None:
        raise OptionError(f"--score {score} needs the base weights", hint="give them with --base")
    if score != "absolute" and not rule.is_global:
        raise OptionError(
            f"--score {score} compares layers, and this rule looks at each by itself",
            hint="it goes with --max-size, --mean-rank and --energy --scope global",
        )


def _with_float64(compute: Compute) -> tuple[Compute, list[Note]]:
    if compute.device != "mps":
        return compute, []
    return resolve_compute("cpu"), [Note("computed on the CPU: Metal has no float64")]


def resize_value(
    adapter: Adapter,
    rule: RankRule,
    target: Format,
    *,
    rows: BaseRows | None = None,
    score: str = "absolute",
    balanced: bool = True,
    dtype: str = "keep",
    compute: Compute | None = None,
    source_name: str = "adapter",
    what_if: bool = False,
) -> Resizing:
    """Return ``adapter`` at the ranks that ``rule`` chooses, for a file of format ``target``.

    Raises: see ``resize_adapter``.
    """
    where = compute or resolve_compute("cpu")
    narrow = narrow_dtype(dtype)
    paths, others = find_resizable(adapter)
    carried = {path: adapter.layers[path] for kind in others.values() for path in kind}
    check_finite(replace(adapter, layers=carried), source_name)
    layers = decompose(adapter, paths, where, rows)
    norms: Mapping[str, float] = {}
    if score != "absolute" and rows is not None:
        norms = layer_norms(rows, paths, score)
    candidates = [candidate(layer, narrow, norms) for layer in layers]
    sizing = Sizing(adapter, target, layers, candidates, dtype)
    ranks = sizing.choose(rule)
    done = resize_layers(layers, ranks, where, rows=rows, dtype=narrow, balanced=balanced)
    return Resizing(
        sizing.filled({one.layer.path: one.delta for one in done}, rule),
        done,
        others,
        sizing.choices() if what_if else (),
        [*resize_notes(adapter, done, others), *capped_notes(rule, done)],
    )


# ── the report ───────────────────────────────────────────────────────────────────────────────


def _tensor_bytes(weights: Path) -> int:
    if is_held(weights):
        return held_bytes(weights)
    if weights.suffix != ".safetensors":
        return weights.stat().st_size
    return sum(spec.nbytes for spec in read_header(weights).tensors.values())


def _report(
    source_path: str,
    output: str | None,
    source: Format,
    rule: RankRule,
    bytes_before: int,
    done: Resizing,
) -> Report:
    energy = sum(one.layer.energy for one in done.layers)
    written = source.write(done.adapter).tensors.values()
    before = [one.layer.rank for one in done.layers]
    facts: dict[str, Json] = {
        "format": source.name,
        "ranks_by": rule_words(rule),
        "layers_resized": len(done.layers),
        "layers_carried": sum(len(paths) for paths in done.others.values()),
        "extras": len(done.adapter.extras),
        "rank_before": rank_range([rank for rank in before if rank is not None]),
        "rank_after": rank_range([one.rank for one in done.layers]),
        "bytes_before": bytes_before,
        "bytes_after": sum(tensor.nbytes for tensor in written),
        "retained_energy": overall_retained(done.layers),
        "relative_error": relative_error(sum(one.squared_error for one in done.layers), energy),
    }
    if done.choices:
        facts["choices"] = [dict(row) for row in done.choices]
    items = tuple(item_of(one) for one in done.layers)
    return Report(
        "resize", (source_path,), output, facts, items, tuple(done.notes), dry_run=output is None
    )
