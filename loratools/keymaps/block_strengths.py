"""Strengths block by block: the lists of "LoRA block weight", and patterns on module names.

A list has 12 or 20 numbers for SDXL, 17 or 26 for SD1 and SD2; slot 0 is the text encoders, then
come LDM's input blocks, the middle block and the output blocks. Slots that a shorter list leaves
out keep strength 1, as in sd-scripts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from loratools.adapter import Adapter
from loratools.errors import OptionError, UnsupportedError
from loratools.keymaps.architecture import Architecture
from loratools.keymaps.vocabulary import Hit, Vocabulary, vocabulary_of

_MIDDLE, _FIRST_OUTPUT = 13, 14
_SLOTS: Mapping[int, tuple[int, ...]] = {
    12: (0, 5, 6, 8, 9, _MIDDLE, *range(14, 20)),
    17: (0, 2, 3, 5, 6, 8, 9, _MIDDLE, *range(17, 26)),
    20: (0, *range(1, 10), _MIDDLE, *range(14, 23)),
    26: tuple(range(26)),
}
"""Length of a list → the slots of the full 26 that its numbers are for."""

_LIST_LENGTHS: Mapping[str, tuple[int, ...]] = {"sdxl": (12, 20), "sd1": (17, 26), "sd2": (17, 26)}
_BLOCK = re.compile(r"^(input_blocks|middle_block|output_blocks)\.(\d+)")
_EMBEDDINGS = ("time_embed.", "label_emb.")


@dataclass(frozen=True, slots=True)
class _Module:
    """A layer under all its names: in the file, in diffusers' and in the original naming."""

    path: str
    network: str
    diffusers: tuple[str, ...]
    original: str

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a pattern is tried on."""
        return (self.path, *self.diffusers, self.original)


_Strength = Callable[[_Module], float]


def block_strengths(adapter: Adapter, arch: Architecture | None, text: str) -> dict[str, float]:
    """Return the factor of every layer.

    Args:
        adapter: in any naming.
        arch: its architecture; needed for lists.
        text: numbers separated by commas, or ``PATTERN=NUMBER`` pairs separated by commas; a
            pattern is a regular expression searched for in the module's name in the file, in
            diffusers' and in the original naming; the first that is found decides, 1 if none is.

    Raises:
        OptionError: what cannot be parsed, a list of another length, a pattern that fits nothing.
        UnsupportedError: a list for an architecture without such blocks.
    """
    words = [word.strip() for word in text.strip("[] ").split(",") if word.strip()]
    modules = _modules(adapter, arch)
    strength = _by_pattern(words, modules) if "=" in text else _by_list(words, arch)
    return {module.path: strength(module) for module in modules}


def _modules(adapter: Adapter, arch: Architecture | None) -> list[_Module]:
    if arch is None:
        return [_Module(path, "", (), path) for path in adapter.layers]
    words = vocabulary_of(arch)
    hits = words.resolve(adapter.layers, adapter.naming)
    return [_module(path, hit, words) for path, hit in hits.items()]


def _module(path: str, hit: Hit | None, words: Vocabulary) -> _Module:
    if hit is None:
        return _Module(path, "", (), path)
    original = hit.own
    found = words.names_of(hit.component).rowset("original").parts.find(*hit.paths[:1] or [""])
    if found is not None:
        (row, _), numbers = found
        original = row.original.format(**numbers)
    return _Module(path, hit.component.name, hit.paths, original)


def _numbers(words: Sequence[str]) -> list[float]:
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise OptionError(
            f"block strengths {','.join(words)!r} are not numbers",
            hint="give 12, 17, 20 or 26 numbers, or PATTERN=NUMBER pairs, separated by commas",
        ) from error


def _by_list(words: Sequence[str], arch: Architecture | None) -> _Strength:
    values = _numbers(words)
    allowed = _LIST_LENGTHS.get(arch.id) if arch else None
    if allowed is None:
        title = arch.title if arch else "a model that is not a diffusion model"
        raise UnsupportedError(
            f"lists of block strengths are for Stable Diffusion's U-Nets, not for {title}",
            hint=r"use patterns: --block-strengths 'double_blocks\.\d+\.=0.5'",
        )
    if len(values) not in allowed:
        lengths = " or ".join(str(length) for length in allowed)
        raise OptionError(
            f"{len(values)} block strengths for {arch.title if arch else ''}",
            hint=f"it has lists of {lengths} numbers",
        )
    slots = dict(zip(_SLOTS[len(values)], values, strict=True))
    return lambda module: slots.get(_slot(module), 1.0)


def _slot(module: _Module) -> int:
    """Return the slot of a module among the 26; -1 for one that no list reaches."""
    if module.network.startswith("text_encoder"):
        return 0
    if module.original.startswith(_EMBEDDINGS):
        return 1
    match = _BLOCK.match(module.original)
    if match is None:
        return -1
    if match[1] == "middle_block":
        return _MIDDLE
    return (1 if match[1] == "input_blocks" else _FIRST_OUTPUT) + int(match[2])


def _by_pattern(words: Sequence[str], modules: Sequence[_Module]) -> _Strength:
    rules = [_rule(word) for word in words]
    for word, (pattern, _) in zip(words, rules, strict=True):
        if not any(pattern.search(name) for module in modules for name in module.names):
            raise OptionError(
                f"block strength {word!r} fits no module of the adapter",
                hint=f"its modules are called like {', '.join(modules[0].names[:2])}",
            )

    def strength(module: _Module) -> float:
        fitting = (value for pattern, value in rules if any(map(pattern.search, module.names)))
        return next(fitting, 1.0)

    return strength


def _rule(word: str) -> tuple[re.Pattern[str], float]:
    pattern, _, number = word.rpartition("=")
    try:
        return re.compile(pattern), float(number)
    except (re.error, ValueError) as error:
        raise OptionError(
            f"block strength {word!r}: {error}", hint="write PATTERN=NUMBER, a regular expression"
        ) from error
