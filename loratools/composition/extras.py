"""Full tensors that adapters bring along, combined by weight.

An adapter with weight w takes a base tensor W to W + w·(V − W), so that several of them take it to
(1 − Σw)·W + Σ wᵢVᵢ. Where the weights of the adapters that have the tensor sum to 1, the base drops
out; otherwise it must be given.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from loratools.adapter import Adapter, Extra
from loratools.basemodel import open_base
from loratools.composition.weights import Weights
from loratools.deltas import Replacement, RowReplacement
from loratools.errors import InputError, MatchError, UnsupportedError
from loratools.keymaps.names import NameIndex
from loratools.linalg.finite import joint_dtype
from loratools.planning.base_rows import read_tensor
from loratools.report import Note

_ONE = 1e-9
_BUNDLED = "bundle_emb."


@dataclass(frozen=True, slots=True, eq=False)
class _Owned:
    """A tensor's replacements in the adapters that have it, with their weights."""

    name: str
    weights: tuple[float, ...]
    extras: tuple[Extra, ...]


def combine_extras(
    adapters: Sequence[Adapter], weights: Weights, base: str | os.PathLike[str] | None
) -> tuple[dict[str, Extra], list[Note]]:
    """Return the combined full tensors, and what was decided about them.

    Raises:
        InputError: replacements of one tensor that differ in shape.
        MatchError: a tensor that the base does not have, or not once.
        UnsupportedError: weights that do not sum to 1 and no base; rows beside a full tensor.
    """
    found: dict[str, Extra] = {}
    notes: list[Note] = []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.extras):
        owned = _owned(name, adapters, weights)
        if not owned.extras:
            notes.append(Note("left out: its weights are 0", "note", name))
        elif _are_one(owned) or name.startswith(_BUNDLED):
            found[name] = _the_one(owned)
        else:
            found[name] = _combined(owned, None if base is None else Path(base))
            words = " + ".join(f"{w:g}" for w in owned.weights)
            notes.append(Note(f"replaced tensors combined as {words}", "note", name))
    return found, notes


def _owned(name: str, adapters: Sequence[Adapter], weights: Weights) -> _Owned:
    pairs = [
        (w, adapter.extras[name])
        for w, adapter in zip(weights.of(name).tolist(), adapters, strict=True)
        if name in adapter.extras and w != 0
    ]
    return _Owned(name, tuple(w for w, _ in pairs), tuple(extra for _, extra in pairs))


def _are_one(owned: _Owned) -> bool:
    """Return whether nothing is to be computed: all alike, and the weights sum to 1.

    A copy of the base's own tensor stays what it is whatever the weights.
    """
    copies = all(isinstance(e, Replacement) and e.origin == "base_copy" for e in owned.extras)
    return (copies or abs(sum(owned.weights) - 1) <= _ONE) and _alike(owned.extras)


def _alike(extras: Sequence[Extra]) -> bool:
    first = extras[0]
    indices = {getattr(extra, "indices", None) for extra in extras}
    return len(indices) == 1 and all(
        type(extra) is type(first)
        and all(
            torch.equal(one, other)
            for one, other in zip(extra.tensors().values(), first.tensors().values(), strict=True)
        )
        for extra in extras[1:]
    )


def _the_one(owned: _Owned) -> Extra:
    if not _alike(owned.extras):
        raise UnsupportedError(
            f"{owned.name}: bundled with several adapters, and not the same",
            hint="a textual inversion has no base to be combined on; keep it in one of them",
        )
    return owned.extras[0]


def _combined(owned: _Owned, base: Path | None) -> Extra:
    kinds = {type(extra) for extra in owned.extras}
    if len(kinds) > 1:
        raise UnsupportedError(
            f"{owned.name}: one adapter replaces all of it and another some rows",
            hint="merge them into the base one after the other",
        )
    whole = [extra for extra in owned.extras if isinstance(extra, Replacement)]
    if whole:
        return _whole(owned, whole, base)
    return _rows(owned, [e for e in owned.extras if isinstance(e, RowReplacement)], base)


def _whole(owned: _Owned, extras: Sequence[Replacement], base: Path | None) -> Replacement:
    shapes = {tuple(extra.value.shape) for extra in extras}
    if len(shapes) > 1:
        words = " and ".join(str(shape) for shape in sorted(shapes))
        raise InputError(
            f"{owned.name}: replaced by tensors of {words}",
            hint="combine adapters of the same base model",
        )
    total = _weighted(owned.weights, [extra.value for extra in extras])
    rest = 1 - sum(owned.weights)
    if abs(rest) > _ONE:
        total += rest * _base_values(owned, base, total)
    dtype = joint_dtype(*(extra.value.dtype for extra in extras))
    return replace(extras[0], value=total.to(dtype))


def _weighted(weights: Sequence[float], values: Sequence[Tensor]) -> Tensor:
    total = torch.zeros(values[0].shape)
    for weight, value in zip(weights, values, strict=True):
        total += weight * value.to(torch.float32)
    return total


def _rows(owned: _Owned, extras: Sequence[RowReplacement], base: Path | None) -> RowReplacement:
    indices = sorted({index for extra in extras for index in extra.indices})
    place = {index: row for row, index in enumerate(indices)}
    total = torch.zeros(len(indices), extras[0].rows.shape[1])
    share = torch.zeros(len(indices), 1)
    for weight, extra in zip(owned.weights, extras, strict=True):
        at = torch.tensor([place[index] for index in extra.indices])
        total[at] += weight * extra.rows.to(torch.float32)
        share[at] += weight
    if float((1 - share).abs().max()) > _ONE:
        whole = _base_values(owned, base, None)
        total += (1 - share) * whole[torch.tensor(indices)]
    dtype = joint_dtype(*(extra.rows.dtype for extra in extras))
    return RowReplacement(total.to(dtype), tuple(indices))


def _base_values(owned: _Owned, base: Path | None, like: Tensor | None) -> Tensor:
    """Return the base's tensor in float32; raises where it cannot be had."""
    if base is None:
        words = " + ".join(f"{w:g}" for w in owned.weights)
        raise UnsupportedError(
            f"{owned.name}: a replaced tensor with weights {words} needs the base's own values",
            hint=f"add --base BASE, or --weights '{owned.name}=...' with weights that sum to 1",
        )
    model = open_base(base)
    homes = NameIndex(model.tensors).find(owned.name)
    if len(homes) != 1:
        raise MatchError(
            f"{owned.name}: {base} has {len(homes)} tensors of this name",
            hint="weights that sum to 1 need no base values",
        )
    values = read_tensor(model.tensors[homes[0]])
    if like is not None and values.shape != like.shape:
        raise MatchError(
            f"{owned.name}: {tuple(values.shape)} in {base}, {tuple(like.shape)} in the adapters",
            hint="is this the base they were trained on?",
        )
    return values
