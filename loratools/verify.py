"""Comparing adapters in ΔW, across formats and namings, without a dense matrix."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from loratools.adapter import Adapter
from loratools.adapter_io import open_adapter
from loratools.deltas import AdditiveDelta, LayerDelta, LoRA
from loratools.hub.taking import takes_references
from loratools.keymaps.gguf_base import open_gguf_base
from loratools.keymaps.gguf_naming import concerns_gguf, in_transformers_naming
from loratools.keymaps.mlx_base import open_mlx_base
from loratools.keymaps.mlx_naming import concerns_mlx, meeting
from loratools.keymaps.translate import in_one_naming
from loratools.linalg.gram import product_norm
from loratools.report import Json, Note, Report

PathLike = str | os.PathLike[str]


@takes_references(first="adapter", second="adapter", base="names")
def compare_adapters(
    first: PathLike,
    second: PathLike,
    *,
    arch: str | None = None,
    base: PathLike | None = None,
    tolerance: float = 1e-5,
) -> Report:
    """Compare two adapters module by module: ‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖.

    The facts say ``same``; modules that only one has count as differences.

    Args:
        first: an adapter file or folder, of any format.
        second: another.
        arch: the architecture, where the files do not tell.
        base: the language model of GGUF adapters (see ``convert_adapter``), where they do not tell.
        tolerance: largest relative difference that counts as the same.

    Raises:
        InputError: a file that cannot be read, or two adapters of different architectures.
    """
    loaded = [open_adapter(path, activated=True)[1] for path in (first, second)]
    if concerns_gguf(*{adapter.naming for adapter in loaded}):
        loaded = list(in_transformers_naming(loaded, open_gguf_base(Path(base)) if base else None))
    if concerns_mlx(*{adapter.naming for adapter in loaded}):
        folder = base is not None and Path(base).suffix != ".gguf"
        known = open_mlx_base(Path(base)) if base and folder else None
        loaded = list(meeting(loaded, known))
    (one, other), _ = in_one_naming(loaded, arch)
    rows = [_row(path, one.layers.get(path), other.layers.get(path)) for path in _paths(one, other)]
    notes = [*_extra_notes(one, other)]
    differing = [row for row in rows if not row["difference"] <= tolerance]
    squares = sum((row["difference"] * (row["norm"] or 0.0)) ** 2 for row in rows)
    whole = sum((row["norm"] or 0.0) ** 2 for row in rows)
    facts: dict[str, Json] = {
        "same": not differing and not notes,
        "modules": len(rows),
        "modules_differing": len(differing),
        "largest_difference": max((row["difference"] for row in rows), default=0.0),
        "relative_difference": math.sqrt(squares / whole) if whole else 0.0,
    }
    return Report("diff", (str(first), str(second)), None, facts, tuple(rows), tuple(notes))


def _paths(one: Adapter, other: Adapter) -> list[str]:
    return list(dict.fromkeys((*one.layers, *other.layers)))


def _row(path: str, one: LayerDelta | None, other: LayerDelta | None) -> dict[str, Json]:
    present = one or other
    assert present is not None
    row: dict[str, Json] = {"module": path, "norm": present.norm()}
    if one is None or other is None:
        return {
            **row,
            "difference": math.inf,
            "why": f"only in the {'second' if one is None else 'first'}",
        }
    return {**row, **_difference(one, other)}


def _difference(one: LayerDelta, other: LayerDelta) -> dict[str, Json]:
    plain = [d.low_rank() if isinstance(d, AdditiveDelta) else None for d in (one, other)]
    if plain[0] is not None and plain[1] is not None:
        return _product_difference(plain[0], plain[1])
    if isinstance(one, AdditiveDelta) and isinstance(other, AdditiveDelta):
        return _dense_difference(one, other)
    same = one.kind == other.kind and _same_tensors(one, other)
    return {"difference": 0.0 if same else math.inf, "why": None if same else "other tensors"}


def _product_difference(one: LoRA, other: LoRA) -> dict[str, Json]:
    shapes = [lora.up.flatten(1).shape[0] for lora in (one, other)]
    widths = [lora.down.flatten(1).shape[1] for lora in (one, other)]
    if shapes[0] != shapes[1] or widths[0] != widths[1]:
        return {"difference": math.inf, "why": f"{one.weight_shape} and {other.weight_shape}"}
    factors = [(up * lora.scale, down) for lora in (one, other) for up, down in [lora.factors()]]
    up = torch.cat([factors[0][0], -factors[1][0]], dim=1)
    down = torch.cat([factors[0][1], factors[1][1]], dim=0)
    return _relative(_difference_norm(up, down), product_norm(*factors[0]))


def _difference_norm(up: torch.Tensor, down: torch.Tensor) -> float:
    """Return ‖up @ down‖ from triangular factors, which keeps small differences exact."""
    left = torch.linalg.qr(up.double(), mode="r").R
    right = torch.linalg.qr(down.double().T, mode="r").R
    return float((left @ right.T).norm())


def _dense_difference(one: AdditiveDelta, other: AdditiveDelta) -> dict[str, Json]:
    first, second = one.materialize(), other.materialize()
    if first.numel() != second.numel():
        return {"difference": math.inf, "why": f"{one.weight_shape} and {other.weight_shape}"}
    return _relative(float((first - second.reshape(first.shape)).norm()), float(first.norm()))


def _relative(difference: float, norm: float) -> dict[str, Json]:
    if norm == 0:
        return {"difference": 0.0 if difference == 0 else math.inf, "why": None}
    return {"difference": difference / norm, "why": None}


def _same_tensors(one: LayerDelta, other: LayerDelta) -> bool:
    ours: Mapping[str, torch.Tensor] = one.tensors()
    theirs = other.tensors()
    return ours.keys() == theirs.keys() and all(
        ours[name].shape == theirs[name].shape and torch.equal(ours[name], theirs[name])
        for name in ours
    )


def _extra_notes(one: Adapter, other: Adapter) -> list[Note]:
    notes = []
    for name in dict.fromkeys((*one.extras, *other.extras)):
        ours, theirs = one.extras.get(name), other.extras.get(name)
        if ours is None or theirs is None:
            notes.append(Note("only one adapter has this tensor", "warning", name))
        elif not _same_tensors(ours, theirs):
            notes.append(Note("the tensors differ", "warning", name))
    return notes
