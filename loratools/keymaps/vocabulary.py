"""An architecture's rows compiled for reading: any spelling of a module → its row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

from loratools.keymaps.architecture import Architecture, Component, Fused, Row
from loratools.keymaps.lookup import Lookup, Numbers, flatten

Dialect = Literal["original", "diffusers", "comfyui", "checkpoint"]
"""Whose module names: the authors', diffusers', ComfyUI's own base, single-file checkpoints'."""

_DENOISER_FLAT = (
    "lora_unet", "lora_unet_", "lora_transformer", "lycoris", "oft_unet", "lora_prior_unet",
)  # fmt: skip
"""Prefixes of flattened names that mean the denoiser of any architecture."""

_DENOISER_DOTTED = (
    "diffusion_model.", "transformer.", "unet.", "model.diffusion_model.", "net.", "model.",
    "transformer_2.",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Hit:
    """A name that was looked up.

    Attributes:
        component: the network.
        paths: diffusers' modules, without the component; several for a fused one. Empty for a
            module that only a base's own names tell of.
        row: the row whose original name this is, or ``None`` for a name of diffusers'.
        numbers: what the row's placeholders stand for.
        own: the module's name in the dialect it was found in.
    """

    component: Component
    paths: tuple[str, ...]
    row: Row | Fused | None
    numbers: Numbers
    own: str


class RowSet:
    """The rows of one dialect other than diffusers'."""

    def __init__(self, rows: Iterable[Row | Fused]) -> None:
        self.rows = tuple(rows)

    @cached_property
    def dotted(self) -> Lookup[Row | Fused]:
        """Rows by their original name."""
        return Lookup((row.original, row) for row in self.rows)

    @cached_property
    def flat(self) -> Lookup[Row | Fused]:
        """Rows by their original name, flattened."""
        return Lookup((flatten(row.original), row) for row in self.rows)

    @cached_property
    def parts(self) -> Lookup[tuple[Row | Fused, int]]:
        """Rows, and which of their parts, by diffusers' name."""
        return Lookup(
            (part, (row, place)) for row in self.rows for place, part in enumerate(row.parts)
        )


class ComponentNames:
    """One network's names in every dialect."""

    def __init__(self, component: Component) -> None:
        self.component = component
        self.rowsets: dict[Dialect, RowSet] = {"original": RowSet(component.rows)}
        for dialect, rows in _overrides(component):
            self.rowsets[dialect] = RowSet((*rows, *_uncovered(component.rows, rows)))

    @property
    def dialects(self) -> tuple[Dialect, ...]:
        """The dialects whose names differ here."""
        return ("original", "diffusers", *(d for d in self.rowsets if d != "original"))

    @cached_property
    def _templates(self) -> list[str]:
        """Diffusers' names, each once."""
        rows = (row for rowset in self.rowsets.values() for row in rowset.rows)
        return list(dict.fromkeys(part for row in rows for part in row.parts))

    @cached_property
    def _dotted(self) -> Lookup[str]:
        return Lookup((part, part) for part in self._templates)

    @cached_property
    def _flat(self) -> Lookup[str]:
        return Lookup((flatten(part), part) for part in self._templates)

    def rowset(self, dialect: Dialect) -> RowSet:
        """Return the rows of a dialect; the original's where it does not differ."""
        return self.rowsets.get(dialect, self.rowsets["original"])

    def look_up(self, body: str, *, flat: bool) -> dict[Dialect, Hit]:
        """Return what the name, without its prefix, means in each dialect that knows it."""
        for spelling in self._spellings(body, flat):
            found = dict(self._hits(spelling, flat))
            if found:
                return found
        return {}

    def _spellings(self, body: str, flat: bool) -> Iterator[str]:
        """Yield the name as given, then with a level more or less, then without a stray ``_``."""
        yield body
        levels = self.component.levels
        for level in map(flatten, levels) if flat else levels:
            if body.startswith(level):
                yield body.removeprefix(level)
            else:
                yield level + body
        if body.endswith("_"):
            yield body.removesuffix("_")

    def _hits(self, body: str, flat: bool) -> Iterator[tuple[Dialect, Hit]]:
        for dialect, rowset in self.rowsets.items():
            found = (rowset.flat if flat else rowset.dotted).find(body)
            if found is not None:
                row, numbers = found
                paths = tuple(part.format(**numbers) for part in row.parts)
                own = row.original.format(**numbers)
                yield dialect, Hit(self.component, paths, row, numbers, own)
        theirs = (self._flat if flat else self._dotted).find(body)
        if theirs is not None:
            template, numbers = theirs
            path = template.format(**numbers)
            yield "diffusers", Hit(self.component, (path,), None, numbers, path)

    def inputs(self, hit: Hit) -> tuple[int, ...]:
        """Return how many inputs the released models have at a module; empty: any number."""
        if hit.row is not None and (hit.row.inputs or not hit.paths):
            return hit.row.inputs
        found = self.rowsets["original"].parts.find(hit.paths[0] if hit.paths else hit.own)
        return found[0][0].inputs if found else ()

    def templates(self, dialect: Dialect) -> list[str]:
        """Return the templates of every name in a dialect."""
        if dialect == "diffusers":
            return self._templates
        return [row.original for row in self.rowset(dialect).rows]


def _overrides(component: Component) -> list[tuple[Dialect, tuple[Row | Fused, ...]]]:
    found: list[tuple[Dialect, tuple[Row | Fused, ...]]] = [
        ("comfyui", component.comfyui),
        ("checkpoint", component.checkpoint_rows),
    ]
    return [(dialect, rows) for dialect, rows in found if rows]


def _uncovered(
    rows: tuple[Row | Fused, ...], overrides: tuple[Row | Fused, ...]
) -> Iterator[Row | Fused]:
    covered = {part for row in overrides for part in row.parts}
    return (row for row in rows if not covered.issuperset(row.parts))


class Vocabulary:
    """An architecture's names in every dialect, under every prefix."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.components = [ComponentNames(c) for c in architecture.components]
        self._dotted = _prefix_table(self.components, _dotted_prefixes)
        self._flat = _prefix_table(self.components, _flat_prefixes)

    def names_of(self, component: Component) -> ComponentNames:
        """Return the names of one of the architecture's networks."""
        return next(names for names in self.components if names.component is component)

    def readings(self, path: str) -> Iterator[tuple[ComponentNames, str, bool]]:
        """Yield (network, name without prefix, whether flattened) for every prefix that fits."""
        flat = "." not in path
        for prefix, names in self._flat if flat else self._dotted:
            if path.startswith(prefix):
                yield names, path[len(prefix) :], flat
        yield self.components[0], path, False

    def look_up(self, path: str) -> dict[tuple[int, Dialect], Hit]:
        """Return every meaning of a path, by (number of the component, dialect)."""
        found: dict[tuple[int, Dialect], Hit] = {}
        for names, body, flat in self.readings(path):
            place = self.components.index(names)
            for dialect, hit in names.look_up(body, flat=flat).items():
                found.setdefault((place, dialect), hit)
        return found

    def inputs_of(self, path: str) -> tuple[int, ...] | None:
        """Return how many inputs the path's module may have (empty: any); ``None`` if unknown."""
        for names, body, flat in self.readings(path):
            for hit in names.look_up(body, flat=flat).values():
                return names.inputs(hit)
        return None

    def resolve(self, paths: Iterable[str], naming: str = "") -> dict[str, Hit | None]:
        """Return what each path means: the same dialect throughout a network, if one fits best."""
        meanings = {path: self.look_up(path) for path in paths}
        tally = Counter(key for found in meanings.values() for key in found)

        def fitness(key: tuple[int, Dialect]) -> tuple[int, bool]:
            return tally[key], key[1] == self._expected(key[0], naming)

        return {
            path: found[max(found, key=fitness)] if found else None
            for path, found in meanings.items()
        }

    def _expected(self, place: int, naming: str) -> str:
        return self.components[place].component.flattens if naming == "kohya" else naming


@cache
def vocabulary_of(architecture: Architecture) -> Vocabulary:
    """Return the architecture's compiled names."""
    return Vocabulary(architecture)


def _prefix_table(
    components: list[ComponentNames], prefixes: Callable[[Component, bool], Iterable[str]]
) -> list[tuple[str, ComponentNames]]:
    """Return (prefix, network) pairs, the longest prefix first, each pair once."""
    pairs = [
        (prefix, names)
        for place, names in enumerate(components)
        for prefix in dict.fromkeys(prefixes(names.component, place == 0))
        if prefix
    ]
    return sorted(pairs, key=lambda pair: -len(pair[0]))


def _flat_prefixes(component: Component, denoiser: bool) -> Iterator[str]:
    for prefix in (*component.kohya, *(_DENOISER_FLAT if denoiser else ())):
        yield prefix + "_"


def _dotted_prefixes(component: Component, denoiser: bool) -> Iterator[str]:
    yield component.original + "."
    yield component.name + "."
    yield from component.checkpoint
    yield from _DENOISER_DOTTED if denoiser else ()


def is_stored_transposed(architecture: Architecture, tensor: str) -> bool:
    """Return whether a single-file checkpoint stores this tensor as (in, out)."""
    found = vocabulary_of(architecture).look_up(tensor).items()
    rows = (hit.row for (_, dialect), hit in found if dialect == "checkpoint")
    return any(isinstance(row, Row) and row.transposed for row in rows)
