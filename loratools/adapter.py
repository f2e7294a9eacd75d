"""Adapter: the value that every format reads into and writes from."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from torch import Tensor

from loratools.deltas import LayerDelta, Replacement, RowReplacement

Extra = Replacement | RowReplacement


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """The layers' changes and everything else an adapter file holds.

    Attributes:
        layers: module path → delta, in natural order (``layers.2`` before ``layers.10``).
        extras: full tensors that replace the base's or some of its rows, by tensor name
            (``score.weight``); never taken for layers.
        naming: which names the paths are written in (``transformers``, ``kohya`` ...).
        arch: architecture id, if known.
        metadata: the file's own words, untouched.
        notes: what the reader resolved, skipped or found odd; they end in the Report.
    """

    layers: Mapping[str, LayerDelta]
    extras: Mapping[str, Extra] = field(default_factory=lambda: MappingProxyType({}))
    naming: str = "transformers"
    arch: str | None = None
    metadata: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    notes: tuple[str, ...] = ()

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> Adapter:
        """Return a copy with ``function`` applied to every stored tensor."""
        layers = {path: delta.map_tensors(function) for path, delta in self.layers.items()}
        extras = {name: extra.map_tensors(function) for name, extra in self.extras.items()}
        return replace(self, layers=layers, extras=extras)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield every stored tensor under a name that says where it belongs."""
        for path, delta in self.layers.items():
            for name, tensor in delta.tensors().items():
                yield f"{path} ({name})", tensor
        for path, extra in self.extras.items():
            for tensor in extra.tensors().values():
                yield path, tensor

    @property
    def parameters(self) -> int:
        """Number of stored elements."""
        return sum(tensor.numel() for _, tensor in self.named_tensors())


def natural_key(name: str) -> tuple[tuple[int, int, str], ...]:
    """Return a sort key under which ``layers.2`` comes before ``layers.10``."""
    parts = re.split(r"(\d+)", name)
    return tuple((1, int(p), "") if p.isdecimal() else (0, 0, p) for p in parts)


def in_natural_order(items: Mapping[str, LayerDelta]) -> dict[str, LayerDelta]:
    """Return the mapping sorted by ``natural_key``."""
    return dict(sorted(items.items(), key=lambda item: natural_key(item[0])))
