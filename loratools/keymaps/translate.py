"""An adapter's module paths, and the layout they imply, from one naming to another.

Every path is looked up, taken to diffusers' modules, and looked up again in the target's rows; a
fused projection that both sides have stays as it is.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from loratools.adapter import Adapter, Extra, in_natural_order
from loratools.deltas import LayerDelta
from loratools.errors import InputError, LoratoolsError, MatchError, UnknownArchitectureError
from loratools.keymaps import layout
from loratools.keymaps.architecture import Architecture, Component, Fused, Row
from loratools.keymaps.base_names import BaseNames
from loratools.keymaps.detection import (
    detect_architecture,
    detect_base,
    find_architecture,
    owners_of,
    possible_architectures,
)
from loratools.keymaps.lookup import Numbers
from loratools.keymaps.near_names import nearest_paths
from loratools.keymaps.pieces import Piece, distinct, is_same_layout, reordered
from loratools.keymaps.target import NAMINGS, Naming, Target
from loratools.keymaps.vocabulary import Hit, Vocabulary, vocabulary_of
from loratools.suggest import counted

_CARRIED = ("bundle_emb.",)
"""Extras that are no module of any model: textual inversions bundled with a LoRA."""

_SUGGESTED = 12
_OWNERS = 4
_SCALE = ".scale"


def translate(
    adapter: Adapter,
    arch: Architecture,
    naming: Naming,
    *,
    vocabulary: Collection[str] | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Adapter:
    """Return the adapter with its paths in another naming and its rows laid out accordingly.

    Args:
        adapter: in any naming; bare paths are looked up too.
        arch: whose rows apply.
        naming: the target.
        vocabulary: a base's tensor names; needed for ``checkpoint``, and for modules of the base
            that no row has.
        shapes: the base's shapes by tensor name, which tell the sizes of projections that the
            adapter lacks.

    Raises:
        MatchError: paths that nothing knows, all of them with the nearest known; or two different
            changes of one module.
        UnsupportedError: a parameterisation that cannot be laid out as the target needs.
    """
    names = vocabulary if vocabulary is not None else shapes
    if naming == "checkpoint" and names is None:
        raise ValueError("the naming 'checkpoint' needs a vocabulary")
    words = vocabulary_of(arch)
    base = None if names is None else BaseNames(words, names)
    return _Translation(words, Target(words, naming, base), base, shapes or {}).run(adapter)


def in_one_naming(
    adapters: Sequence[Adapter], arch: str | None = None, naming: Naming | None = None
) -> tuple[tuple[Adapter, ...], Architecture | None]:
    """Return the adapters with their paths in one naming, so that modules meet by name.

    Args:
        adapters: at least one.
        arch: the architecture's id, where the files do not tell.
        naming: the one that is wanted; without it the adapters' own if they share one, else
            diffusers'.

    Returns:
        The adapters and their architecture, which is ``None`` where nothing had to be looked up.

    Raises:
        InputError: adapters of different architectures, or of one that is not known.
        MatchError: modules that the architecture does not know; see ``translate``.
    """
    if arch is not None:
        find_architecture(arch)
    namings = {adapter.naming for adapter in adapters}
    if len(namings) == 1 and naming in (None, *namings):
        return _spelled_alike(adapters, arch, naming or "diffusers")
    found = dict.fromkeys(
        _detected(adapter, f"adapter {number} of {len(adapters)}", arch).id
        for number, adapter in enumerate(adapters, 1)
    )
    if len(found) > 1:
        titles = " and ".join(find_architecture(word).title for word in found)
        raise InputError(
            f"the adapters are for different models: {titles}",
            hint="take adapters of one architecture, or settle it with --arch",
        )
    common = find_architecture(next(iter(found)))
    wanted = naming or "diffusers"
    moved = (a if a.naming == wanted else translate(a, common, wanted) for a in adapters)
    return tuple(moved), common


def _detected(adapter: Adapter, which: str, arch: str | None) -> Architecture:
    try:
        return detect_architecture(adapter, arch)
    except UnknownArchitectureError as error:
        raise UnknownArchitectureError(f"{which}: {error.message}", error.hint) from error


def _spelled_alike(
    adapters: Sequence[Adapter], arch: str | None, wanted: Naming
) -> tuple[tuple[Adapter, ...], Architecture | None]:
    """Return adapters of one naming as they are, or in one spelling where two name a module."""
    given = tuple(adapters)
    if given[0].naming == "transformers" or len({frozenset(a.layers) for a in given}) == 1:
        return given, None
    fitting = [_candidates(adapter, arch) for adapter in given]
    common = [found for found in fitting[0] if all(found in others for others in fitting)]
    if len(common) != 1 or not _is_named_twice(given, common[0]):
        return given, None
    return tuple(translate(adapter, common[0], wanted) for adapter in given), common[0]


def _candidates(adapter: Adapter, arch: str | None) -> list[Architecture]:
    word = arch or adapter.arch
    return [find_architecture(word)] if word else possible_architectures(adapter)


def _is_named_twice(adapters: Sequence[Adapter], arch: Architecture) -> bool:
    """Return whether the adapters call one of diffusers' modules by different names."""
    words = vocabulary_of(arch)
    names: dict[tuple[str, str], str] = {}
    for adapter in adapters:
        for name, hit in words.resolve(adapter.layers, adapter.naming).items():
            for path in hit.paths if hit else ():
                assert hit is not None
                if names.setdefault((hit.component.name, path), name) != name:
                    return True
    return False


@dataclass(slots=True)
class _Group:
    """The parts of one fused module of the target."""

    row: Fused
    owner: Component
    numbers: Numbers
    parts: dict[int, LayerDelta] = field(default_factory=dict)
    sources: list[str] = field(default_factory=list)


class _Translation:
    """One run: collects problems, so that one error can name all of them."""

    def __init__(
        self,
        words: Vocabulary,
        target: Target,
        base: BaseNames | None,
        shapes: Mapping[str, Sequence[int]],
    ) -> None:
        self.words = words
        self.target = target
        self.base = base
        self.shapes = shapes
        self.layers: dict[str, LayerDelta] = {}
        self.groups: dict[str, _Group] = {}
        self.unknown: list[str] = []
        self.notes: list[str] = []

    def run(self, adapter: Adapter) -> Adapter:
        pieces = distinct(self._located(adapter), self.notes)
        for piece in pieces:
            with _naming_module(piece.source):
                self._place(piece)
        extras = self._extras(adapter)
        self._refuse_unknown()
        self._fuse_groups()
        return replace(
            adapter,
            layers=in_natural_order(self.layers),
            extras=extras,
            naming=self.target.naming,
            arch=self.words.architecture.id,
            notes=(*adapter.notes, *dict.fromkeys(self.notes)),
        )

    # ── reading ──────────────────────────────────────────────────────────────────────────────

    def _located(self, adapter: Adapter) -> Iterator[Piece]:
        for path, hit in self.words.resolve(adapter.layers, adapter.naming).items():
            found = hit or (self.base.own_hit(path) if self.base is not None else None)
            if found is None:
                self.unknown.append(path)
            else:
                yield Piece(path, found, adapter.layers[path])

    # ── writing ──────────────────────────────────────────────────────────────────────────────

    def _place(self, piece: Piece) -> None:
        hit, component = piece.hit, piece.hit.component
        dialect = self.target.dialect(component)
        if not hit.paths:
            # Known to the base alone: its names are the original's, and serve for those.
            if dialect == "diffusers":
                self.unknown.append(piece.source)
            else:
                self._put(self.target.spell(component, hit.own), piece)
        elif dialect == "diffusers":
            self._place_diffusers(piece)
        else:
            self._place_rows(piece)

    def _place_diffusers(self, piece: Piece) -> None:
        for path, part in piece.expanded():
            self._put(self.target.spell(part.hit.component, path), part)

    def _place_rows(self, piece: Piece) -> None:
        hit = piece.hit
        found = [self.target.row(hit.component, path) for path in hit.paths]
        first = found[0]
        if first is not None and is_same_layout(hit, first[0]):
            name = first[0].original.format(**first[2])
            self._put(self.target.spell(hit.component, name), reordered(piece, first[0]))
            return
        for path, part in piece.expanded():
            self._place_part(path, part)

    def _place_part(self, path: str, part: Piece) -> None:
        component = part.hit.component
        found = self.target.row(component, path)
        if found is None:
            self.unknown.append(part.source)
            return
        row, place, numbers = found
        name = self.target.spell(component, row.original.format(**numbers))
        if isinstance(row, Row):
            self._put(name, reordered(part, row))
            return
        group = self.groups.setdefault(name, _Group(row, component, numbers))
        group.parts[place] = part.delta
        group.sources.append(part.source)

    def _put(self, name: str, piece: Piece) -> None:
        if name in self.layers:
            raise MatchError(f"{piece.source}: lands on {name}, where another module is already")
        self.layers[name] = piece.delta

    def _fuse_groups(self) -> None:
        siblings = {
            group.row.original: tuple(group.parts[i].weight_shape[0] for i in sorted(group.parts))
            for group in self.groups.values()
            if len(group.parts) == len(group.row.parts)
        }
        for name, group in self.groups.items():
            with _naming_module(name):
                sizes = layout.fuse_sizes(
                    group.row,
                    group.parts,
                    total=self._rows_in_base(group, name),
                    sibling=siblings.get(group.row.original),
                )
                self.layers[name] = layout.fuse(group.row, group.parts, sizes.rows)
            if sizes.assumed:
                self.notes.append(f"{name}: missing parts taken to be of {sizes.rows} rows")

    def _rows_in_base(self, group: _Group, name: str) -> int | None:
        """Return how many rows the fused weight has in the base, if that has it fused."""
        if self.base is None or not self.shapes:
            return None
        original = group.row.original.format(**group.numbers)
        path = self.base.spell(group.owner, original) or name
        shape = self.shapes.get(f"{path}.weight", self.shapes.get(path))
        return shape[0] if shape else None

    # ── full tensors ─────────────────────────────────────────────────────────────────────────

    def _extras(self, adapter: Adapter) -> dict[str, Extra]:
        extras = {n: extra for n, extra in adapter.extras.items() if n.startswith(_CARRIED)}
        by_parameter: dict[str, list[Piece]] = {}
        for name, extra in adapter.extras.items():
            if name not in extras:
                found = self._located_tensor(name, adapter.naming)
                if found is None:
                    self.unknown.append(name)
                else:
                    by_parameter.setdefault(found[1], []).append(Piece(name, found[0], extra))
        for parameter, pieces in by_parameter.items():
            extras.update(self._renamed(pieces, parameter))
        return extras

    def _located_tensor(self, name: str, naming: str) -> tuple[Hit, str] | None:
        """Return what a tensor's name means: its module, and diffusers' word for the parameter."""
        module, _, leaf = name.rpartition(".")
        for path, parameter in ((name, ""), (module, leaf)):
            hit = self.words.resolve([path], naming)[path]
            if hit is not None:
                return hit, "weight" if hit.own.endswith(_SCALE) else parameter
        return None

    def _renamed(self, pieces: list[Piece], parameter: str) -> Iterator[tuple[str, Extra]]:
        """Yield full tensors under the target's names; their rows move as layers' do."""
        run = _Translation(self.words, self.target, self.base, self.shapes)
        for piece in pieces:
            with _naming_module(piece.source):
                run._place(piece)
        run._fuse_groups()
        self.unknown += run.unknown
        for path, delta in run.layers.items():
            assert isinstance(delta, Extra)
            yield self._tensor_name(path, parameter), delta

    def _tensor_name(self, path: str, parameter: str) -> str:
        """Return the name of a module's parameter; the original calls some weights ``scale``."""
        hit = self.words.resolve([path], self.target.naming)[path]
        if hit is not None and self.target.dialect(hit.component) != "diffusers":
            rowset = self.words.names_of(hit.component).rowset("checkpoint")
            found = [rowset.parts.find(part) for part in hit.paths[:1]]
            if any(row and row[0][0].original.endswith(_SCALE) for row in found):
                return path.removesuffix(_SCALE) + _SCALE
        if self.base is not None and path in self.base.tensors:
            return path
        if path.endswith("_weight"):  # in_proj_weight and in_proj_bias
            return path.removesuffix("weight") + parameter
        return f"{path}.{parameter}".rstrip(".")

    def _refuse_unknown(self) -> None:
        if not self.unknown:
            return
        unknown = list(dict.fromkeys(self.unknown))
        lines = [f"  {path}" for path in unknown]
        for place, path in enumerate(unknown[:_SUGGESTED]):
            near = nearest_paths(self.words, path)
            lines[place] += f" (nearest: {', '.join(near)})" if near else ""
        title = self.words.architecture.title
        owners = " or ".join(owner.title for owner in owners_of(unknown)[:_OWNERS])
        lines += [f"  ({owners} has {'it' if len(unknown) == 1 else 'them'})"] if owners else []
        raise MatchError(
            f"{counted(len(unknown), 'module has', 'modules have')} no name in {title} "
            f"({self.target.naming}):\n" + "\n".join(lines),
            hint="say with --arch if the adapter is for another model, or name the base with --base"
            " if that has these modules",
        )


@contextmanager
def _naming_module(path: str) -> Iterator[None]:
    """Add the module to the message of an error about its layout."""
    try:
        yield
    except LoratoolsError as error:
        if path in error.message:
            raise
        raise type(error)(f"{path}: {error.message}", hint=error.hint) from error


__all__ = [
    "NAMINGS",
    "Naming",
    "detect_architecture",
    "detect_base",
    "find_architecture",
    "in_one_naming",
    "translate",
]
