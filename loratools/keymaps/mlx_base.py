"""The base that an adapter of mlx-lm's is for: its type, its experts, its tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loratools.errors import MissingFileError, UnsupportedError
from loratools.keymaps.mlx_rows import EXPERT_COUNTS, ROWS, MLXRow
from loratools.keymaps.names import NameIndex
from loratools.tensorfiles.inputs import read_json_object
from loratools.tensorfiles.missing import no_such_path
from loratools.tensorfiles.sharded import folder_shapes

_LANGUAGE_MODEL = "give the base language model's folder or its config.json"


@dataclass(frozen=True)
class MLXBase:
    """What is known of a base.

    Attributes:
        config: its config.json; empty where nothing is known.
        shapes: tensor name → shape, of a checkpoint or of a model that mlx-lm converted; empty
            where only the config is known.
    """

    config: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    shapes: Mapping[str, Sequence[int]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def model_type(self) -> str | None:
        """The type by which mlx-lm chooses a model's code."""
        found = self.config.get("model_type")
        return found if isinstance(found, str) else None

    @property
    def row(self) -> MLXRow:
        """How the type differs from transformers' names; as most do where it is not known."""
        return ROWS.get(self.model_type or "", MLXRow())

    @property
    def experts(self) -> int | None:
        """How many experts a layer has, by the config's word."""
        sections = (self.config, self.config.get("text_config"))
        for words in sections:
            found = [words[key] for key in EXPERT_COUNTS if key in words] if words else []
            if found and isinstance(found[0], int):
                return found[0]
        return None

    @property
    def is_tied(self) -> bool:
        """Whether the output head is the input table, by the config's word or for want of a head.

        False where nothing is known.
        """
        text = self.config.get("text_config")
        sections = [self.config, text if isinstance(text, dict) else {}]
        said = [
            words["tie_word_embeddings"] for words in sections if "tie_word_embeddings" in words
        ]
        if said:
            return bool(said[0])
        heads = ("lm_head.weight", "output.weight", "embed_out.weight")
        return bool(self.shapes) and not any(name.endswith(heads) for name in self.shapes)

    @cached_property
    def index(self) -> NameIndex:
        """The tensors by every name that they go by."""
        return NameIndex(self.shapes)


def open_mlx_base(path: Path) -> MLXBase:
    """Open a base: a folder with ``config.json``, or such a file itself.

    Raises:
        MissingFileError: nothing there, or no config.
        CorruptFileError: no JSON object.
        UnsupportedError: another file.
    """
    if not path.exists():
        raise no_such_path(path)
    if path.is_file() and path.suffix != ".json":
        raise UnsupportedError(f"{path}: tells no type of model", hint=_LANGUAGE_MODEL)
    config = path / "config.json" if path.is_dir() else path
    if not config.is_file():
        raise MissingFileError(f"{path}: no config.json in this folder", hint=_LANGUAGE_MODEL)
    return MLXBase(read_json_object(config), folder_shapes(path) if path.is_dir() else {})


def own_base(words: Mapping[str, Any]) -> MLXBase | None:
    """Return the base that an adapter's config names, if that is a folder on this machine."""
    name = words.get("base_model_name_or_path")
    folder = Path(name) if isinstance(name, str) and name else None
    there = folder is not None and (folder / "config.json").is_file()
    return open_mlx_base(folder) if folder is not None and there else None
