"""Looking names up in the rows of a GGUF model, from either side."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from loratools.keymaps.gguf_model import GGUFModel, Step
from loratools.keymaps.lookup import skeleton

_NUMBER = re.compile(r"\d+")
_PLACE = re.compile(r"\\\{(\w)\\\}")
_WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:language_model|text_model|thinker)\.")
"""Parts of paths that only say where in a multimodal model the text model sits."""

_STARTS = ("model.", "transformer.")
"""What paths of bare models (``LlamaModel``) lack, and what others may have before a bare name."""

_MULTIMODAL = "ForConditionalGeneration"
_NOT_NESTED = ("Chameleon", "T5")


@dataclass(frozen=True, slots=True)
class Hit:
    """A row that a name fits.

    Attributes:
        step: the row.
        place: which of its sources or targets the name is.
        block: number of the block in the row's own count, or ``None``.
        expert: number of the expert, or ``None``.
        shifted: whether the block stands in a second stack.
    """

    step: Step
    place: int
    block: int | None
    expert: int | None = None
    shifted: bool = False


class ModelNames:
    """The rows of one model, indexed by both names."""

    def __init__(self, model: GGUFModel) -> None:
        self._sources: dict[str, list[tuple[re.Pattern[str], Step, int]]] = {}
        self._targets: dict[str, list[tuple[re.Pattern[str], Step, int]]] = {}
        for step in model.steps:
            for index, names in ((self._sources, step.sources), (self._targets, step.targets)):
                for place, name in enumerate(names):
                    pattern = re.compile(_PLACE.sub(r"(?P<\1>\\d+)", re.escape(name)))
                    index.setdefault(skeleton(name), []).append((pattern, step, place))

    def source(self, path: str) -> Hit | None:
        """Return the row of a module path, whatever wrappers and prefixes it has."""
        for spelled in bare_names(path):
            for hit in _matches(self._sources, spelled):
                return hit
        return None

    def targets(self, name: str) -> list[Hit]:
        """Return every row of a GGUF tensor (without ``.weight``), the preferred one first."""
        return list(_matches(self._targets, name))


@lru_cache(maxsize=16)
def names_of(model: GGUFModel) -> ModelNames:
    """Return the index of a model's rows."""
    return ModelNames(model)


def _matches(
    index: Mapping[str, list[tuple[re.Pattern[str], Step, int]]], name: str
) -> Iterator[Hit]:
    for pattern, step, place in index.get(_NUMBER.sub("#", name), ()):
        found = pattern.fullmatch(name)
        if found is not None:
            numbers = found.groupdict()
            block = numbers.get("i", numbers.get("j"))
            expert = numbers.get("e")
            yield Hit(
                step,
                place,
                None if block is None else int(block),
                None if expert is None else int(expert),
                "j" in numbers,
            )


def spell(template: str, block: int | None, expert: int | None, first_stack: int) -> str:
    """Return a template with its numbers; ``first_stack``: how many blocks stand before ``{j}``."""
    return template.format(i=block, e=expert, j=None if block is None else block + first_stack)


def in_memory(path: str, class_name: str) -> str:
    """Return a text model's path as transformers names it inside a multimodal model."""
    nested = class_name.endswith(_MULTIMODAL) and not class_name.startswith(_NOT_NESTED)
    if nested and path.startswith("model."):
        return "model.language_model." + path.removeprefix("model.")
    return path


def bare_names(name: str) -> Iterator[str]:
    """Yield the spellings under which a checkpoint's parameter is looked up."""
    plain = _WRAPPERS.sub("", name).removesuffix(".weight")
    yield plain
    for start in _STARTS:
        yield plain.removeprefix(start) if plain.startswith(start) else start + plain


def is_there(step: Step, block: int | None, names: Collection[str]) -> bool:
    """Return whether a checkpoint with these parameters has a row's modules in a block."""
    expert = 0 if step.stacks else None
    return all(spell(name, block, expert, 0) in names for name in step.sources)
