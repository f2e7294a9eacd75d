"""A file written in the naming that it has: its names are looked up all the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.errors import MatchError, UnsupportedError
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.detection import (
    certain_architecture,
    find_architecture,
    possible_architectures,
)
from loratools.keymaps.near_names import nearest_paths
from loratools.keymaps.pieces import is_same_layout
from loratools.keymaps.target import Naming, Target
from loratools.keymaps.translate import translate
from loratools.keymaps.vocabulary import Hit, vocabulary_of
from loratools.suggest import counted

_SUGGESTED = 12
_PLIANT = frozenset({"lora", "loha", "dora", "full", "replacement"})
"""Kinds of changes that can be fused and split and stay of their kind."""


def respelled(
    adapter: Adapter,
    naming: Naming,
    *,
    arch: str | None = None,
    shapes: Mapping[str, Sequence[int]] | None = None,
) -> Adapter:
    """Return the adapter with every name in the first spelling of the naming it is in already.

    Where the architecture is known, this is ``translate``. What cannot be laid out that way keeps
    its own names, and so do files that fit no architecture or several; a note says so.

    Args:
        adapter: in the naming, or in a dialect of it (``lycoris_``, ComfyUI's fused names).
        naming: the target.
        arch: the user's word.
        shapes: the base's shapes by tensor name.

    Raises:
        MatchError: names that the architecture (none of those that fit) knows, all listed.
    """
    word = arch or adapter.arch
    found = [find_architecture(word)] if word else possible_architectures(adapter)
    if not found:
        return _noted(
            adapter,
            "names were not checked: they are those of no architecture that loratools knows",
        )
    if len(found) > 1:
        return _checked(adapter, found)
    stiff = _stiff_kinds(adapter, found[0], naming)
    if stiff:
        return _noted(
            _checked(adapter, found),
            f"names are kept as they are: {' and '.join(stiff)} would not survive the layout of "
            "the format's own",
        )
    try:
        done = translate(adapter, found[0], naming, shapes=shapes)
    except UnsupportedError as error:
        return _noted(_checked(adapter, found), f"names are kept as they are: {error.message}")
    return _with_change(adapter, done)


def _stiff_kinds(adapter: Adapter, arch: Architecture, naming: Naming) -> list[str]:
    """Return the kinds of changes that would become another, larger kind in another layout."""
    words = vocabulary_of(arch)
    target = Target(words, naming, None)
    kinds = set()
    for path, hit in words.resolve(adapter.layers, adapter.naming).items():
        kind = adapter.layers[path].kind
        if hit is None or kind in _PLIANT:
            continue
        if not _keeps_layout(hit, target):
            kinds.add(kind)
    return sorted(kinds)


def _keeps_layout(hit: Hit, target: Target) -> bool:
    if target.dialect(hit.component) == "diffusers":
        return len(hit.paths) == 1
    rows = [target.row(hit.component, path) for path in hit.paths]
    return all(found is not None and is_same_layout(hit, found[0]) for found in rows)


def respelled_bare(adapter: Adapter) -> Adapter:
    """Return an adapter of bare names with diffusers' names, if it is surely a diffusion model's.

    PEFT's adapters of diffusers' models have them already; raw dumps may have the authors' names.
    """
    found = certain_architecture(adapter)
    if found is None:
        return adapter
    done = translate(adapter, found, "diffusers")
    bare = {path.partition(".")[2]: delta for path, delta in done.layers.items()}
    if bare.keys() == adapter.layers.keys():
        return adapter
    return _with_change(adapter, done)


def _checked(adapter: Adapter, candidates: Sequence[Architecture]) -> Adapter:
    """Return the adapter as it is if each name is known to one of the candidates."""
    words = [vocabulary_of(candidate) for candidate in candidates]
    unknown = [p for p in adapter.layers if not any(w.look_up(p) for w in words)]
    if not unknown:
        return adapter
    titles = " or ".join(candidate.title for candidate in candidates)
    lines = [f"  {path}" for path in unknown]
    for place, path in enumerate(unknown[:_SUGGESTED]):
        near = nearest_paths(words[0], path)
        lines[place] += f" (nearest: {', '.join(near)})" if near else ""
    raise MatchError(
        f"{counted(len(unknown), 'module has', 'modules have')} no name in {titles}:\n"
        + "\n".join(lines),
        hint="if the adapter is for another model, say which with --arch",
    )


def _with_change(before: Adapter, after: Adapter) -> Adapter:
    """Return ``after`` with a note of how its names changed, if they did."""
    gone = [path for path in before.layers if path not in after.layers]
    if not gone:
        return after
    return _noted(
        after,
        f"{len(gone)} of {counted(len(before.layers), 'name')} spelled otherwise than the format "
        f"does: rewritten (such as {gone[0]})",
    )


def _noted(adapter: Adapter, note: str) -> Adapter:
    return replace(adapter, notes=(*adapter.notes, note))
