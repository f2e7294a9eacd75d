"""Tied embeddings: one stored tensor that is both input table and output head.

An adapter that changes only one of the two, or both differently, unties them: each gets a tensor
of its own and the config says so. An adapter that changes both alike leaves them tied, changed
once. (PEFT adds a change of either to the shared tensor, and so to both.)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from loratools.basemodel import BaseModel, BaseTensor
from loratools.deltas import LoRA, Replacement, RowReplacement
from loratools.errors import UnsupportedError
from loratools.keymaps.names import NameIndex
from loratools.keymaps.transformers_rows import (
    HEAD_OF_TYPE,
    HEADS,
    TIED,
    TIED_BIASES,
    TIED_TABLES,
    UNTYING_CHANGES_FORWARD,
)
from loratools.planning.placement import Placement
from loratools.tensorfiles.dtypes import DTYPES

Placements = tuple[Placement, ...]

_PIECE = 1 << 22


@dataclass(frozen=True, slots=True)
class Tie:
    """The input table and the output head of a language model.

    Attributes:
        input: the input table's tensor name, which the base stores.
        head: the output head's tensor name.
        stored: whether the base also stores the head.
        tied: whether the two are one tensor by the config's word.
        copies: further input tables that share the tensor as long as the head does.
    """

    input: str
    head: str
    stored: bool
    tied: bool
    copies: tuple[str, ...] = ()

    def unstored(self, base: BaseModel) -> list[str]:
        """Return the names that the base does not store, but means the shared tensor by."""
        return [name for name in (self.head, *self.copies) if name not in base.tensors]


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
    if base.is_gguf:
        return _gguf_tie(base)
    names = NameIndex(base.tensors)
    own = {HEAD_OF_TYPE[t] for t in base.config_words("model_type") if t in HEAD_OF_TYPE}
    # A row that names the table exactly goes before one that needs a prefix more or less, and a
    # table that others are tied to before those, which older checkpoints store beside it.
    shared = dict(TIED_TABLES)
    rows = sorted(
        TIED,
        key=lambda row: (
            row[0] not in own,
            f"{row[1]}.weight" not in base.tensors,
            row[1] not in shared,
        ),
    )
    tables = [(head, table, names.find(f"{table}.weight")) for head, table in rows]
    pairs = [(head, table, found[0]) for head, table, found in tables if len(found) == 1]
    for head, table, name in pairs:
        stored = names.find(f"{head}.weight")
        if len(stored) == 1:
            return Tie(name, stored[0], True, _is_tied(base, head_stored=True), _copies(table))
    if not pairs:
        return None
    head, table, name = pairs[0]
    return Tie(name, f"{head}.weight", False, _is_tied(base, head_stored=False), _copies(table))


def _gguf_tie(base: BaseModel) -> Tie | None:
    """Return a GGUF model's tables; llama.cpp takes the input table where there is no head."""
    table, head = "token_embd.weight", "output.weight"
    if table not in base.tensors:
        return None
    stored = head in base.tensors
    return Tie(table, head, stored, tied=not stored)


def _copies(table: str) -> tuple[str, ...]:
    return tuple(f"{copy}.weight" for copy in dict(TIED_TABLES).get(table, ()))


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
    refuse_unknown_tie(base, tie, by_tensor)
    names = (tie.input, tie.head, *tie.copies) if tie else ()
    if tie is None or by_tensor.keys().isdisjoint(names):
        return Untied(by_tensor)
    changed = {copy: by_tensor[copy] for copy in tie.copies if copy in by_tensor}
    _refuse_tables(base, tie, by_tensor, changed)
    stored = tuple(copy for copy in tie.copies if copy in base.tensors)
    if tie.input in by_tensor:
        by_tensor = {**by_tensor, **dict.fromkeys(stored, by_tensor[tie.input])}
    if not tie.tied:
        return Untied(by_tensor)
    if tie.stored and not _same_bytes(base.tensors[tie.input], base.tensors[tie.head]):
        note = f"{tie.input} and {tie.head} are stored with different values: taken as not tied"
        return Untied(by_tensor, notes=(note,))
    shared, own_input = _split_shared(by_tensor.get(tie.input, ()), base, tie)
    own_head = tuple(p for p in by_tensor.get(tie.head, ()) if not _repeats(p, shared))
    rest = {k: v for k, v in by_tensor.items() if k not in (tie.input, tie.head)}
    if not changed and _same_effect(own_input, own_head):
        kept = {tie.input: shared + own_input}
        if tie.stored:
            kept[tie.head] = shared + own_input
        note = "tied embeddings: both changed alike, so the shared tensor is changed once"
        return Untied({**rest, **kept}, {tie.head: tie.input}, notes=(note,))
    _refuse_untying(base)
    split = {tie.input: shared + own_input, tie.head: shared + own_head}
    biases = _untied_biases(base, tie)
    split |= {name: by_tensor.get(name, ()) for name in biases}
    # transformers ties the encoder's and the decoder's tables by the same flag as the head.
    missing = [copy for copy in tie.copies if copy not in base.tensors]
    split |= dict.fromkeys(missing, shared + own_input) | changed
    biases |= dict.fromkeys(missing, tie.input)
    apart = ", ".join([tie.head, *changed])
    note = (
        f"tied embeddings: {tie.input} and {apart} now differ, so each is stored and "
        "tie_word_embeddings is false"
    )
    config = {"tie_word_embeddings": False}
    return Untied({**rest, **split}, {tie.head: tie.input, **biases}, config, (note,))


def _refuse_tables(
    base: BaseModel,
    tie: Tie,
    by_tensor: Mapping[str, Placements],
    changed: Mapping[str, Placements],
) -> None:
    """Raise UnsupportedError where tables that share a tensor cannot be told apart.

    A low-rank change of an encoder's or a decoder's own table stands by itself. Rows or whole
    tables, and changes of the shared table beside it, would have to be for all of them or for one.
    """
    if not changed:
        return
    plain = all(_is_table_change(p) for placements in changed.values() for p in placements)
    if tie.input in by_tensor or (tie.tied and not plain):
        raise UnsupportedError(
            f"{base.path}: the adapter changes {', '.join(changed)}, one of several tables that "
            f"share {tie.input}, and not by itself",
            hint="retrain with the embeddings' modules as LoRA targets and without the shared "
            "table, or without the embeddings",
        )


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


def refuse_unknown_tie(
    base: BaseModel, tie: Tie | None, by_tensor: Mapping[str, Placements]
) -> None:
    """Raise UnsupportedError for a changed input table whose output head no row names."""
    sizes = base.config_words("vocab_size")
    architectures = base.config_word("architectures") or []
    has_head = any(str(a).endswith(HEADS) for a in architectures)
    ties = base.config_words("tie_word_embeddings")
    known = (tie.input, tie.head, *tie.copies) if tie else ()
    composite = any(str(a).endswith("EncoderDecoderModel") for a in architectures)
    if not has_head or (ties and not any(ties)):
        return
    for name, placements in by_tensor.items():
        tensor = base.tensors.get(name)
        table = tensor is not None and len(tensor.shape) == 2 and tensor.shape[0] in sizes
        if table and (composite or name not in known) and any(map(_is_table_change, placements)):
            raise UnsupportedError(
                f"{name}: an input table that may be the output head too, and loratools does not "
                "know this model's head",
                hint="merge with PEFT, or set tie_word_embeddings to false in config.json if the "
                "two are separate",
            )


def _is_table_change(placement: Placement) -> bool:
    delta = getattr(placement.delta, "inner", placement.delta)
    return isinstance(delta, LoRA) and delta.role == "embedding"


def _same_bytes(one: BaseTensor, other: BaseTensor) -> bool:
    """Return whether two stored tensors agree in every byte, from pieces of them."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    if one.start is not None and (one.file, one.start) == (other.file, other.start):
        return True
    if one.values is not None and other.values is not None:
        return torch.equal(one.values, other.values)
    if one.packed is not None and other.packed is not None:
        pairs = zip(one.packed.tensors.values(), other.packed.tensors.values(), strict=False)
        return all(_same_bytes(part, counterpart) for part, counterpart in pairs)
    return one.start is not None and other.start is not None and _same_ranges(one, other)


def _same_ranges(one: BaseTensor, other: BaseTensor) -> bool:
    assert one.start is not None
    assert other.start is not None
    left = nbytes = math.prod(one.shape) * DTYPES[one.dtype] // 8
    with one.file.open("rb") as a, other.file.open("rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        while left:
            piece = a.read(min(left, _PIECE))
            if not piece or piece != b.read(len(piece)):
                return False
            left -= len(piece)
    return nbytes == 0 or not left


def _refuse_untying(base: BaseModel) -> None:
    model_types = UNTYING_CHANGES_FORWARD.intersection(base.config_words("model_type"))
    for model_type in sorted(model_types):
        raise UnsupportedError(
            f"{base.path}: the adapter changes only one of two tied embeddings, and a {model_type} "
            "model computes differently once they are untied",
            hint="retrain without lm_head and the shared embedding as targets",
        )
