"""What a kohya-style file says about its ranks, made true again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from loratools.adapter import Adapter
from loratools.deltas import DoRA, LayerDelta
from loratools.formats.kohya_metadata import network_arguments, with_comment
from loratools.resizing.ranks import RankRule

_DIM, _ALPHA, _ARGUMENTS = "ss_network_dim", "ss_network_alpha", "ss_network_args"
_DYNAMIC = "Dynamic"


def resized_words(resized: Adapter, before: Adapter, rule: RankRule) -> Adapter:
    """Return the adapter with training words that fit its ranks; others have none to change."""
    said = dict(resized.metadata)
    if not any(key.startswith("ss_") for key in said):
        return resized
    said[_DIM], said[_ALPHA] = _numbers(resized, rule.rank)
    said |= _arguments(before.metadata, rule)
    old = before.metadata.get(_DIM)
    origin = f" from rank {old}" if old else ""
    return replace(resized, metadata=with_comment(said, f"resized{origin}: {_words(rule)}"))


def _words(rule: RankRule) -> str:
    return f"{rule.mode} {getattr(rule, rule.mode):g}"


def _numbers(adapter: Adapter, rank: int | None) -> tuple[str, str]:
    """Return the rank and alpha that most tools take for the whole file, or ``Dynamic``."""
    pairs = {_pair(delta) for delta in adapter.layers.values()} - {None}
    ranks = {pair[0] for pair in pairs if pair}
    common = rank if rank in ranks else next(iter(ranks)) if len(ranks) == 1 else None
    alphas = {pair[1] for pair in pairs if pair and pair[0] == common}
    dim = _DYNAMIC if common is None else str(common)
    return dim, f"{alphas.pop():g}" if len(alphas) == 1 else _DYNAMIC


def _pair(delta: LayerDelta) -> tuple[int, float] | None:
    inner = delta.inner if isinstance(delta, DoRA) else delta
    rank, alpha = getattr(inner, "rank", None), getattr(inner, "alpha", None)
    return None if rank is None or alpha is None else (rank, alpha)


def _arguments(metadata: Mapping[str, str], rule: RankRule) -> dict[str, str]:
    """Return ``ss_network_args`` with the convolutions' rank, if it says one."""
    said = network_arguments(metadata)
    if "conv_dim" not in said:
        return {}
    rank = rule.conv_rank or rule.rank
    said["conv_dim"] = _DYNAMIC if rank is None else str(rank)
    if "conv_alpha" in said:
        said["conv_alpha"] = _DYNAMIC
    return {_ARGUMENTS: json.dumps(said)}
