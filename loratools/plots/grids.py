"""An adapter's modules on grids: rows are blocks, columns are kinds of modules."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter import natural_key
from loratools.spectra.places import Place, short_names

_BESIDE_ATTENTION = re.compile(r"mlp|ff|feed_forward|fc\d|experts|conv|linear")
_ORDER = tuple(
    (rank, re.compile(rf"(?:^|[._])(?:{words})$"))
    for rank, words in (
        (5, "gate_proj|w1"),
        (6, r"up_proj|fc1|w3|net[._]0[._]proj|mlp[._]0"),
        (7, r"down_proj|fc2|w2|net[._]2|mlp[._]2"),
        (0, "(?:to_)?qkv(?:_proj)?|linear1|in_proj|proj_in"),
        (1, "(?:to_)?q(?:_proj)?|query|add_q_proj"),
        (2, "(?:to_)?k(?:_proj)?|key|add_k_proj"),
        (3, "(?:to_)?v(?:_proj)?|value|add_v_proj"),
        (4, r"o(?:_proj)?|out_proj|to_out[._]0|to_add_out|proj(?:_out)?"),
    )
)
"""The place of a projection in the order in which people read them (attention's, then the MLP's),
and its names; the first that fits counts."""

_SHORT = {
    "single_transformer_blocks": "single",
    "joint_transformer_blocks": "joint",
    "transformer_blocks": "tf",
    "text_model_encoder_layers": "layer",
    "attentions": "attn",
    "resnets": "res",
    "downsamplers": "downsample",
    "upsamplers": "upsample",
    "down_blocks": "down",
    "up_blocks": "up",
    "mid_block": "mid",
    "input_blocks": "in",
    "output_blocks": "out",
    "middle_block": "mid",
    "double_blocks": "double",
    "single_blocks": "single",
}
_OUTSIDE = "(outside of blocks)"


@dataclass(frozen=True, slots=True)
class Grid:
    """The modules of one network.

    Attributes:
        network: its name, or "".
        stack: what the rows' numbers count (``model.layers``), or "" if their labels say it.
        rows: label of each block.
        columns: label of each kind of module.
        cells: (row, column) → the modules there; several are experts of one layer.
    """

    network: str
    stack: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Sequence[str]]


def grids_of(places: Mapping[str, Place]) -> list[Grid]:
    """Return a grid for each network, in order of appearance."""
    networks: dict[str, dict[str, Place]] = {}
    for module, place in places.items():
        networks.setdefault(place.network, {})[module] = place
    return [_grid(network, inside) for network, inside in networks.items()]


def _grid(network: str, places: Mapping[str, Place]) -> Grid:
    blocks = sorted({p.block for p in places.values()}, key=lambda b: (not b, natural_key(b)))
    inside = {place.module for place in places.values() if place.block}
    modules = sorted(
        {place.module for place in places.values()},
        key=lambda module: (module not in inside, _reading_order(module)),
    )
    cells: dict[tuple[int, int], list[str]] = {}
    for module, place in places.items():
        key = (blocks.index(place.block), modules.index(place.module))
        cells.setdefault(key, []).append(module)
    short = short_names(modules)
    stack, labels = _labels(blocks)
    return Grid(network, stack, labels, [short[module] for module in modules], cells)


def _reading_order(module: str) -> tuple[object, ...]:
    beside = bool(_BESIDE_ATTENTION.search(module))
    for rank, names in _ORDER:
        if found := names.search(module):
            return (beside, natural_key(module[: found.start()]), rank, module)
    return (beside, natural_key(module), len(_ORDER), module)


def _labels(blocks: Iterable[str]) -> tuple[str, list[str]]:
    """Return what all blocks are called, and the number of each; or "" and a label of each."""
    found = [re.fullmatch(r"(?:(.*)[._])?(\d+)", block) for block in blocks]
    stacks = {match[1] or "" for match in found if match}
    if all(found) and len(stacks) == 1:
        return stacks.pop(), [match[2] for match in found if match]
    return "", [_label(block) for block in blocks]


def _label(block: str) -> str:
    for word, short in _SHORT.items():
        block = re.sub(rf"(?<![a-z_]){word}|(?<=\d_){word}", short, block)
    return re.sub(r"_(?=\d)|(?<=\d)_", ".", block) or _OUTSIDE
