"""Which adapter layer lands on which base tensor, and which way round; or why it does not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel
from loratools.deltas import (
    ExpertLoRA,
    LayerDelta,
    LoRA,
    MovedBase,
    Replacement,
    RowFold,
    RowReplacement,
)
from loratools.deltas.base import ShiftFold
from loratools.deltas.corner import CornerFold
from loratools.errors import MatchError, UnsupportedError
from loratools.formats.module_reading import RESHAPE
from loratools.formats.parameters import is_carried
from loratools.keymaps.names import NameIndex
from loratools.keymaps.transformers_rows import TIED_BIASES
from loratools.planning.orientation import Orientation
from loratools.planning.widening import Widening, find_widenings

Part = Literal["weight", "bias"]

_ADDABLE_HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight", "score.weight")
_SHOWN = 12
_CLASSES = frozenset({"classifier", "score", "qa_outputs", "lm_head", "embed_tokens", "head"})


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """One delta on one tensor.

    Attributes:
        tensor: the base's name for it.
        module: the adapter's path, for reports.
        delta: the change; ``part`` says whether its weight or its bias change is meant.
        strength: the user's multiplier.
        adapter: position of the adapter among the inputs.
        transposed: whether the base stores (in, out).
        part: weight or bias.
        corner: the shape that the delta is for and that of the widened weight it lands on, if
            another adapter widens it.
    """

    tensor: str
    module: str
    delta: LayerDelta
    strength: float
    adapter: int
    transposed: bool = False
    part: Part = "weight"
    corner: tuple[tuple[int, ...], tuple[int, ...]] | None = None

    def fold(self, device: str | torch.device) -> RowFold:
        """Prepare the change for folding; factors move to ``device`` here."""
        if self.part == "bias":
            bias = self.delta.bias_change
            assert bias is not None
            return ShiftFold((bias * self.strength).to(device))
        fold = self.delta.row_fold(self.strength, transposed=self.transposed, device=device)
        return CornerFold(fold, *self.corner) if self.corner else fold

    @property
    def new_shape(self) -> tuple[int, ...] | None:
        """The shape this placement gives the tensor, if it replaces it as a whole."""
        return self.delta.weight_shape if isinstance(self.delta, Replacement) else None


@dataclass(frozen=True, slots=True)
class Placed:
    """All placements of several adapters, what they widen, and what was noted on the way."""

    by_tensor: Mapping[str, tuple[Placement, ...]]
    added: tuple[str, ...]
    notes: tuple[str, ...]
    widened: Mapping[str, Widening]


def place_adapters(
    base: BaseModel,
    adapters: Sequence[tuple[Adapter, float]],
    *,
    names: Sequence[str] = (),
    tied_heads: Mapping[str, str] | None = None,
    residual_base: bool = False,
) -> Placed:
    """Find the tensor of every layer and extra, and its orientation.

    Args:
        base: the checkpoint.
        adapters: (adapter, strength) pairs.
        names: what errors call the adapters.
        tied_heads: tensor names that the base does not store but means, → the tensor they share.
        residual_base: fold adapters whose initialisation moved the base as plain LoRA.

    Raises:
        MatchError: naming every layer without a home, ambiguous or of another shape.
        UnsupportedError: a delta that no base can take.
    """
    finder = _Finder(base, tied_heads or {}, residual_base)
    finder.widen([adapter for adapter, _ in adapters])
    for position, (adapter, strength) in enumerate(adapters):
        finder.add_extras(adapter, strength, position)
    # A table that any adapter resizes is the weight that every LoRA must fit.
    for position, (adapter, strength) in enumerate(adapters):
        finder.add_layers(adapter, strength, position)
    if finder.problems:
        raise MatchError(_listing(finder, names), hint=_hint(finder))
    by_tensor: dict[str, list[Placement]] = {}
    for placement in finder.placements:
        by_tensor.setdefault(placement.tensor, []).append(placement)
    return Placed(
        {name: tuple(found) for name, found in by_tensor.items()},
        tuple(dict.fromkeys(finder.added)),
        tuple(dict.fromkeys(finder.notes)),
        finder.widened,
    )


@dataclass(frozen=True, slots=True)
class _Problem:
    """Why something of an adapter does not fit."""

    adapter: int
    reason: str


class _Finder:
    """Collects placements and problems, so that one error can name all of them."""

    def __init__(self, base: BaseModel, tied_heads: Mapping[str, str], residual_base: bool) -> None:
        self.base = base
        self.residual_base = residual_base
        self.shapes = {name: tensor.shape for name, tensor in base.tensors.items()}
        for head, shared in tied_heads.items():
            self.shapes.setdefault(head, self.shapes[shared])
        self.index = NameIndex(self.shapes)
        self.orientation = Orientation(self.shapes, base.config_words("model_type"))
        self.placements: list[Placement] = []
        self.added: list[str] = []
        self.problems: list[_Problem] = []
        self.position = 0
        self.notes: list[str] = []
        self.wanted = 0
        self.brought: Mapping[str, Replacement | RowReplacement] = {}
        self.widened: Mapping[str, Widening] = {}

    def widen(self, adapters: Sequence[Adapter]) -> None:
        self.widened, problems = find_widenings(self.shapes, self.index, adapters)
        self.problems += [_Problem(position, reason) for position, reason in problems]
        self.shapes |= {name: widening.after for name, widening in self.widened.items()}

    def add_extras(self, adapter: Adapter, strength: float, position: int) -> None:
        self.position = position
        self.brought = adapter.extras
        for name, extra in adapter.extras.items():
            if is_carried(name):
                self.notes.append(f"left out: {name} is no weight of the model")
                continue
            if name.endswith(RESHAPE):
                continue
            home = self._extra_home(name, extra)
            if home is not None:
                self.placements.append(Placement(home, name, extra, strength, position))
                if isinstance(extra, Replacement):
                    self.shapes[home] = extra.weight_shape

    def add_layers(self, adapter: Adapter, strength: float, position: int) -> None:
        self.position = position
        homes: dict[str, str] = {}
        for path, delta in adapter.layers.items():
            for placement in self._layer(path, self._usable(path, delta), strength, position):
                other = homes.setdefault(placement.tensor, path)
                if other != path:
                    self._refuse(f"{path}: lands on {placement.tensor}, as does {other}")
                self.placements.append(placement)

    def _refuse(self, reason: str) -> None:
        self.problems.append(_Problem(self.position, reason))

    def _usable(self, path: str, delta: LayerDelta) -> LayerDelta:
        if isinstance(delta, MovedBase) and self.residual_base:
            return delta.lora
        if isinstance(delta, MovedBase):
            self.notes.append(
                f"init {delta.start!r}: what it took out of the base is recomputed from the base, "
                "which must be the original one (--residual-base says otherwise)"
            )
        if delta.obstacle:
            raise UnsupportedError(
                f"{path}: {delta.obstacle}",
                hint="pass the residual base it was trained on with --residual-base, or save the "
                "adapter with PEFT's path_initial_model_for_weight_conversion",
            )
        return delta

    def _layer(
        self, path: str, delta: LayerDelta, strength: float, position: int
    ) -> Iterator[Placement]:
        self.wanted += 1
        if isinstance(delta, ExpertLoRA):
            split = self._split_experts(path, delta)
            if split:
                yield from (Placement(n, path, d, strength, position) for n, d in split)
                return
        names = [f"{path}.{leaf}".strip(".") for leaf in delta.parameter_names]
        name = self._home(path, names)
        if name is None:
            return
        corner = self._corner(name, delta)
        delta = _in_shape(delta, corner[0] if corner else self.shapes[name])
        if delta.changes_weight and corner:
            yield Placement(name, path, delta, strength, position, corner=corner)
        elif delta.changes_weight:
            transposed = self._turned(path, name, delta)
            if transposed is None:
                return
            yield Placement(name, path, delta, strength, position, transposed)
        if delta.bias_change is not None:
            bias = self._bias_home(path, name, delta.bias_change)
            if bias is not None:
                yield Placement(bias, path, delta, strength, position, part="bias")

    def _corner(
        self, name: str, delta: LayerDelta
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """Return the shapes for a delta of the weight as it was before it was widened."""
        widening = self.widened.get(name)
        if widening is None:
            return None
        if _in_shape(delta, widening.before).weight_shape != widening.before:
            return None
        return widening.before, widening.after

    def _split_experts(self, path: str, delta: ExpertLoRA) -> list[tuple[str, LoRA]]:
        """Return the tensors of a base that stores every expert by itself, and their LoRAs."""
        experts, out, inner = delta.weight_shape
        homes = self.index.find_experts(path, experts)
        if not homes:
            return []
        rows = [self.shapes[name][0] for name in homes[0]]
        columns = self.shapes[homes[0][0]][1]
        straight, flipped = (
            (out, inner) == (sum(rows), columns),
            (inner, out) == (sum(rows), columns),
        )
        if straight and flipped:
            flipped = delta.flipped_if_square
        if not straight and not flipped:
            stored = f"{len(rows)} tensors of {sum(rows)} rows in all and {columns} columns"
            self._refuse(f"{path}: an expert is {(out, inner)}, but the base has {stored}")
            return []
        self.notes.append(
            f"experts: {path.rpartition('.')[2]} is stored as {experts * len(rows)} tensors a layer"
        )
        pieces = []
        for expert, names in enumerate(homes):
            lora = delta.expert(expert)
            if flipped:
                lora = replace(lora, down=lora.up.T, up=lora.down.T)
            for name, up in zip(names, torch.split(lora.up, rows), strict=True):
                pieces.append((name, replace(lora, up=up)))
        return pieces

    def _home(self, path: str, candidates: Sequence[str]) -> str | None:
        for candidate in candidates:
            found = self.index.find(candidate)
            if len(found) > 1:
                self._refuse(f"{path}: several tensors fit: {', '.join(found[:4])}")
                return None
            if found:
                self._note_renaming(candidate, found[0])
                return found[0]
        near = self._nearest(candidates[0])
        suggestion = f" (nearest: {', '.join(near)})" if near else ""
        self._refuse(f"{path}: no such tensor in the base{suggestion}")
        return None

    def _nearest(self, name: str) -> list[str]:
        # Only the first problems are shown, and resemblance is slow among many names.
        return self.index.nearest(name) if len(self.problems) < _SHOWN else []

    def _note_renaming(self, asked: str, found: str) -> None:
        if asked == found:
            return
        ending = 0
        while asked[-ending - 1 :] == found[-ending - 1 :] and ending < min(len(asked), len(found)):
            ending += 1
        ours, theirs = (
            re.sub(r"\d+", "N", name[: len(name) - ending]) or "(nothing)"
            for name in (asked, found)
        )
        self.notes.append(f"names: the adapter's {ours!r} is the base's {theirs!r}")

    def _turned(self, path: str, name: str, delta: LayerDelta) -> bool | None:
        turned = self.orientation.turned(name, delta)
        if turned is None:
            self._refuse(f"{path}: {_mismatch(delta, name, self.shapes[name])}")
        return turned

    def _bias_home(self, path: str, weight_name: str, change: Tensor) -> str | None:
        name = weight_name.removesuffix("weight") + "bias"
        if self.shapes.get(name) == tuple(change.shape):
            return name
        self._refuse(f"{path}: lora_bias needs a bias in the base, and {name} is not there")
        return None

    def _extra_home(self, name: str, extra: Replacement | RowReplacement) -> str | None:
        self.wanted += 1
        found = self.index.find(name) or self._tied_bias(name)
        if len(found) == 1 and self._extra_fits(name, found[0], extra):
            self._note_renaming(name, found[0])
            return found[0]
        if not found and isinstance(extra, Replacement) and self._addable(name, extra):
            self.added.append(name)
            return name
        if len(found) != 1:
            near = self._nearest(name)
            suggestion = f" (nearest: {', '.join(near)})" if near else ""
            self._refuse(f"{name}: a full tensor that the base lacks{suggestion}")
        return None

    def _tied_bias(self, name: str) -> list[str]:
        """Return the stored bias that a head's bias shares (bias="all" saves both)."""
        shared = {
            name[: -len(bias)] + kept
            for bias, kept in TIED_BIASES
            if f".{name}".endswith(f".{bias}")
        }
        return sorted(shared & self.shapes.keys())

    def _addable(self, name: str, extra: Replacement) -> bool:
        return extra.expected or name.endswith(_ADDABLE_HEADS)

    def _extra_fits(self, name: str, home: str, extra: Replacement | RowReplacement) -> bool:
        stored, shape = self.shapes[home], extra.weight_shape
        if isinstance(extra, RowReplacement):
            fits = len(stored) == 2 and stored[1] == shape[1] and shape[0] <= stored[0]
        else:
            # Another number of rows is a resized vocabulary.
            fits = stored == shape or (
                len(stored) in (1, 2) and stored[1:] == shape[1:] and self._resizable(name, home)
            )
        if not fits:
            self._refuse(f"{name}: {shape} does not fit the base's {home} {stored}")
        return fits

    def _resizable(self, name: str, home: str) -> bool:
        """Return whether the rows of a tensor are a vocabulary's or classes, which may grow."""
        if len(self.shapes[home]) == 1:
            weight = self.brought.get(name.removesuffix("bias") + "weight")
            rows = self.brought[name].weight_shape[0]
            return name.endswith("bias") and weight is not None and weight.weight_shape[0] == rows
        owner = home.removesuffix(".weight").split(".")
        sizes = self.base.config_words("vocab_size")
        return not sizes or self.shapes[home][0] in sizes or not _CLASSES.isdisjoint(owner)


def _in_shape(delta: LayerDelta, stored: tuple[int, ...]) -> LayerDelta:
    """Return the delta in the shape the base stores, where it can be written so row for row."""
    if delta.weight_shape == stored or delta.stored_transposed:
        return delta
    try:
        return delta.reshaped(stored)
    except UnsupportedError:
        # The comparison of shapes that follows says what does not fit, or finds it transposed.
        return delta


def _mismatch(delta: LayerDelta, name: str, stored: tuple[int, ...]) -> str:
    shape = delta.weight_shape
    text = f"the adapter's weight is {shape} but the base's {name} is {stored}"
    if len(shape) > 2 and len(stored) == len(shape) and stored[1] < shape[1]:
        return text + " (a grouped convolution cannot hold a dense LoRA)"
    return text


def _listing(finder: _Finder, names: Sequence[str]) -> str:
    """Return a paragraph for each adapter that does not fit, and a line for each reason."""
    reasons: dict[str, list[str]] = {}
    for problem in finder.problems:
        name = names[problem.adapter] if names else f"adapter {problem.adapter + 1}"
        reasons.setdefault(name, []).append(problem.reason)
    lines = []
    for name, found in reasons.items():
        count = "tensor does" if len(found) == 1 else "tensors do"
        lines.append(f"{name} onto {finder.base.path}: {len(found)} adapter {count} not fit")
        lines += [f"  {reason}" for reason in found[:_SHOWN]]
        lines += [f"  ... and {len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
    return "\n".join(lines)


def _hint(finder: _Finder) -> str:
    if len(finder.problems) >= finder.wanted:
        return "nothing matches: is this the base the adapter was trained on?"
    return "nothing was written; is this the base the adapter was trained on, and the file whole?"
