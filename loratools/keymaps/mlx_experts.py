"""Experts between checkpoints, transformers' memory and mlx-lm, whose layers are stacks of them.

A gate, an up and a down of all experts are three stacks in mlx-lm, (experts, out, in) each.
Checkpoints have one matrix an expert, or as transformers in memory one parameter for gates and ups.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from loratools.deltas import ExpertLoRA, LayerDelta, LoRA
from loratools.errors import InputError, MatchError
from loratools.keymaps.gguf_factors import Change, Parts, join_rows, with_rows
from loratools.keymaps.gguf_ops import Split, Stack
from loratools.keymaps.mlx_base import MLXBase
from loratools.keymaps.mlx_rows import FUSED_IN_MEMORY, OWNER_DISK, PROJECTIONS

_NEEDS_BASE = "name the base model with --base: its folder or its config.json"
_ONE = re.compile(r"(?P<owner>.+)\.experts\.(?P<number>\d+)\.(?P<leaf>\w+)")
_ALL = re.compile(r"(?P<owner>.+)\.experts\.(?P<leaf>gate_up_proj|up_proj|down_proj)")
_MLX = re.compile(
    r"(?P<owner>.+)\.(?P<stack>experts\.switch_glu|switch_mlp|experts)"
    r"\.(?P<leaf>gate_proj|up_proj|down_proj|fc1|fc2)"
)
_MEANING = {
    **{name: name for name in PROJECTIONS},
    **dict(zip(("w1", "w3", "w2"), PROJECTIONS, strict=True)),
    "fc1": "up_proj",
    "fc2": "down_proj",
}
"""A matrix's name anywhere → which of the three it is."""

Layers = Mapping[str, LayerDelta]


# ── to mlx-lm ────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class _Stacks:
    """Where stacks are put: mlx-lm's names by parent and projection."""

    base: MLXBase

    def path(self, owner: str, projection: str) -> str:
        row = self.base.row
        leaf = row.stacked[PROJECTIONS.index(projection)]
        parent, _, last = owner.rpartition(".")
        if row.owner and last == row.owner[0]:
            owner = f"{parent}.{row.owner[1]}"
        return f"{owner}.{row.stack}.{leaf}"


def stacked_experts(layers: Layers, base: MLXBase) -> tuple[dict[str, LayerDelta], list[str]]:
    """Return the layers with experts in mlx-lm's stacks, and notes.

    Raises:
        InputError: a fused parameter, whose layout the model's type tells.
        MatchError: more experts than the base has.
    """
    names, done = _Stacks(base), dict[str, LayerDelta]()
    single: dict[str, dict[int, LoRA]] = {}
    for path, delta in layers.items():
        one, fused = _ONE.fullmatch(path), _ALL.fullmatch(path)
        if one and isinstance(delta, LoRA) and one["leaf"] in _MEANING:
            home = names.path(one["owner"], _MEANING[one["leaf"]])
            single.setdefault(home, {})[int(one["number"])] = delta
        elif fused and isinstance(delta, ExpertLoRA):
            done |= _taken_apart(fused["owner"], fused["leaf"], delta, names)
        else:
            done[path] = delta
    count, notes = _count(single, base)
    for path, experts in single.items():
        (stack,) = Stack(count).do([experts.get(number) for number in range(count)])
        assert stack is not None
        done[path] = stack
    return done, notes


def _count(single: Mapping[str, Mapping[int, LoRA]], base: MLXBase) -> tuple[int, list[str]]:
    """Return the number of experts of a layer, and a note where the adapter alone tells it."""
    if not single:
        return 0, []
    needed = 1 + max(number for experts in single.values() for number in experts)
    if base.experts is None:
        return needed, [
            f"experts: {needed} in a layer, by the adapter's own numbers; --base settles it"
        ]
    if needed > base.experts:
        raise MatchError(
            f"the adapter changes expert {needed - 1}, and the base has {base.experts} in a layer",
            hint="is this the base that the adapter was made for?",
        )
    return base.experts, []


def _taken_apart(owner: str, leaf: str, stack: ExpertLoRA, names: _Stacks) -> dict[str, LayerDelta]:
    """Return the stacks of a parameter of transformers', (experts, out, in)."""
    base = names.base
    if base.model_type is None:
        raise InputError(
            f"{owner}.experts.{leaf}: how gates and ups stand in it depends on the type of model, "
            "and no base is given",
            hint=_NEEDS_BASE,
        )
    straight = _straight(stack, leaf, base)
    if leaf != "gate_up_proj":
        return {names.path(owner, leaf): straight}
    if base.row.woven:
        rows = straight.weight_shape[1]
        order = torch.cat([torch.arange(0, rows, 2), torch.arange(1, rows, 2)])
        straight = with_rows(straight, order)  # type: ignore[assignment]
    parts = Split(count=2).do([straight])
    pairs = zip(PROJECTIONS[:2], parts, strict=True)
    return {names.path(owner, name): part for name, part in pairs if part is not None}


def _straight(stack: ExpertLoRA, leaf: str, base: MLXBase) -> ExpertLoRA:
    """Return the stack as (experts, out, in), by the model's width; a square one by its flag."""
    text = base.config.get("text_config")
    words = {**base.config, **(text if isinstance(text, dict) else {})}
    width, shape = words.get("hidden_size"), stack.weight_shape
    axis = 1 if leaf == "down_proj" else 2
    square = shape[1] == shape[2]
    if not square and width not in shape[1:]:
        raise MatchError(
            f"experts of {shape[1]}x{shape[2]}, and the base is {width} wide",
            hint="is this the base that the adapter was made for?",
        )
    turned = stack.flipped_if_square if square else shape[axis] != width
    plain = replace(stack, flipped_if_square=False)
    return replace(plain, down=plain.up.mT, up=plain.down.mT) if turned else plain


# ── from mlx-lm ──────────────────────────────────────────────────────────────────────────────


def unstacked_experts(layers: Layers, base: MLXBase, *, in_memory: bool) -> dict[str, LayerDelta]:
    """Return the layers with experts as the base's checkpoint has them, or as they are in memory.

    Without a base: one matrix an expert, as nearly all checkpoints. Raises InputError where that
    cannot be told.
    """
    done, groups = dict[str, LayerDelta](), dict[str, dict[str, ExpertLoRA]]()
    for path, delta in layers.items():
        match = _MLX.fullmatch(path)
        if match is None or not isinstance(delta, ExpertLoRA):
            done[path] = delta
            continue
        if match["stack"] == "experts" and base.model_type is None:
            raise InputError(
                f"{path}: how the checkpoint has these experts depends on the type of model, and "
                "no base is given",
                hint=_NEEDS_BASE,
            )
        groups.setdefault(match["owner"], {})[_MEANING[match["leaf"]]] = delta
    for owner, stacks in groups.items():
        fused = _is_fused(owner, base, in_memory=in_memory)
        done |= _fused(owner, stacks, base) if fused else _singles(owner, stacks, base)
    return done


def _is_fused(owner: str, base: MLXBase, *, in_memory: bool) -> bool:
    if in_memory:
        return base.row.fused or base.model_type in FUSED_IN_MEMORY
    if not base.shapes:
        return base.row.fused
    return any(base.index.find(f"{owner}.experts.{leaf}") for leaf in ("gate_up_proj", "down_proj"))


def _fused(owner: str, stacks: Mapping[str, ExpertLoRA], base: MLXBase) -> dict[str, LayerDelta]:
    row, (parent, _, last) = base.row, owner.rpartition(".")
    if row.owner and last == row.owner[1]:
        owner = f"{parent}.{row.owner[0]}"
    done: dict[str, LayerDelta] = {}
    if "down_proj" in stacks:
        done[f"{owner}.experts.down_proj"] = stacks["down_proj"]
    parts: Parts = [stacks.get(name) for name in PROJECTIONS[:2]]
    present = [part for part in parts if part is not None]
    if present:
        rows = present[0].weight_shape[1]
        joined: Change = join_rows(parts, (rows, rows))
        if base.row.woven:
            order = torch.arange(2 * rows).reshape(2, rows).T.flatten()
            joined = with_rows(joined, order)
        done[f"{owner}.experts.gate_up_proj"] = joined
    return done


def _singles(owner: str, stacks: Mapping[str, ExpertLoRA], base: MLXBase) -> dict[str, LayerDelta]:
    last = owner.rpartition(".")[2]
    known = base.row.disk if base.model_type else OWNER_DISK.get(last, PROJECTIONS)
    leaves = dict(zip(PROJECTIONS, known, strict=True))
    done: dict[str, LayerDelta] = {}
    for projection, stack in stacks.items():
        for number, lora in enumerate(Stack(stack.weight_shape[0]).undo([stack])):
            if lora is not None:
                done[f"{owner}.experts.{number}.{leaves[projection]}"] = lora
    return done
