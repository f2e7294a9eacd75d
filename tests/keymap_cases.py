"""Small adapters for every architecture: module names from its rows, shapes from their rules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from hypothesis import strategies as st

from loratools.adapter import Adapter, in_natural_order
from loratools.deltas import LayerDelta, LoRA
from loratools.keymaps.architecture import Architecture, Component, Fused, Row
from loratools.keymaps.lookup import flatten
from tests.strategies import make_tensor

D = 4
_SIZES = {"equal": (D, D, D, D), "inner": (D, D, D, D), "gqa": (D, 2, 2, 2)}


def expand(templates: Iterable[str], count: int = 2) -> list[str]:
    """Return the names that templates stand for with ``count`` blocks of each kind, each once."""
    return list(dict.fromkeys(name for t in templates for name in _expand(t, count)))


def _expand(template: str, count: int) -> Iterator[str]:
    found = re.search(r"\{\w+\}", template)
    if not found:
        yield template
        return
    for number in range(count):
        yield from _expand(template.replace(found.group(), str(number)), count)


def all_rows(component: Component) -> tuple[Row | Fused, ...]:
    """Return the component's rows in all dialects, but those of no matrix."""
    rows = (*component.rows, *component.comfyui, *component.checkpoint_rows)
    return tuple(row for row in rows if isinstance(row, Fused) or not row.vectors)


def part_sizes(row: Fused) -> tuple[int, ...]:
    """Return rows of each part that keep the row's rule for D inputs."""
    if isinstance(row.sizes, tuple):
        return row.sizes
    sizes = list(_SIZES[row.sizes][: len(row.parts)])
    if row.sizes == "inner":
        sizes[-1] = 10
    return tuple(sizes)


def shapes(component: Component, count: int = 2) -> dict[str, tuple[int, int]]:
    """Return (rows, inputs) of every module of diffusers', such that fused rules hold."""
    found = {}
    for row in all_rows(component):
        if isinstance(row, Row):
            rows = 2 * D if row.order == "halves_swapped_if_two" else 6
            for name in expand([row.diffusers], count):
                found.setdefault(name, (rows, D))
    for row in all_rows(component):
        for part, size in (
            zip(row.parts, part_sizes(row), strict=True) if isinstance(row, Fused) else ()
        ):
            found.update(dict.fromkeys(expand([part], count), (size, D)))
    return found


def completed(component: Component, chosen: set[str]) -> set[str]:
    """Return the names with all parts of fused modules whose sizes no one part tells."""
    more = set(chosen)
    for row in all_rows(component):
        if isinstance(row, Fused) and row.sizes in ("inner", "gqa"):
            columns = [expand([part]) for part in row.parts]
            for names in zip(*columns, strict=True):
                if more.intersection(names):
                    more.update(names)
    return more


def lora(seed: int, rows: int, inputs: int, rank: int = 2, alpha: float = 1.0) -> LoRA:
    """Return a LoRA of normal numbers."""
    up, down = make_tensor(seed, rows, rank), make_tensor(seed + 1, rank, inputs)
    return LoRA(down, up, alpha)


@st.composite
def adapters(draw: st.DrawFn, arch: Architecture) -> Adapter:
    """Random subsets of an architecture's modules in diffusers' naming, ranks and alphas mixed."""
    layers = {}
    for component in arch.components:
        known = shapes(component)
        chosen = draw(st.sets(st.sampled_from(sorted(known)), max_size=6))
        for name in sorted(completed(component, chosen)):
            rank, alpha = draw(st.integers(1, 3)), draw(st.sampled_from((0.5, 1.0, 3.0, 16.0)))
            seed = draw(st.integers(0, 2**31))
            layers[f"{component.name}.{name}"] = lora(seed, *known[name], rank, alpha)
    return Adapter(in_natural_order(layers), naming="diffusers")


def whole(arch: Architecture, naming: str = "diffusers") -> Adapter:
    """Return an adapter of every module, without values, as wide as the released models."""
    layers: dict[str, LayerDelta] = {}
    for component in arch.components:
        flattened = component.flattens == "diffusers" if naming == "kohya" else None
        theirs = naming == "diffusers" or flattened is True
        prefix = f"{component.kohya[0]}_" if naming == "kohya" else f"{component.original}."
        prefix = f"{component.name}." if naming == "diffusers" else prefix
        for row in component.rows:
            names = expand(row.parts if theirs else [row.original])
            for name in map(flatten, names) if naming == "kohya" else names:
                layers[prefix + name] = wide_lora(row.inputs[0] if row.inputs else D)
    return Adapter(in_natural_order(layers), naming=naming)


def wide_lora(inputs: int) -> LoRA:
    """Return a LoRA without values."""
    down, up = torch.empty(1, inputs, device="meta"), torch.empty(6, 1, device="meta")
    return LoRA(down, up, 1.0)


def assert_same(actual: Adapter, expected: Adapter) -> None:
    """Assert equal module paths and equal ΔW, up to the rounding of folded scales."""
    assert list(actual.layers) == list(expected.layers)
    for path, delta in actual.layers.items():
        other = expected.layers[path]
        torch.testing.assert_close(
            delta.materialize(),
            other.materialize(),
            rtol=1e-5,
            atol=1e-6,
            msg=lambda m, p=path: f"{p}: {m}",
        )
