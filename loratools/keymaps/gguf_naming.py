"""Between transformers' naming and GGUF's: the one place where either is asked for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from loratools.adapter import Adapter
from loratools.errors import InputError, UnsupportedError
from loratools.keymaps.gguf_base import (
    CONFIG_WORD,
    GGUFBase,
    base_from_words,
    open_gguf_base,
)
from loratools.keymaps.gguf_runtime import ignored_by_llama_cpp

NAMING = "gguf"
_NEEDS_BASE = "name the base model with --base: its folder, its config.json, or its GGUF file"
_SHOWN = 6


def concerns_gguf(*namings: str) -> bool:
    """Return whether any of the namings is GGUF's."""
    return NAMING in namings


def renamed_gguf(
    adapter: Adapter, naming: str, base: GGUFBase | None = None, *, for_merge: bool = False
) -> Adapter:
    """Return an adapter with its paths and layout in another naming, to or from GGUF's.

    Args:
        adapter: in GGUF's naming or transformers'.
        naming: the other one; or the adapter's own, which is checked against the base.
        for_merge: whether it goes into the base; see ``to_gguf``.
        base: what the adapter is for. Without it, to GGUF: the folder that the adapter itself
            names, if it is there; from GGUF: what the file says of its base.

    Raises:
        InputError: a base is needed.
        UnsupportedError: namings of image models.
        MatchError: see ``to_gguf`` and ``from_gguf``.
    """
    if adapter.naming == naming and base is None:
        return adapter
    if adapter.naming == NAMING:
        from loratools.keymaps.gguf_from import from_gguf

        plain = from_gguf(adapter, base or base_from_words(adapter.metadata, "the adapter"))
        return _as_named(plain, naming, base, for_merge=for_merge)
    if adapter.naming != "transformers":
        raise UnsupportedError(
            "GGUF adapters are for language models, and this adapter's names are those of an "
            f"image model ({adapter.naming})",
            hint="give the base that it was trained on"
            if for_merge
            else "convert it to another format; `loratools formats` lists them",
        )
    found = base or _own_base(adapter)
    if found is None:
        raise InputError(
            "names and layout in GGUF depend on the base model, and none is given",
            hint=_NEEDS_BASE,
        )
    from loratools.keymaps.gguf_to import to_gguf

    return to_gguf(adapter, found, for_merge=for_merge)


def in_transformers_naming(
    adapters: Sequence[Adapter], base: GGUFBase | None = None
) -> tuple[Adapter, ...]:
    """Return adapters with those in GGUF's naming taken to transformers', the others as they are.

    What one file does not say of the base, another's own base may.
    """
    own = (_own_base(adapter) for adapter in adapters if adapter.naming == "transformers")
    found = base or next((known for known in own if known is not None), None)
    return tuple(
        renamed_gguf(a, "transformers", None if CONFIG_WORD in a.metadata else found)
        if a.naming == NAMING
        else a
        for a in adapters
    )


def gguf_warnings(adapter: Adapter) -> list[str]:
    """Return what the runtime will do otherwise than the adapter says."""
    if adapter.naming != NAMING:
        return []
    deaf = ignored_by_llama_cpp(adapter.arch or "", adapter.layers)
    if not deaf:
        return []
    shown = ", ".join(deaf[:_SHOWN]) + (", ..." if len(deaf) > _SHOWN else "")
    word = (
        f"llama.cpp loads {len(deaf)} of {len(adapter.layers)} layers and never applies them, "
        f"because its {adapter.arch} graph has no place for them: {shown}; merging keeps them"
    )
    return [word]


def _as_named(
    plain: Adapter, naming: str, base: GGUFBase | None, *, for_merge: bool = False
) -> Adapter:
    if naming == "transformers":
        return plain
    if naming == NAMING and base is not None:
        # There and back again: fused as this base has it.
        metadata = {k: v for k, v in plain.metadata.items() if k != "adapter_config.json"}
        from loratools.keymaps.gguf_to import to_gguf

        done = to_gguf(plain, base, for_merge=for_merge)
        return replace(done, metadata={**metadata, **done.metadata})
    raise UnsupportedError(
        f"a GGUF adapter is for a language model, which has no names in {naming}",
        hint="convert it to peft",
    )


def _own_base(adapter: Adapter) -> GGUFBase | None:
    """Return the base that an adapter's own config names, if that is a folder on this machine."""
    config = json.loads(adapter.metadata.get("adapter_config.json", "{}"))
    name = config.get("base_model_name_or_path")
    folder = Path(name) if isinstance(name, str) and name else None
    if folder is None or not (folder / "config.json").is_file():
        return None
    return open_gguf_base(folder)
