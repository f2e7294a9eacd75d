"""A base checkpoint: which tensors, in which file, at which bytes; its config and side files."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loratools.basetensors import BaseTensor, elements, find_weights
from loratools.errors import CorruptFileError, MissingFileError, UnsupportedError
from loratools.formats.likeness import looks_like_adapter
from loratools.tensorfiles.file_names import (
    ADAPTER_CONFIG,
    INDEX_SUFFIX,
    MODEL_WEIGHTS,
    PIPELINE_INDEX,
    PIPELINE_NETWORKS,
    TORCH_SUFFIXES,
    index_wins,
)
from loratools.tensorfiles.gguf import GGUFHeader, GGUFTensor
from loratools.tensorfiles.gguf_split import open_gguf
from loratools.tensorfiles.header import Header, read_header
from loratools.tensorfiles.impostors import FIRST_BYTES, recognise
from loratools.tensorfiles.inputs import FETCH_AGAIN, open_input, read_json_object
from loratools.tensorfiles.missing import no_such_path, other_contents
from loratools.tensorfiles.sharded import check_index, read_index
from loratools.tensorfiles.side_files import files_below, side_files

__all__ = [
    "INDEX_SUFFIX", "BaseModel", "BaseTensor", "Pipeline", "Shard", "elements", "is_pipeline",
    "open_base", "open_pipeline",
]  # fmt: skip

ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
"""How the metadata key of a folded tensor's own shape begins."""


@dataclass(frozen=True, slots=True)
class Shard:
    """One weights file of a base, its stored tensors in file order."""

    path: Path
    tensors: tuple[BaseTensor, ...]
    metadata: Mapping[str, str]
    header: Header | GGUFHeader | None = None


@dataclass(frozen=True)
class BaseModel:
    """A base checkpoint as its headers describe it; no weight has been read.

    Attributes:
        path: as the user gave it.
        shards: weights files in order.
        index: file name of the shard index, or ``None`` for a single file.
        index_metadata: the index's own metadata.
        config: ``config.json`` as an object, or ``None``.
        side_files: files beside the weights that belong to the model, relative to ``path``.
        left_out: files that are not taken along (other copies of the weights), relative.
        packed: quantised weights that are made of several stored tensors.
    """

    path: Path
    shards: tuple[Shard, ...]
    index: str | None = None
    index_metadata: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    side_files: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()
    packed: tuple[BaseTensor, ...] = ()

    @property
    def is_folder(self) -> bool:
        """Whether the base is more than one file."""
        return self.path.is_dir() or len(self.shards) > 1

    @property
    def is_gguf(self) -> bool:
        """Whether the base is a GGUF file, in one or several parts."""
        return isinstance(self.shards[0].header, GGUFHeader)

    @property
    def files(self) -> tuple[Path, ...]:
        """The model and every file of it, which may be links to somewhere else."""
        side = (self.path / name for name in self.side_files)
        return (self.path, *(shard.path for shard in self.shards), *side)

    @cached_property
    def tensors(self) -> Mapping[str, BaseTensor]:
        """Every tensor by name, quantised weights as the float weights that they stand for."""
        parts = self.parts
        found: dict[str, BaseTensor] = {}
        for shard in self.shards:
            for tensor in shard.tensors:
                whole = parts.get(tensor.name, tensor)
                found.setdefault(whole.name, whole)
        for name in self.companions:
            found.pop(name, None)
        return found

    @cached_property
    def companions(self) -> Mapping[str, str]:
        """Stored tensors that only matter beside a quantised weight → that weight's name."""
        return {
            beside.name: weight.name
            for weight in self.packed
            if weight.packed
            for beside in weight.packed.companions
        }

    @cached_property
    def parts(self) -> Mapping[str, BaseTensor]:
        """The weight that each stored part belongs to, by the part's name."""
        return {
            part.name: weight
            for weight in self.packed
            if weight.packed
            for part in weight.packed.tensors.values()
        }

    @cached_property
    def main_dtype(self) -> str:
        """The float dtype that most elements have."""
        sizes: Counter[str] = Counter()
        for tensor in self.tensors.values():
            if tensor.dtype.startswith(("F", "BF")):
                sizes[tensor.dtype] += elements(tensor.shape)
        return sizes.most_common(1)[0][0] if sizes else "F32"

    def config_words(self, name: str) -> list[Any]:
        """Return a config value from the top level and from every section that has it."""
        config = self.config or {}
        sections = [config, *(part for part in config.values() if isinstance(part, Mapping))]
        return [part[name] for part in sections if part.get(name) is not None]

    def config_word(self, name: str) -> Any:
        """Return a config value, from the top level or the text model's section."""
        config = self.config or {}
        text = config.get("text_config")
        if name in config:
            return config[name]
        return text.get(name) if isinstance(text, Mapping) else None


def open_base(path: str | os.PathLike[str], *, instead: str = "") -> BaseModel:
    """Open a Hugging Face or diffusers component folder, one weights file, or a split GGUF file.

    ``instead``: the hint for whoever gives an adapter.

    Raises:
        MissingFileError: nothing there, or a folder without weights.
        CorruptFileError: headers or index that contradict themselves, quantised weights without
            their scales.
        UnsupportedError: an adapter or a pipeline where a model belongs, an unknown container or
            scheme of quantisation.
    """
    where = Path(path)
    opened = _open_folder(where, instead) if where.is_dir() else _open_file(where)
    if _is_adapter(opened):
        raise _adapter_given(where, instead)
    return opened if opened.is_gguf else _with_packed(opened)


def _open_file(where: Path) -> BaseModel:
    if not where.is_file():
        raise no_such_path(where)
    if where.suffix == ".gguf":
        return BaseModel(where, tuple(_gguf_shard(part) for part in open_gguf(where).parts))
    return BaseModel(where, (_open_shard(where),))


def _open_folder(where: Path, instead: str) -> BaseModel:
    _refuse_other_folders(where, instead)
    names, index = _weight_files(where)
    shards = tuple(_open_shard(where / name) for name in names)
    metadata = _check_index(where / index, shards) if index else None
    used = {where / name for name in names}
    side, left = side_files(where, used, index)
    return BaseModel(where, shards, index, metadata, _read_config(where), side, left)


def open_side_files(path: Path) -> BaseModel:
    """Open a model folder for its config and tokenizer alone, whether or not it has weights.

    Raises:
        MissingFileError: no such folder, or none with a ``config.json``.
        CorruptFileError: a config that is no JSON object.
    """
    if not path.exists():
        raise no_such_path(path, "folder")
    if not (path / "config.json").is_file():
        raise MissingFileError(
            f"{path}: no folder with a config.json", hint="name a Hugging Face model's folder"
        )
    side, left = side_files(path, set(), None)
    return BaseModel(path, (), config=_read_config(path), side_files=side, left_out=left)


def _with_packed(base: BaseModel) -> BaseModel:
    stored = [tensor for shard in base.shards for tensor in shard.tensors]
    metadata = {key: value for shard in base.shards for key, value in shard.metadata.items()}
    return replace(base, packed=find_weights(stored, base.config, metadata))


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A diffusers pipeline folder: several models side by side.

    Attributes:
        path: as the user gave it.
        components: folder name → model, for the networks that adapters change.
        other_files: every file outside those folders, relative to ``path``.
    """

    path: Path
    components: Mapping[str, BaseModel]
    other_files: tuple[Path, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The pipeline and every file of it, which may be links to somewhere else."""
        inside = (file for model in self.components.values() for file in model.files)
        return (self.path, *inside, *(self.path / name for name in self.other_files))


def is_pipeline(path: Path) -> bool:
    """Return whether ``path`` is a diffusers pipeline folder."""
    return (path / PIPELINE_INDEX).is_file()


def open_pipeline(path: Path) -> Pipeline:
    """Open the networks of a diffusers pipeline folder that adapters can change.

    Raises: as ``open_base`` for each of them.
    """
    components = {
        name: open_base(path / name) for name in PIPELINE_NETWORKS if (path / name).is_dir()
    }
    if not components:
        raise MissingFileError(
            f"{path}: a pipeline without any of {', '.join(PIPELINE_NETWORKS)}",
            hint="finish the download: merge needs the networks' folders",
        )
    others = [
        found for found in files_below(path) if found.relative_to(path).parts[0] not in components
    ]
    return Pipeline(path, components, tuple(found.relative_to(path) for found in others))


def _is_adapter(opened: BaseModel) -> bool:
    header = opened.shards[0].header
    if isinstance(header, GGUFHeader):
        return header.word("general.type") == "adapter"
    return looks_like_adapter([tensor.name for shard in opened.shards for tensor in shard.tensors])


def _adapter_given(where: Path, instead: str) -> UnsupportedError:
    return UnsupportedError(
        f"{where}: an adapter, not a base model",
        hint=instead or "name a base model's folder or file here",
    )


def _refuse_other_folders(where: Path, instead: str) -> None:
    if is_pipeline(where):
        raise UnsupportedError(
            f"{where}: a diffusers pipeline, not one model",
            hint="name one of its components, such as its unet or transformer folder",
        )
    if (where / ADAPTER_CONFIG).is_file() and not (where / "config.json").is_file():
        raise _adapter_given(where, instead)


def _weight_files(where: Path) -> tuple[list[str], str | None]:
    """Return the weights' file names in order, and their index's name if they are sharded."""
    present = {child.name for child in where.iterdir()}
    for single in MODEL_WEIGHTS:
        index = single + INDEX_SUFFIX
        if index in present and index_wins(single, whole=single in present):
            shards = set(read_index(where / index).weight_map.values())
            return sorted(shards), index
        if single in present:
            return [single], None
    others = sorted(name for name in present if name.endswith(".safetensors"))
    if len(others) == 1:
        return others, None
    if others:
        hint = f"several weights files ({', '.join(others[:4])}): name the file itself"
    else:
        held = f"a model folder holds one of: {', '.join(MODEL_WEIGHTS)} (or their index)"
        hint = other_contents(where) or _inner_folders(where) or held
    raise MissingFileError(f"{where}: no model weights in this folder", hint=hint)


def _inner_folders(where: Path) -> str | None:
    """Return a hint where the models, or adapters, are one storey down."""
    folders = sorted(child for child in where.iterdir() if child.is_dir())
    models = [one for one in folders if (one / "config.json").is_file()]
    if models:
        return f"name the folder of the model that is meant, such as {models[0]}"
    if any((one / ADAPTER_CONFIG).is_file() for one in folders):
        return "its folders are adapters; name a base model's folder or file here"
    return None


def _check_index(index: Path, shards: tuple[Shard, ...]) -> Mapping[str, Any]:
    found = read_index(index)
    check_index(found, {s.path.name: [t.name for t in s.tensors] for s in shards})
    return found.metadata


def _open_shard(path: Path) -> Shard:
    if path.suffix in TORCH_SUFFIXES:
        return _open_torch(path)
    if path.suffix == ".safetensors":
        header = read_header(path)
        tensors = tuple(
            BaseTensor(spec.name, spec.dtype, spec.shape, path, spec.start)
            for spec in header.tensors.values()
        )
        return Shard(path, tensors, header.metadata, header)
    raise _other_suffix(path)


def _other_suffix(path: Path) -> UnsupportedError:
    with open_input(path) as file:
        known = recognise(file.read(FIRST_BYTES))
    what = f"; it is {known.what}" if known else ""
    return UnsupportedError(
        f"{path}: its name is not that of a model's weights{what}",
        hint=known.hint
        if known
        else "give a Hugging Face folder, a .safetensors, .gguf or .bin/.pt file",
    )


def _gguf_shard(header: GGUFHeader) -> Shard:
    tensors = tuple(
        BaseTensor(tensor.name, tensor.type.name, _shape(header, tensor), tensor.file, tensor.start)
        for tensor in header.tensors.values()
    )
    return Shard(header.path, tensors, {}, header)


def _shape(header: GGUFHeader, tensor: GGUFTensor) -> tuple[int, ...]:
    """Return the shape that the model has, where the file folds it for the sake of its blocks.

    Files of image models (ComfyUI-GGUF) keep it in a word beside the tensor.
    """
    said = header.word(f"{ORIGINAL_SHAPE}{tensor.name}")
    if not isinstance(said, list):
        return tensor.shape
    sizes = tuple(size for size in said if isinstance(size, int) and size > 0)
    if len(sizes) != len(said) or elements(sizes) != elements(tensor.shape):
        raise CorruptFileError(
            f"{header.path}: {tensor.name} is {tensor.shape}, and said to have been {said}",
            FETCH_AGAIN,
        )
    return sizes


def _open_torch(path: Path) -> Shard:
    from loratools.tensorfiles.dtypes import dtype_word
    from loratools.tensorfiles.torch_zip import load_torch

    tensors = tuple(
        BaseTensor(name, dtype_word(value.dtype), tuple(value.shape), path, values=value)
        for name, value in load_torch(path).items()
    )
    return Shard(path, tensors, {"format": "pt"})


def _read_config(where: Path) -> Mapping[str, Any] | None:
    file = where / "config.json"
    return read_json_object(file) if file.is_file() else None
