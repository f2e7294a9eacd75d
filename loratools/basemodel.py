"""A base checkpoint: which tensors, in which file, at which bytes; its config and side files."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loratools.errors import CorruptFileError, InputError, MissingFileError, UnsupportedError
from loratools.tensorfiles.gguf import GGUFHeader
from loratools.tensorfiles.gguf_split import open_gguf
from loratools.tensorfiles.header import Header, read_header
from loratools.tensorfiles.sharded import check_index, read_index

if TYPE_CHECKING:
    from torch import Tensor

INDEX_SUFFIX = ".index.json"
_SINGLE = (
    "model.safetensors", "diffusion_pytorch_model.safetensors", "pytorch_model.bin",
    "diffusion_pytorch_model.bin",
)  # fmt: skip
_TORCH_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_WEIGHT_SUFFIXES = (*_TORCH_SUFFIXES, ".safetensors", ".gguf", ".h5", ".msgpack", ".onnx", ".ot")
_FETCH_AGAIN = "fetch or save the file again"
_LEFT_FOLDERS = re.compile(r"\.git|\.cache|__pycache__|checkpoint-\d+")


@dataclass(frozen=True, slots=True, eq=False)
class BaseTensor:
    """One tensor of a base and where its values are.

    Attributes:
        name: as the checkpoint calls it.
        dtype: safetensors' word (``BF16``), or ggml's name of a type (``Q4_K``).
        shape: as stored.
        file: the shard that holds it.
        start: absolute byte offset of its contiguous values in ``file``, or ``None`` when they
            are in ``values``.
        values: the (memory-mapped) tensor, for containers without byte ranges.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    start: int | None = None
    values: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """One weights file of a base, tensors in file order."""

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
    """

    path: Path
    shards: tuple[Shard, ...]
    index: str | None = None
    index_metadata: Mapping[str, Any] | None = None
    config: Mapping[str, Any] | None = None
    side_files: tuple[Path, ...] = ()
    left_out: tuple[Path, ...] = ()

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
        """Every tensor by name."""
        return {tensor.name: tensor for shard in self.shards for tensor in shard.tensors}

    @cached_property
    def main_dtype(self) -> str:
        """The float dtype that most elements have."""
        sizes: Counter[str] = Counter()
        for shard in self.shards:
            for tensor in shard.tensors:
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


def elements(shape: tuple[int, ...]) -> int:
    """Return the number of elements of a shape."""
    count = 1
    for size in shape:
        count *= size
    return count


def open_base(path: str | os.PathLike[str]) -> BaseModel:
    """Open a Hugging Face or diffusers component folder, one weights file, or a split GGUF file.

    Raises:
        MissingFileError: nothing there, or a folder without weights.
        CorruptFileError: headers or index that contradict themselves.
        UnsupportedError: an adapter or a pipeline where a model belongs, or an unknown container.
    """
    where = Path(path)
    if where.is_file() and where.suffix == ".gguf":
        return BaseModel(where, tuple(_gguf_shard(part) for part in open_gguf(where).parts))
    if where.is_file():
        return BaseModel(where, (_open_shard(where),))
    if not where.is_dir():
        raise MissingFileError(
            f"no such file or folder: {where}", hint="check the path; relative paths start here"
        )
    _refuse_other_folders(where)
    names, index = _weight_files(where)
    shards = tuple(_open_shard(where / name) for name in names)
    metadata = _check_index(where / index, shards) if index else None
    used = {where / name for name in names}
    side, left = _side_files(where, used, index)
    return BaseModel(where, shards, index, metadata, _read_config(where), side, left)


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


_ADAPTED = (
    "unet",
    "transformer",
    "transformer_2",
    "text_encoder",
    "text_encoder_2",
    "text_encoder_3",
)


def is_pipeline(path: Path) -> bool:
    """Return whether ``path`` is a diffusers pipeline folder."""
    return (path / "model_index.json").is_file()


def open_pipeline(path: Path) -> Pipeline:
    """Open the networks of a diffusers pipeline folder that adapters can change.

    Raises: as ``open_base`` for each of them.
    """
    components = {name: open_base(path / name) for name in _ADAPTED if (path / name).is_dir()}
    if not components:
        raise MissingFileError(
            f"{path}: a pipeline without any of {', '.join(_ADAPTED)}",
            hint="finish the download: merge needs the networks' folders",
        )
    others = [
        found for found in _files_below(path) if found.relative_to(path).parts[0] not in components
    ]
    return Pipeline(path, components, tuple(found.relative_to(path) for found in others))


def _files_below(where: Path) -> Iterator[Path]:
    """Yield every file that belongs to a model folder, in a fixed order; links are followed.

    Raises InputError for a link to a folder around it, which would have no end.
    """
    for folder, folders, files in os.walk(where, followlinks=True):
        folders[:] = sorted(name for name in folders if not _LEFT_FOLDERS.fullmatch(name))
        for path in (Path(folder) / name for name in folders):
            if path.is_symlink() and _leads_back(path):
                raise InputError(f"{path}: a link to a folder around it", hint="remove the link")
        yield from (Path(folder) / name for name in sorted(files))


def _leads_back(link: Path) -> bool:
    """Return whether a link leads to a folder that it was reached through, or one around that."""
    target = link.resolve()
    return any(parent.resolve().is_relative_to(target) for parent in link.parents)


def _refuse_other_folders(where: Path) -> None:
    if is_pipeline(where):
        raise UnsupportedError(
            f"{where}: a diffusers pipeline, not one model",
            hint="name one of its components, such as its unet or transformer folder",
        )
    if (where / "adapter_config.json").is_file() and not (where / "config.json").is_file():
        raise InputError(
            f"{where}: an adapter, not a base model", hint="the base comes first, then the adapters"
        )


def _weight_files(where: Path) -> tuple[list[str], str | None]:
    """Return the weights' file names in order, and their index's name if they are sharded."""
    present = {child.name for child in where.iterdir()}
    for single in _SINGLE:
        index = single + INDEX_SUFFIX
        # transformers reads the whole file where both are present, diffusers the index.
        sharded = index in present and (single not in present or single.startswith("diffusion"))
        if sharded:
            shards = set(read_index(where / index).weight_map.values())
            return sorted(shards), index
        if single in present:
            return [single], None
    others = sorted(name for name in present if name.endswith(".safetensors"))
    if len(others) == 1:
        return others, None
    hint = f"a model folder holds one of: {', '.join(_SINGLE)} (or their index)"
    if others:
        hint = f"several weights files ({', '.join(others[:4])}): name the file itself"
    raise MissingFileError(f"{where}: no model weights in this folder", hint=hint)


def _check_index(index: Path, shards: tuple[Shard, ...]) -> Mapping[str, Any]:
    found = read_index(index)
    check_index(found, {s.path.name: [t.name for t in s.tensors] for s in shards})
    return found.metadata


def _open_shard(path: Path) -> Shard:
    if path.suffix in _TORCH_SUFFIXES:
        return _open_torch(path)
    if path.suffix == ".safetensors":
        header = read_header(path)
        tensors = tuple(
            BaseTensor(spec.name, spec.dtype, spec.shape, path, spec.start)
            for spec in header.tensors.values()
        )
        return Shard(path, tensors, header.metadata, header)
    raise UnsupportedError(
        f"{path}: not a weights file that loratools can merge into",
        hint="give a Hugging Face folder, a .safetensors, .gguf or .bin/.pt file",
    )


def _gguf_shard(header: GGUFHeader) -> Shard:
    tensors = tuple(
        BaseTensor(tensor.name, tensor.type.name, tensor.shape, tensor.file, tensor.start)
        for tensor in header.tensors.values()
    )
    return Shard(header.path, tensors, {}, header)


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


def read_json_object(file: Path) -> Mapping[str, Any]:
    """Return a small JSON file's object; raises CorruptFileError if it holds none."""
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CorruptFileError(f"{file}: not JSON ({error})", _FETCH_AGAIN) from error
    if not isinstance(config, dict):
        raise CorruptFileError(f"{file}: not a JSON object", _FETCH_AGAIN)
    return config


def _side_files(
    where: Path, used: set[Path], index: str | None
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Split what lies beside the weights into what comes along and what does not."""
    side: list[Path] = []
    left: list[Path] = []
    for path in _files_below(where):
        if path not in used and path != where / (index or ""):
            if not path.exists():
                raise MissingFileError(
                    f"{path}: a link to a file that is not there",
                    hint="finish the download, or remove the link",
                )
            (left if _is_other_copy(path, where) else side).append(path.relative_to(where))
    return tuple(side), tuple(left)


def _is_other_copy(path: Path, where: Path) -> bool:
    """Return whether a file holds the model's weights once more, so that a merge makes it stale."""
    # With an adapter's config beside it, transformers takes a model for an adapter.
    if path.name == "adapter_config.json":
        return True
    if path.suffix not in _WEIGHT_SUFFIXES and not path.name.endswith(INDEX_SUFFIX):
        return False
    # A sub-folder with its own config is another module (sentence-transformers' 2_Dense).
    is_module = path.parent != where and (path.parent / "config.json").is_file()
    return not (is_module and path.suffix in (".safetensors", ".bin"))
