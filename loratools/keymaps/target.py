"""The naming that is wanted: whose names, with which prefixes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from loratools.keymaps.architecture import Component, Fused, Row
from loratools.keymaps.base_names import BaseNames
from loratools.keymaps.lookup import Numbers, flatten
from loratools.keymaps.vocabulary import Dialect, Vocabulary

Naming = Literal["kohya", "original", "diffusers", "comfyui", "checkpoint"]
"""kohya: flattened, with its prefix. original: dotted, ``diffusion_model.``. diffusers: dotted, the
canonical naming. comfyui: as original, with the names of ComfyUI's own bases where they differ.
checkpoint: a base's own tensor names, prefixes included."""

NAMINGS: tuple[Naming, ...] = ("kohya", "original", "diffusers", "comfyui", "checkpoint")


@dataclass(frozen=True, slots=True)
class Target:
    """How paths are spelled in the naming that is wanted."""

    words: Vocabulary
    naming: Naming
    base: BaseNames | None

    def dialect(self, component: Component) -> Dialect:
        """Return whose names a network's paths are made of."""
        if self.naming == "kohya":
            return component.flattens
        if self.naming == "checkpoint":
            home = self.base.home(component) if self.base is not None else None
            return home.dialect if home is not None else "checkpoint"
        return self.naming

    def row(self, component: Component, path: str) -> tuple[Row | Fused, int, Numbers] | None:
        """Return the row, the part of it and its numbers for a module of diffusers'."""
        rowset = self.words.names_of(component).rowset(self.dialect(component))
        found = rowset.parts.find(path)
        return None if found is None else (*found[0], found[1])

    def spell(self, component: Component, name: str) -> str:
        """Return the full path for a module's name in the target's dialect."""
        if self.naming == "kohya":
            return f"{component.kohya[0]}_{flatten(name)}"
        if self.naming == "checkpoint" and self.base is not None:
            return self.base.spell(component, name) or f"{component.original}.{name}"
        return f"{component.name if self.naming == 'diffusers' else component.original}.{name}"
