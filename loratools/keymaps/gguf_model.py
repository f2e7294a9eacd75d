"""What the rows of a GGUF architecture say: checkpoint names, GGUF names, and the layout between.

Templates hold block numbers as ``{i}`` and experts' as ``{e}``; ``{j}`` counts on where a first
stack of blocks ends. Rows are read in both directions;
nothing here is ever inverted by hand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from loratools.keymaps.gguf_config import BaseConfig
from loratools.keymaps.gguf_ops import Op

Layout = Callable[[BaseConfig, int | None], tuple[Op, ...]]
"""The steps for a block (``None`` outside the blocks) of a base with these hyper-parameters."""


@dataclass(frozen=True, slots=True)
class Step:
    """Checkpoint modules that become GGUF tensors.

    Attributes:
        sources: templates of modules, or of bare parameters.
        targets: templates of tensors, without ``.weight``.
        layout: what happens to their weights; ``None``: nothing.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    layout: Layout | None = None

    @property
    def shifts(self) -> bool:
        """Whether the targets' blocks are counted on from a first stack's."""
        return any("{j}" in name for name in self.targets)

    @property
    def stacks(self) -> bool:
        """Whether the sources are experts of their own that become one tensor."""
        return any("{e}" in name for name in self.sources)


@dataclass(frozen=True, slots=True, eq=False)
class GGUFModel:
    """Models that llama.cpp converts alike.

    Attributes:
        arch: ``general.architecture``.
        classes: ``architectures`` of config.json; those of one row share names and layout.
        steps: every module, the preferred of several spellings first.
        refused: why adapters of these models cannot be converted; empty: they can.
        needs: words of the config and whether they must be set, where the class does not decide.
    """

    arch: str
    classes: tuple[str, ...]
    steps: tuple[Step, ...]
    refused: str = ""
    needs: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))

    def holds_for(self, config: BaseConfig) -> bool:
        """Return whether the rows hold for a base with this config."""
        return all(bool(config.get(word)) == wanted for word, wanted in self.needs.items())

    @property
    def has_head(self) -> bool:
        """Whether there may be a head that is not the embedding."""
        return any("output" in step.targets for step in self.steps)
