"""Tied embeddings: one stored tensor that is both input table and output head.

An adapter that changes only one of the two, or both differently, unties them: each gets a tensor
of its own and the config says so. An adapter that changes both alike leaves them tied, changed
once. (PEFT adds a change of either to the shared tensor, and so to both.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from loratools.basemodel import BaseModel
from loratools.deltas import LoRA, Replacement, RowReplacement
from loratools.errors import UnsupportedError
from loratools.keymaps.names import NameIndex
from loratools.keymaps.transformers_rows import HEADS, TIED, TIED_BIASES, UNTYING_CHANGES_FORWARD
from loratools.planning.placement import Placement

Placements = tuple[Placement, ...]


@dataclass(frozen=True, slots=True)
class Tie:
    """The input table and the output head of a language model.

    Attributes:
        input: the input table's tensor name, which the base stores.
        head: the output head's tensor name.
        stored: whether the base also stores the head.
        tied: whether the two are one tensor by the config's word.
    """

    input: str
    head: str
    stored: bool
    tied: bool


@dataclass(frozen=True, slots=True)
class Untied:
    """Placements after the tie has been dealt with.

    Attributes:
        by_tensor: as before, with what is shared on both names.
        sources: tensor name → the base tensor whose values it starts from, where that is another.
        config: fields of ``config.json`` to set.
        notes: what was decided.
    """

    by_tensor: Mapping[str, Placements]
    sources: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()


def find_tie(base: BaseModel) -> Tie | None:
    """Return the base's embedding tensors, or None when it has no table that rows name."""
    names = NameIndex(base.tensors)
    tables = [(head, names.find(f"{table}.weight")) for head, table in TIED]
    pairs = [(head, found[0]) for head, found in tables if len(found) == 1]
    for head, table in pairs:
        stored = names.find(f"{head}.weight")
        if len(stored) == 1:
            return Tie(table, stored[0], True, _is_tied(base, head_stored=True))
    if not pairs:
        return None
    head, table = pairs[0]
    return Tie(table, f"{head}.weight", False, _is_tied(base, head_stored=False))


def _is_tied(base: BaseModel, *, head_stored: bool) -> bool:
    word = base.config_word("tie_word_embeddings")
    architectures = base.config_word("architectures") or []
    has_head = not architectures or any(str(a).endswith(HEADS) for a in architectures)
    if word is None:
        # transformers' default is to tie where the class ties at all; no head stored confirms it.
        return has_head and bool(architectures) and not head_stored
    return bool(word) and has_head


def resolve_tie(base: BaseModel, tie: Tie | None, by_tensor: Mapping[str, Placements]) -> Untied:
    """Decide whether the tie holds, and share or split the placements accordingly.

    Raises UnsupportedError for models whose forward pass itself depends on the tie.
    """
    if tie is None or not tie.tied or not (tie.input in by_tensor or tie.head in by_tensor):
        return Untied(by_tensor)
    shared, own_input = _split_shared(by_tensor.get(tie.input, ()), base, tie)
    own_head = tuple(p for p in by_tensor.get(tie.head, ()) if not _repeats(p, shared))
    rest = {k: v for k, v in by_tensor.items() if k not in (tie.input, tie.head)}
    if _same_effect(own_input, own_head):
        kept = {tie.input: shared + own_input}
        if tie.stored:
            kept[tie.head] = shared + own_input
        note = "tied embeddings: both changed alike, so the shared tensor is changed once"
        return Untied({**rest, **kept}, {tie.head: tie.input}, notes=(note,))
    _refuse_untying(base)
    split = {tie.input: shared + own_input, tie.head: shared + own_head}
    biases = _untied_biases(base, tie)
    split |= {name: by_tensor.get(name, ()) for name in biases}
    note = (
        f"tied embeddings: {tie.input} and {tie.head} now differ, so both are stored and "
        "tie_word_embeddings is false"
    )
    config = {"tie_word_embeddings": False}
    return Untied({**rest, **split}, {tie.head: tie.input, **biases}, config, (note,))


def _untied_biases(base: BaseModel, tie: Tie) -> dict[str, str]:
    """Return the biases that are tied along with the head: name → the stored tensor they copy."""
    names = NameIndex(base.tensors)
    found = {}
    for bias, shared in TIED_BIASES:
        stored = names.find(shared)
        belongs = bias.removesuffix("bias") == tie.head.removesuffix("weight")
        if belongs and bias not in base.tensors and len(stored) == 1:
            found[bias] = stored[0]
    return found


def _split_shared(
    placements: Placements, base: BaseModel, tie: Tie
) -> tuple[Placements, Placements]:
    """Separate what changes the shared tensor itself from what changes the input table alone."""
    rows = base.tensors[tie.input].shape[0]

    def is_shared(placement: Placement) -> bool:
        delta = placement.delta
        if isinstance(delta, RowReplacement):
            return True
        resized = placement.new_shape is not None and placement.new_shape[0] != rows
        return isinstance(delta, Replacement) and (delta.origin == "base_copy" or resized)

    shared = tuple(p for p in placements if is_shared(p))
    return shared, tuple(p for p in placements if not is_shared(p))


def _repeats(placement: Placement, shared: Placements) -> bool:
    """Return whether a head's placement says again what is shared already."""
    return any(_same(placement, other) for other in shared)


def _same_effect(ours: Placements, theirs: Placements) -> bool:
    return len(ours) == len(theirs) and all(map(_same, ours, theirs))


def _same(one: Placement, other: Placement) -> bool:
    if one.strength != other.strength or one.part != other.part:
        return False
    pairs = list(zip(_stored_values(one), _stored_values(other), strict=False))
    return bool(pairs) and all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _stored_values(placement: Placement) -> tuple[Tensor, ...]:
    """Return tensors that are equal for two placements exactly if their effect is."""
    delta = placement.delta
    if isinstance(delta, LoRA):
        up, down = delta.factors()
        left, right = (down.T, up.T) if placement.transposed else (up, down)
        return left, right, torch.tensor(delta.scale)
    if isinstance(delta, Replacement):
        return (delta.value,)
    if isinstance(delta, RowReplacement):
        return delta.rows, torch.tensor(delta.indices)
    return ()


def _refuse_untying(base: BaseModel) -> None:
    model_type = base.config_word("model_type")
    if model_type in UNTYING_CHANGES_FORWARD:
        raise UnsupportedError(
            f"{base.path}: the adapter changes only one of two tied embeddings, and a {model_type} "
            "model computes differently once they are untied",
            hint="retrain without lm_head and the shared embedding as targets",
        )
