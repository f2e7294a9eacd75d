"""Where a module stands: its network, its block, and what it is inside the block.

Works on dotted and on flattened (kohya) paths alike: a number counts as a block's if the word
before it names a list of blocks; ``ff.net.2`` and ``to_out.0`` end in numbers that name no block.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"(?:(?<=[._])|^)\d+(?=[._\[]|$)")
_WORD_BEFORE = re.compile(r"([A-Za-z]+)[._]$")
_EXPERTS = re.compile(r"(?<=experts)[._]\d+(?=[._])|\[\d+\]$")
_NETWORK = re.compile(r"(?:lora|oft)_[a-z]+\d?(?=_)|lycoris(?=_)")
_SUB_LAYER = "layer"
"""A list of blocks in BERT, a part of a block in T5, where other numbers precede it."""


@dataclass(frozen=True, slots=True)
class Place:
    """A module's coordinates.

    Attributes:
        network: the first word of a path that names its network (``unet``), or "".
        block: the path down to the block's number (``model.layers.3``), or "".
        module: the rest (``self_attn.q_proj``); an expert's number is left out.
    """

    network: str
    block: str
    module: str


def names_networks(naming: str) -> bool:
    """Return whether module paths in a naming begin with their network's name."""
    return naming not in ("transformers", "mlx")


def place_of(path: str, *, networks: bool) -> Place:
    """Return the coordinates of a module path; ``networks`` says whether paths name networks."""
    network = network_of(path) if networks else ""
    inside = path[len(network) :].lstrip("._")
    one_of_all = _EXPERTS.sub("", inside)
    end = max(_block_ends(one_of_all), default=0)
    return Place(network, one_of_all[:end], one_of_all[end:].lstrip("._"))


def network_of(path: str) -> str:
    """Return the first word of a path, or kohya's prefix: ``unet``, ``lora_te1``."""
    flattened = _NETWORK.match(path)
    if flattened:
        return flattened[0]
    return path.partition("." if "." in path else "_")[0]


def _block_ends(path: str) -> list[int]:
    """Return where the numbers of blocks end."""
    ends: list[int] = []
    for number in _NUMBER.finditer(path):
        if number.end() < len(path) and _names_a_block(path[: number.start()], ends):
            ends.append(number.end())
    return ends


def _names_a_block(before: str, ends: list[int]) -> bool:
    if ends and len(before) == ends[-1] + 1:
        return True
    found = _WORD_BEFORE.search(before)
    word = found[1] if found else ""
    return word == "h" or word.endswith(("s", "block")) or (word == _SUB_LAYER and not ends)


def short_names(modules: Iterable[str]) -> dict[str, str]:
    """Return each module with the fewest last words that still tell it from the others."""
    every = list(dict.fromkeys(modules))
    short = {name: _last_words(name, 1) for name in every}
    for count in range(2, 6):
        taken = list(short.values())
        for name, tail in short.items():
            if taken.count(tail) > 1 or tail.isdigit():
                short[name] = _last_words(name, count)
    return short


def _last_words(name: str, count: int) -> str:
    words = name.split(".")
    while count < len(words) and words[-count].isdigit():
        count += 1
    return ".".join(words[-count:])
