"""Layers that a PEFT adapter's config announces, the base has, and the file does not hold.

PEFT saves every layer that it targets, so a gap means a file that lost some. What the model in
memory was made of is not known here (a head more, an image tower less), so only modules beside
those that the adapter does change are counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from loratools.adapter import Adapter
from loratools.basemodel import BaseModel
from loratools.formats.peft_config import CONFIG_NAME, parse_config
from loratools.keymaps.names import NameIndex

_DEPTHS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers",
    "encoder_layers", "decoder_layers", "depth",
)  # fmt: skip
_NUMBER = re.compile(r"\d+")
_WEIGHT = ".weight"


def find_absent_layers(base: BaseModel, adapter: Adapter) -> tuple[str, ...]:
    """Return the base's modules that the adapter's config targets and its file leaves out.

    Nothing is returned for adapters of other formats, whose files announce nothing.
    """
    text = adapter.metadata.get(CONFIG_NAME)
    if text is None or adapter.naming != "transformers":
        return ()
    config = parse_config(text, CONFIG_NAME)
    index = NameIndex(base.tensors)
    found = {path: index.find(path + _WEIGHT) for path in adapter.layers}
    homes = {
        path: names[0].removesuffix(_WEIGHT) for path, names in found.items() if len(names) == 1
    }
    if not homes:
        return ()
    near = _Neighbours.of(homes.values(), config.targets_everything, _depth(base))
    renames = {_renaming(path, home) for path, home in homes.items()}
    taken = set(homes.values())
    return tuple(
        module
        for module in _modules(base)
        if module not in taken
        and module in near
        and any(map(config.selects, _in_adapter(module, renames)))
    )


def _modules(base: BaseModel) -> Iterable[str]:
    for name, tensor in base.tensors.items():
        if name.endswith(_WEIGHT) and len(tensor.shape) > 1:
            yield name.removesuffix(_WEIGHT)


def _depth(base: BaseModel) -> int | None:
    """Return how many layers the model has at most, if its config says it.

    Checkpoints of some models store one more, for speculative decoding, which no adapter changes.
    """
    counts = [n for word in _DEPTHS for n in base.config_words(word) if isinstance(n, int)]
    return max(counts, default=None)


@dataclass(frozen=True, slots=True)
class _Neighbours:
    """The modules whose absence means something: beside those that are there.

    Attributes:
        kinds: their paths without numbers.
        stacks: their paths up to the first number, without it.
        only_kinds: whether a path must be one of ``kinds``.
        depth: layers of a stack, or None.
    """

    kinds: frozenset[str]
    stacks: frozenset[str]
    only_kinds: bool
    depth: int | None

    @classmethod
    def of(cls, modules: Iterable[str], only_kinds: bool, depth: int | None) -> _Neighbours:
        known = list(modules)
        kinds = frozenset(_kind(module) for module in known)
        return cls(kinds, frozenset(_NUMBER.split(m, 1)[0] for m in known), only_kinds, depth)

    def __contains__(self, module: str) -> bool:
        numbers = _NUMBER.findall(module)
        if numbers and self.depth is not None and int(numbers[0]) >= self.depth:
            return False
        if _kind(module) in self.kinds:
            return True
        # Several numbers: experts, which a model may hold fused where its checkpoint does not.
        if self.only_kinds or len(numbers) > 1:
            return False
        if numbers:
            return _NUMBER.split(module, 1)[0] in self.stacks
        parent = module.rpartition(".")[0]
        return any(stack.startswith(f"{parent}." if parent else "") for stack in self.stacks)


def _kind(module: str) -> str:
    return _NUMBER.sub("N", module)


def _renaming(ours: str, theirs: str) -> tuple[str, str]:
    """Return the beginnings in which the adapter's and the base's name of a module differ."""
    a, b = ours.split("."), theirs.split(".")
    while a and b and a[-1] == b[-1]:
        a, b = a[:-1], b[:-1]
    return "".join(f"{part}." for part in a), "".join(f"{part}." for part in b)


def _in_adapter(module: str, renames: Iterable[tuple[str, str]]) -> Iterable[str]:
    """Yield what the adapter may call one of the base's modules."""
    for ours, theirs in renames:
        if module.startswith(theirs):
            yield ours + module.removeprefix(theirs)


def describe_absent(path: str, modules: tuple[str, ...]) -> str:
    """Return the warning."""
    shown = ", ".join(modules[:6]) + (f" and {len(modules) - 6} more" if len(modules) > 6 else "")
    return (
        f"{path}: target_modules names {len(modules)} modules of the base for which the file has "
        f"nothing: {shown}"
    )
