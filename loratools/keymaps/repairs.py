"""Repairs of files that a tool is known to have written wrong."""

from __future__ import annotations

from dataclasses import replace

from loratools.adapter import Adapter
from loratools.deltas import LoRA
from loratools.errors import UnsupportedError
from loratools.keymaps import layout
from loratools.keymaps.architecture import Architecture, Fused
from loratools.keymaps.vocabulary import vocabulary_of


def repair_split_qkv_alpha(adapter: Adapter, arch: Architecture) -> Adapter:
    """Multiply alpha of fused projections that were trained in parts and saved as one.

    sd-scripts with ``split_qkv=True`` trains each part at alpha/r and saves the n parts as one
    block-diagonal LoRA of rank n·r with alpha unchanged, so that every loader applies a share of
    1/n (sd-scripts#2204).

    Raises:
        UnsupportedError: the adapter has no such projection.
    """
    words = vocabulary_of(arch)
    hits = words.resolve(adapter.layers, adapter.naming)
    layers = dict(adapter.layers)
    repaired = 0
    for path, hit in hits.items():
        delta = adapter.layers[path]
        if hit is None or not isinstance(hit.row, Fused) or not isinstance(delta, LoRA):
            continue
        if _is_block_diagonal(hit.row, delta):
            layers[path] = delta.scaled(float(len(hit.row.parts)))
            repaired += 1
    if not repaired:
        raise UnsupportedError(
            "no fused projection in this file is block-diagonal, so split_qkv did not write it",
            hint="leave --repair out",
        )
    note = f"repaired: alpha of {repaired} fused projections times their number of parts"
    return replace(adapter, layers=layers, notes=(*adapter.notes, note))


def _is_block_diagonal(row: Fused, delta: LoRA) -> bool:
    """Return whether each part's rows use a share of the rank of their own, all shares equal."""
    parts = len(row.parts)
    if delta.rank % parts:
        return False
    blocks = delta.up.flatten(1).split(layout.split_sizes(row, delta))
    shares = (delta.rank // parts,) * parts
    used = [[bool(cell.any()) for cell in block.split(shares, dim=1)] for block in blocks]
    others = (used[i][j] for i in range(parts) for j in range(parts) if i != j)
    return any(used[i][i] for i in range(parts)) and not any(others)
