"""Finding a module's tensor among a checkpoint's names: lookups and rows, never string guessing."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from loratools.keymaps.expert_rows import EXPERTS, INFIXES
from loratools.keymaps.transformers_rows import PREFIXES, REWRITES
from loratools.suggest import nearest

_MANY = 2000
_NUMBER = re.compile(r"\d+")


class NameIndex:
    """A checkpoint's tensor names, searched under every naming a model goes by."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = frozenset(names)
        self._tails: dict[int, dict[str, list[str]]] = {}
        self._by_ending: dict[str, list[str]] = defaultdict(list)
        for name in sorted(self.names):
            self._by_ending[_ending(name)].append(name)

    def find(self, name: str) -> list[str]:
        """Return the checkpoint's names for ``name``: none, the one, or several if ambiguous.

        The first rule that finds anything decides: the name itself; a row of ``PREFIXES``; a
        longer name that ends in it; the name without its leading parts.
        """
        if name in self.names:
            return [name]
        return (
            self._renamed(name)
            or self._rewritten(name)
            or self._longer(name)
            or self._shorter(name)
        )

    def find_experts(self, parameter: str, count: int) -> list[list[str]]:
        """Return, for each of ``count`` experts, the tensors that hold its rows of a parameter.

        Empty where no row of ``EXPERTS`` leads to tensors for all of them.
        """
        for memory, disk in EXPERTS:
            if not parameter.endswith(memory) or "{e}" not in disk[0]:
                continue
            owner = parameter.removesuffix(memory)
            names = [[owner + d.format(e=expert) for d in disk] for expert in range(count)]
            found = [[self.find(name) for name in row] for row in names]
            if all(len(homes) == 1 for row in found for homes in row):
                return [[home for (home,) in row] for row in found]
        return []

    def nearest(self, name: str) -> list[str]:
        """Return names that resemble ``name``, to suggest in an error."""
        same_ending = self._by_ending.get(_ending(name), [])
        near = same_ending or sorted(self.names)
        if len(near) > _MANY:
            numbers = _NUMBER.findall(name)[:1]
            near = [other for other in near if _NUMBER.findall(other)[:1] == numbers][:_MANY]
        return nearest(name, near)

    def _renamed(self, name: str) -> list[str]:
        found = {
            target + name.removeprefix(source)
            for row in PREFIXES
            for source, target in (row, row[::-1])
            if name.startswith(source)
        }
        fused = [(memory, disk[0]) for memory, disk in EXPERTS if "{e}" not in disk[0]]
        found |= {
            name.replace(source, target, 1)
            for row in (*INFIXES, *fused)
            for source, target in (row, row[::-1])
            if source in name
        }
        return sorted(found & self.names)

    def _rewritten(self, name: str) -> list[str]:
        """Return the names under the rows of ``REWRITES``, each set applied as a whole."""
        found = set()
        for rows in REWRITES:
            other = name
            for source, target in rows:
                other = other.replace(source, target, 1)
            found |= {other} & self.names
        return sorted(found)

    def _longer(self, name: str) -> list[str]:
        return [n for n in self._by_tail(name.count(".") + 1).get(name, []) if n != name]

    def _by_tail(self, parts: int) -> dict[str, list[str]]:
        """Return every name by its last ``parts`` parts, made when first asked for."""
        if parts not in self._tails:
            found: dict[str, list[str]] = defaultdict(list)
            for name in sorted(self.names):
                found[".".join(name.split(".")[-parts:])].append(name)
            self._tails[parts] = found
        return self._tails[parts]

    def _shorter(self, name: str) -> list[str]:
        parts = name.split(".")
        # At least a module and its parameter must remain.
        tails = (".".join(parts[start:]) for start in range(1, len(parts) - 1))
        return [tail for tail in tails if tail in self.names][:1]


def _ending(name: str) -> str:
    return ".".join(name.split(".")[-2:])
