"""Adapters as another tool folds them, for whoever wants what they saw there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from loratools.deltas.compat import RULES, TOOLS, read_as_tool
from loratools.errors import OptionError
from loratools.planning.merge_plan import LoadedAdapter


def read_all_as_tool(loaded: Sequence[LoadedAdapter], tool: str) -> list[LoadedAdapter]:
    """Return the adapters as ``tool`` folds them, with a note for each kind that this changes.

    Raises OptionError for an unknown tool.
    """
    if tool not in TOOLS:
        raise OptionError(f"unknown tool {tool!r}", hint=f"use {', '.join(TOOLS)} with --compat")
    return [_read(one, tool) for one in loaded]


def _read(one: LoadedAdapter, tool: str) -> LoadedAdapter:
    before = one.adapter.layers
    layers = {path: read_as_tool(tool, delta) for path, delta in before.items()}
    changed = Counter(delta.kind for path, delta in before.items() if layers[path] is not delta)
    notes = [
        f"as {tool} folds it, {count} of kind {kind}: {RULES[tool, kind].says}"
        for kind, count in changed.items()
    ]
    notes = notes or [f"as {tool} folds it: nothing here differs from the formula"]
    adapter = replace(one.adapter, layers=layers, notes=(*one.adapter.notes, *notes))
    return replace(one, adapter=adapter)
