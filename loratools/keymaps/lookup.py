"""Templates compiled into dictionaries: a name is looked up, its numbers come back.

A name and a template meet when they agree with every number taken out (``blocks.#.attn#.to_q``);
the template's own numbers are then a second key, and what stands where it has placeholders is the
answer. No name is ever taken apart by a rule about its words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

T = TypeVar("T")

Numbers = Mapping[str, str]
"""What a template's placeholders stand for, digits as they were written."""

_NUMBER = re.compile(r"\d+")
_TOKEN = re.compile(r"\{(\w+)\}|(\d+)")


def flatten(name: str) -> str:
    """Return the name as kohya's family writes it: dots become underscores."""
    return name.replace(".", "_")


def skeleton(name: str) -> str:
    """Return the name or template with every number and placeholder as ``#``."""
    return _TOKEN.sub("#", name)


@dataclass(slots=True)
class _Shape(Generic[T]):
    """Templates of one skeleton that have their placeholders at the same places."""

    open: tuple[tuple[int, str], ...]
    fixed: tuple[int, ...]
    values: dict[tuple[str, ...], T] = field(default_factory=dict)

    def find(self, numbers: list[str]) -> tuple[T, Numbers] | None:
        value = self.values.get(tuple([numbers[place] for place in self.fixed]))
        if value is None:
            return None
        bound = {name: numbers[place] for place, name in self.open}
        consistent = all(bound[name] == numbers[place] for place, name in self.open)
        return (value, bound) if consistent else None


class Lookup(Generic[T]):
    """Values by template; where two templates fit a name, that with more numbers of its own wins.

    Of two values under one template the first stays.
    """

    def __init__(self, entries: Iterable[tuple[str, T]]) -> None:
        self._shapes: dict[str, list[_Shape[T]]] = {}
        for template, value in entries:
            self._add(template, value)
        for shapes in self._shapes.values():
            shapes.sort(key=lambda shape: -len(shape.fixed))

    def _add(self, template: str, value: T) -> None:
        tokens = _TOKEN.findall(template)
        open_ = tuple((place, name) for place, (name, _) in enumerate(tokens) if name)
        fixed = tuple(place for place, (name, _) in enumerate(tokens) if not name)
        shapes = self._shapes.setdefault(skeleton(template), [])
        shape = next((s for s in shapes if s.open == open_), None)
        if shape is None:
            shape = _Shape(open_, fixed)
            shapes.append(shape)
        shape.values.setdefault(tuple(number for _, number in tokens if number), value)

    def find(self, name: str) -> tuple[T, Numbers] | None:
        """Return the value of the template that fits, and what its placeholders stand for."""
        shapes = self._shapes.get(_NUMBER.sub("#", name))
        if shapes is None:
            return None
        numbers = _NUMBER.findall(name)
        for shape in shapes:
            found = shape.find(numbers)
            if found is not None:
                return found
        return None
