"""A base checkpoint's own tensor names as vocabulary: their dialect, and what they add."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from loratools.keymaps.architecture import Component
from loratools.keymaps.lookup import flatten
from loratools.keymaps.vocabulary import ComponentNames, Dialect, Hit, Vocabulary


@dataclass(frozen=True, slots=True)
class Home:
    """How a base names one network: the dialect, and what its tensors begin with."""

    prefix: str
    dialect: Dialect


class BaseNames:
    """Tensor names of a base, read with an architecture's vocabulary."""

    def __init__(self, words: Vocabulary, tensors: Collection[str]) -> None:
        self._words = words
        self.tensors = tensors if isinstance(tensors, Mapping | set | frozenset) else set(tensors)
        self._homes: dict[str, Home | None] = {}
        self._unlisted: dict[str, Mapping[str, str]] = {}

    @cached_property
    def _stems(self) -> list[str]:
        """Names of modules, and of parameters that stand alone, each once."""
        return list(dict.fromkeys(stem(name) for name in self.tensors))

    def home(self, component: Component) -> Home | None:
        """Return how the base names the network, or ``None`` where it has no such network."""
        # Not by its name: LTX-2 has two networks that diffusers calls connectors.
        if component.original not in self._homes:
            self._homes[component.original] = self._find_home(self._words.names_of(component))
        return self._homes[component.original]

    def own_hit(self, path: str) -> Hit | None:
        """Return the module of a path that no row knows but the base has, if it has."""
        for names, body, _ in self._words.readings(path):
            home = self.home(names.component)
            if home is None:
                continue
            own = self._unlisted_in(names, home).get(body)
            if own is not None:
                paths = (own,) if home.dialect == "diffusers" else ()
                return Hit(names.component, paths, None, {}, own)
        return None

    def spell(self, component: Component, name: str) -> str | None:
        """Return the base's path for a module's name in the base's dialect."""
        home = self.home(component)
        if home is None:
            return None
        # A base may omit levels that the names have.
        bodies = [name, *(name.removeprefix(level) for level in component.levels)]
        paths = [home.prefix + body for body in bodies]
        return next((path for path in paths if self.has(path)), paths[0])

    def has(self, path: str) -> bool:
        """Return whether the base has the module's weight, or a parameter of this name."""
        return f"{path}.weight" in self.tensors or path in self.tensors

    def _find_home(self, names: ComponentNames) -> Home | None:
        counts: dict[Home, int] = {}
        for prefix in _prefixes(names.component):
            for body in self._bodies(prefix):
                for dialect in names.look_up(body, flat=False):
                    place = Home(prefix, dialect)
                    counts[place] = counts.get(place, 0) + 1
        return max(counts, key=lambda place: counts[place], default=None)

    def _bodies(self, prefix: str) -> Iterator[str]:
        return (name[len(prefix) :] for name in self._stems if name.startswith(prefix))

    def _unlisted_in(self, names: ComponentNames, home: Home) -> Mapping[str, str]:
        """Return the base's modules that no row has, by name and by flattened name."""
        key = names.component.original
        if key not in self._unlisted:
            bodies = [b for b in self._bodies(home.prefix) if not names.look_up(b, flat=False)]
            self._unlisted[key] = {way(body): body for way in (str, flatten) for body in bodies}
        return self._unlisted[key]


def stem(tensor: str) -> str:
    """Return the module of a tensor's name, or the name itself for a parameter of its own."""
    module, _, leaf = tensor.rpartition(".")
    return module if leaf in ("weight", "bias") else tensor


def _prefixes(component: Component) -> list[str]:
    """Return what a network's tensors may begin with, most telling first, each once."""
    given = (*component.checkpoint, component.original + ".", component.name + ".", "")
    return sorted(dict.fromkeys(given), key=len, reverse=True)
