"""Strengths block by block: an adapter as several, each with the layers of one strength."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.errors import MatchError, UnknownArchitectureError
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.block_strengths import block_strengths
from loratools.keymaps.translate import detect_architecture
from loratools.planning.merge_plan import LoadedAdapter


def share_by_block(
    loaded: Sequence[LoadedAdapter], text: str, arch: str | None = None
) -> list[LoadedAdapter]:
    """Return every adapter as its shares of equal strength; layers at strength 0 are left out.

    Args:
        loaded: adapters with their overall strengths.
        text: see ``block_strengths``.
        arch: the architecture, where the files do not tell.

    Raises:
        OptionError, UnsupportedError: see ``block_strengths``.
        MatchError: nothing is left of an adapter.
    """
    return [share for one in loaded for share in _shares(one, text, arch)]


def _shares(one: LoadedAdapter, text: str, arch: str | None) -> list[LoadedAdapter]:
    factors = block_strengths(one.adapter, _architecture(one.adapter, arch), text)
    shares = []
    for factor in dict.fromkeys([1.0, *factors.values()]):
        layers = {p: d for p, d in one.adapter.layers.items() if factors[p] == factor}
        # Full tensors have no block; they keep the adapter's own strength.
        extras = one.adapter.extras if factor == 1.0 else {}
        if factor != 0 and (layers or extras):
            part = replace(one.adapter, layers=layers, extras=extras)
            shares.append(replace(one, adapter=part, strength=one.strength * factor))
    if not shares:
        raise MatchError(
            f"{one.path}: the block strengths leave nothing of it", hint="give one that is not 0"
        )
    return shares


def _architecture(adapter: Adapter, arch: str | None) -> Architecture | None:
    try:
        return detect_architecture(adapter, arch)
    except UnknownArchitectureError:
        if arch is not None:
            raise
        # A language model's adapter: patterns are tried on its own names.
        return None
