"""Conversions and back leave every ΔW and every key as they were, for every architecture.

Files are written and read here by hand, with safetensors alone: the oracle is alpha/rank · up·down
in float64 and, for what stands between, the rows themselves.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from loratools.convert import convert_adapter
from loratools.formats.alphas import COMPONENTS
from loratools.keymaps.architecture import Architecture, Component, Fused, Row
from loratools.keymaps.lookup import flatten
from loratools.keymaps.registry import ARCHITECTURES
from tests.keymap_cases import all_rows, expand
from tests.strategies import make_tensor

D = 8
ALPHAS = (0.5, 1.0, 3.0, 16.0)
every_architecture = pytest.mark.parametrize("arch", ARCHITECTURES, ids=lambda arch: arch.id)

Changes = dict[str, Tensor]
"""Module path → ΔW, flattened to two axes, float64."""


@dataclass(frozen=True)
class Place:
    """A row at its numbers: diffusers' modules."""

    row: Row | Fused
    parts: tuple[str, ...]


# ── modules and shapes, from the rows ────────────────────────────────────────────────────────


def told(row: Fused) -> tuple[int, ...]:
    """Return the parts' rows by what the released models have, if that is whole at this width."""
    sizes = [D * share for share in row.typical]
    return tuple(map(round, sizes)) if all(size == round(size) for size in sizes) else ()


def sizes_of(row: Fused) -> tuple[int, ...]:
    if isinstance(row.sizes, tuple):
        return row.sizes
    count = len(row.parts)
    by_rule = {
        "equal": (6,) * count,
        "inner": (*(D,) * (count - 1), 20),
        "gqa": (D, *(2,) * (count - 1)),
    }
    return told(row) or by_rule[row.sizes]


@dataclass(frozen=True)
class Network:
    """One network of an architecture, two blocks of each kind.

    Attributes:
        name: diffusers' word for it.
        prefix: kohya's.
        flattens: whose names kohya's are made of.
        convolutions: whether some of its modules are.
        rows: output rows by diffusers' module.
        places: the original's modules by name.
        groups: modules of which no one tells how large the others are.
    """

    name: str
    prefix: str
    flattens: str
    convolutions: bool
    rows: dict[str, int]
    places: dict[str, Place]
    groups: list[set[str]]


@cache
def networks(arch_id: str) -> list[Network]:
    """Return the networks for which diffusers has a place in its files."""
    arch = next(arch for arch in ARCHITECTURES if arch.id == arch_id)
    return [network(part) for part in arch.components if part.name in COMPONENTS]


def network(component: Component) -> Network:
    return Network(
        component.name,
        component.kohya[0],
        component.flattens,
        component.name == "unet",
        rows_by_part(component),
        places(component),
        needed_together(component),
    )


def rows_by_part(component: Component) -> dict[str, int]:
    found: dict[str, int] = {}
    rows = all_rows(component)
    for row in rows:
        if isinstance(row, Row):
            size = 2 * D if row.order == "halves_swapped_if_two" else 6
            found |= dict.fromkeys(expand(row.parts), size)
    for row in rows:
        if isinstance(row, Fused):
            for part, size in zip(row.parts, sizes_of(row), strict=True):
                found |= dict.fromkeys(expand([part]), size)
    return found


def places(component: Component) -> dict[str, Place]:
    found: dict[str, Place] = {}
    claimed: set[str] = set()
    for row in component.rows:
        if isinstance(row, Row) and row.vectors:
            continue
        columns = [expand([part]) for part in row.parts]
        for original, *parts in zip(expand([row.original]), *columns, strict=True):
            if claimed.isdisjoint(parts):
                found[original] = Place(row, tuple(parts))
                claimed.update(parts)
    return found


def needed_together(component: Component) -> list[set[str]]:
    groups = []
    for row in all_rows(component):
        if isinstance(row, Fused) and row.sizes in ("inner", "gqa") and not told(row):
            columns = [expand([part]) for part in row.parts]
            groups += [set(names) for names in zip(*columns, strict=True)]
    return groups


def is_swapped(row: Row | Fused) -> bool:
    return isinstance(row, Row) and row.order != "same"


# ── files by hand ────────────────────────────────────────────────────────────────────────────


@st.composite
def factors(draw: st.DrawFn, rows: int, kernels: bool) -> tuple[Tensor, Tensor, float]:
    """Up, down and alpha; a convolution now and then where the model has such."""
    kernel = draw(st.sampled_from(((), (), (3, 3), (1, 1)))) if kernels else ()
    rank, seed = draw(st.integers(1, 4)), draw(st.integers(0, 2**31))
    up = make_tensor(seed, rows, rank, *[1] * len(kernel))
    return up, make_tensor(seed + 1, rank, D, *kernel), draw(st.sampled_from(ALPHAS))


def product(up: Tensor, down: Tensor, alpha: float) -> Tensor:
    return up.double().flatten(1) @ down.double().flatten(1) * (alpha / down.shape[0])


_FACTOR = re.compile(r"(.+)\.(?:lora_(A|B|down|up)\.weight|(alpha))")
_SIDES = {"A": "down", "B": "up"}


def read_file(path: Path) -> tuple[Changes, set[str]]:
    """Return every ΔW of a LoRA file, and its keys."""
    with safe_open(path, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        words = file.metadata() or {}
    adapter_words = json.loads(words.get("lora_adapter_metadata", "{}"))
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key)
        assert found, key
        side = found[2] or found[3]
        modules.setdefault(found[1], {})[_SIDES.get(side, side)] = tensor
    changes = {}
    for module, own in modules.items():
        rank = own["down"].shape[0]
        alpha = float(own["alpha"]) if "alpha" in own else told_alpha(module, adapter_words, rank)
        changes[module] = product(own["up"], own["down"], alpha)
    return changes, set(tensors)


def told_alpha(module: str, words: Mapping[str, object], rank: int) -> float:
    """Return the alpha of diffusers' metadata by PEFT's rule, the rank without metadata."""
    component, _, path = module.partition(".")
    patterns = words.get(f"{component}.alpha_pattern", {})
    assert isinstance(patterns, dict)
    for pattern, alpha in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return float(alpha)
    return float(words.get(f"{component}.lora_alpha", rank))  # type: ignore[arg-type]


def assert_same(actual: Changes, expected: Changes) -> None:
    assert actual.keys() == expected.keys()
    for module, change in actual.items():
        other = expected[module]
        assert change.shape == other.shape, module
        error = float((change - other).norm() / other.norm())
        assert error <= 1e-6, f"{module}: {error}"


def convert(source: Path, to: str, arch: Architecture) -> Path:
    output = source.parent / f"{source.stem}-{to}.safetensors"
    convert_adapter(source, output, to=to, arch=arch.id)
    return output


# ── the adapters ─────────────────────────────────────────────────────────────────────────────


def draw_some(data: st.DataObject, names: Iterable[str], least: int) -> set[str]:
    return data.draw(st.sets(st.sampled_from(sorted(names)), min_size=least, max_size=5))


def kohya_modules(own: Network, name: str) -> list[tuple[str, Place]]:
    """Return the modules of a kohya file that stand for one of the original's."""
    place = own.places[name]
    if own.flattens == "diffusers":
        parts = [Place(place.row, (part,)) for part in place.parts]
        return [(f"{own.prefix}_{flatten(part.parts[0])}", part) for part in parts]
    return [(f"{own.prefix}_{flatten(name)}", place)]


def draw_kohya(data: st.DataObject, arch_id: str) -> tuple[dict[str, Tensor], Changes, Changes]:
    """Return a kohya file's tensors, its changes, and the same under diffusers' names."""
    tensors: dict[str, Tensor] = {}
    ours: Changes = {}
    theirs: Changes = {}
    for number, own in enumerate(networks(arch_id)):
        chosen = sorted(draw_some(data, own.places, number == 0))
        for module, place in (found for name in chosen for found in kohya_modules(own, name)):
            sizes = [own.rows[part] for part in place.parts]
            up, down, alpha = data.draw(factors(sum(sizes), own.convolutions))
            tensors[f"{module}.lora_up.weight"] = up
            tensors[f"{module}.lora_down.weight"] = down
            tensors[f"{module}.alpha"] = torch.tensor(alpha)
            ours[module] = change = product(up, down, alpha)
            if own.flattens == "original" and is_swapped(place.row):
                change = change.roll(len(change) // 2, 0)
            paths = [f"{own.name}.{part}" for part in place.parts]
            theirs |= zip(paths, change.split(sizes), strict=True)
    return tensors, ours, theirs


def draw_diffusers(data: st.DataObject, arch_id: str) -> dict[str, Tensor]:
    """Return the tensors of a diffusers file without metadata, where alpha is the rank."""
    tensors: dict[str, Tensor] = {}
    for number, own in enumerate(networks(arch_id)):
        chosen = draw_some(data, own.rows, number == 0)
        for group in own.groups:
            chosen |= group if group & chosen else set()
        for name in sorted(chosen):
            up, down, _ = data.draw(factors(own.rows[name], own.convolutions))
            tensors[f"{own.name}.{name}.lora_B.weight"] = up
            tensors[f"{own.name}.{name}.lora_A.weight"] = down
    return tensors


# ── tests ────────────────────────────────────────────────────────────────────────────────────


@every_architecture
@settings(max_examples=8)
@given(data=st.data())
def test_kohya_to_diffusers_and_back(arch: Architecture, data: st.DataObject) -> None:
    """Random modules, ranks and alphas; fused weights come apart where the rows say so."""
    tensors, ours, theirs = draw_kohya(data, arch.id)
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.safetensors"
        save_file(tensors, first)
        there = convert(first, "diffusers", arch)
        assert_same(read_file(there)[0], theirs)
        changes, keys = read_file(convert(there, "kohya", arch))
    assert keys == set(tensors)
    assert_same(changes, ours)


@every_architecture
@settings(max_examples=8)
@given(data=st.data())
def test_diffusers_to_comfyui_and_back(arch: Architecture, data: st.DataObject) -> None:
    """Random parts of fused weights too: what is missing is rows of zeros on the way."""
    tensors = draw_diffusers(data, arch.id)
    with tempfile.TemporaryDirectory() as folder:
        first = Path(folder) / "first.safetensors"
        save_file(tensors, first)
        there = convert(first, "comfyui", arch)
        back = convert(there, "diffusers", arch)
        changes, keys = read_file(back)
        assert_same(changes, read_file(first)[0])
    assert keys == set(tensors)
