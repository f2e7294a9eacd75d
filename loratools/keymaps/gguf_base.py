"""The base that a GGUF adapter is for: which rows hold, its hyper-parameters, its tensors."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import (
    CorruptFileError,
    MissingFileError,
    UnknownArchitectureError,
    UnsupportedError,
)
from loratools.keymaps.gguf_config import BaseConfig, config_from_gguf, flat_config
from loratools.suggest import did_you_mean
from loratools.tensorfiles.file_names import ADAPTER_CONFIG, TORCH_SUFFIXES
from loratools.tensorfiles.gguf_split import open_gguf
from loratools.tensorfiles.inputs import read_json_object
from loratools.tensorfiles.missing import no_such_path
from loratools.tensorfiles.sharded import folder_shapes

if TYPE_CHECKING:
    from loratools.keymaps.gguf_model import GGUFModel

# The rows of all models are many, and most runs need none: they are imported on use.

CONFIG_WORD = "loratools.base_config"
"""Metadata key under which converted adapters keep what the way back needs of the base's config."""

Shapes = Mapping[str, tuple[int, ...]]

_LANGUAGE_MODEL = "give the base language model's folder, its config.json, or its GGUF file"

_TIED_BY_DEFAULT = ("Gemma", "GPT2", "Bloom", "Falcon", "MPT", "GPTBigCode", "Cohere", "RW")


@dataclass(frozen=True)
class GGUFBase:
    """What is known of a base.

    Attributes:
        source: how errors call it.
        models: rows that may hold, of which names decide.
        config: hyper-parameters.
        tensors: GGUF tensor name → shape, where the base is a GGUF file.
        parameters: checkpoint parameter name → shape, where the base is a folder with weights.
    """

    source: str
    models: tuple[GGUFModel, ...]
    config: BaseConfig
    tensors: Shapes | None = None
    parameters: Shapes | None = None

    @property
    def class_name(self) -> str:
        """The base's class, or the empty text where only a GGUF file was given."""
        classes = self.config.fields.get("architectures")
        return str(classes[0]) if isinstance(classes, list) and classes else ""

    @cached_property
    def named_parameters(self) -> Shapes:
        """The checkpoint's shapes by every spelling of their modules' names."""
        from loratools.keymaps.gguf_names import bare_names

        found = (self.parameters or {}).items()
        return {bare: shape for name, shape in found for bare in bare_names(name)}

    @property
    def first_stack(self) -> int:
        """How many blocks stand before those that a row numbers ``{j}``."""
        said = self.config.get("num_layers_per_stack") or self.config.get("num_hidden_layers")
        if self.tensors is None:
            return int(said or 0)
        numbers = [int(name.split(".")[1]) for name in self.tensors if name.startswith("blk.")]
        return (max(numbers, default=-1) + 1) // 2

    def is_tied(self, model: GGUFModel) -> bool:
        """Return whether the head is the embedding's own tensor."""
        if not model.has_head:
            return True
        if self.tensors is not None:
            return "output.weight" not in self.tensors
        said = self.config.get("tie_word_embeddings")
        if said is None:
            return self.class_name.startswith(_TIED_BY_DEFAULT)
        return bool(said)

    def model_for(self, paths: Collection[str]) -> GGUFModel:
        """Return the rows that know most of the module paths, the first of equals.

        Raises UnsupportedError for models whose adapters have no place in GGUF.
        """
        from loratools.keymaps.gguf_names import names_of

        def known(model: GGUFModel) -> int:
            names = names_of(model)
            return sum(bool(names.source(path) or names.targets(path)) for path in paths)

        fitting = [model for model in self.models if model.holds_for(self.config)]
        model = max(fitting or self.models, key=known)
        if model.refused:
            raise UnsupportedError(
                f"{self.source}: an adapter for {model.arch} cannot be a GGUF adapter: "
                f"{model.refused}",
                hint="merge it into the base, and convert the merged model",
            )
        return model


def open_gguf_base(path: Path) -> GGUFBase:
    """Open a base: a folder with ``config.json``, such a file itself, or a GGUF model.

    Raises:
        MissingFileError: nothing there, or a folder without config.json.
        CorruptFileError: a file that contradicts itself.
        UnknownArchitectureError: a model that no rows are for.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise no_such_path(path)
    if path.suffix == ".json":
        return base_from_config(read_json_object(path), str(path))
    if path.suffix in (".safetensors", *TORCH_SUFFIXES):
        # The weights tell neither heads nor rotary scaling; the config beside them does.
        if not (path.parent / "config.json").is_file():
            raise MissingFileError(f"{path}: no config.json beside it", hint=_LANGUAGE_MODEL)
        return _open_folder(path.parent)
    return _open_model(path)


def base_from_config(
    config: Mapping[str, Any], source: str, parameters: Shapes | None = None
) -> GGUFBase:
    """Return the base that a config.json describes; raises UnknownArchitectureError."""
    fields = flat_config(config)
    classes = fields.get("architectures") or []
    name = str(classes[0]) if isinstance(classes, list) and classes else ""
    from loratools.keymaps.gguf_models import MODELS

    models = tuple(model for model in MODELS if name in model.classes)
    if not name:
        raise UnknownArchitectureError(
            f"{source}: the config names no class of model (architectures)", hint=_LANGUAGE_MODEL
        )
    if not models:
        raise UnknownArchitectureError(
            f"{source}: no GGUF architecture is known for models of class {name}",
            hint=did_you_mean(name, [known for model in MODELS for known in model.classes]),
        )
    return GGUFBase(source, models, BaseConfig(fields, source), parameters=parameters)


def base_from_arch(
    arch: str, source: str, config: Mapping[str, Any], tensors: Shapes | None = None
) -> GGUFBase:
    """Return the base that an architecture's id stands for; raises UnknownArchitectureError."""
    from loratools.keymaps.gguf_models import MODELS

    models = tuple(model for model in MODELS if model.arch == arch)
    if not models:
        raise UnknownArchitectureError(
            f"{source}: no rows are known for the GGUF architecture {arch!r}",
            hint=did_you_mean(arch, [model.arch for model in MODELS]),
        )
    return GGUFBase(source, models, BaseConfig(config, source), tensors=tensors)


def base_from_words(words: Mapping[str, str], source: str) -> GGUFBase:
    """Return the base that a GGUF adapter's own metadata describe.

    Files that loratools wrote have what the way back needs; of others only the architecture is
    known, which suffices where the layout depends on no number.
    """
    arch = words.get("general.architecture", "")
    said = words.get(CONFIG_WORD)
    base = base_from_arch(arch, source, _parse(said, source) if said else {})
    named = tuple(model for model in base.models if base.class_name in model.classes)
    return GGUFBase(source, named or base.models, base.config)


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise CorruptFileError(f"{source}: {CONFIG_WORD} is not JSON ({error})") from error
    if not isinstance(value, dict):
        raise CorruptFileError(f"{source}: {CONFIG_WORD} is not a JSON object")
    return value


def _open_folder(path: Path) -> GGUFBase:
    config = path / "config.json"
    if config.is_file():
        return base_from_config(read_json_object(config), str(path), folder_shapes(path) or None)
    models = sorted(path.glob("*.gguf"))
    if len(models) == 1:
        return _open_model(models[0])
    if (path / ADAPTER_CONFIG).is_file():
        raise UnsupportedError(f"{path}: an adapter, not a base model", hint=_LANGUAGE_MODEL)
    raise MissingFileError(f"{path}: no config.json in this folder", hint=_LANGUAGE_MODEL)


def _open_model(path: Path) -> GGUFBase:
    model = open_gguf(path)
    arch = model.word("general.architecture")
    if model.word("general.type") == "adapter":
        raise UnsupportedError(
            f"{path}: an adapter, not a base model", hint="name the model that it is for"
        )
    if not isinstance(arch, str):
        raise CorruptFileError(f"{path}: general.architecture is missing")
    shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
    return base_from_arch(arch, str(path), config_from_gguf(arch, model.word), shapes)
