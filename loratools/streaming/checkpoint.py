"""The checkpoint that an operation writes: its files, index, config and side files."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.basemodel import INDEX_SUFFIX, BaseModel, BaseTensor, Shard
from loratools.basetensors import DTYPE_FIELDS, text_sections
from loratools.compute import Compute
from loratools.errors import OutputError
from loratools.streaming.layouts import FileWork
from loratools.streaming.packing import part_works
from loratools.streaming.rewriting import Progress, rewrite
from loratools.streaming.works import TensorResult, TensorWork
from loratools.tensorfiles.atomic import require_space, staged_output
from loratools.tensorfiles.dtypes import FLOAT_NAMES, FLOAT_WORDS
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.sharded import encode_index

DTYPE_WORDS: Mapping[str, str] = {"fp32": "F32", "bf16": "BF16", "fp16": "F16"}
REMOVED = object()
"""The value of a config's field that is to be taken out."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A planned output.

    Attributes:
        base: the model whose layout and side files it takes.
        files: weights files.
        config: fields of ``config.json`` to set, or to take out where the value is ``REMOVED``;
            empty leaves the file's bytes alone.
    """

    base: BaseModel
    files: tuple[FileWork, ...]
    config: Mapping[str, Any]

    @property
    def nbytes(self) -> int:
        """Size of the weights."""
        return sum(work.nbytes for file in self.files for work in file.tensors)

    @property
    def works(self) -> dict[str, TensorWork]:
        """Every output tensor by name, packed weights as one."""
        every = (work.whole or work for file in self.files for work in file.tensors)
        return {work.name: work for work in every}


def plan_checkpoint(
    base: BaseModel,
    changes: Mapping[str, TensorWork],
    *,
    dropped: Collection[str] = (),
    config: Mapping[str, Any] | None = None,
    dtype: str = "keep",
) -> Checkpoint:
    """Lay out a checkpoint like ``base`` with some tensors changed, added or dropped.

    Args:
        base: whose files, order and side files are kept.
        changes: output tensors by name; names that the base lacks go to the end of its last file.
        dropped: names to leave out.
        config: fields of ``config.json`` to set.
        dtype: ``keep``, or the word that every float tensor is converted to.
    """
    files = []
    added = [work for name, work in changes.items() if name not in base.tensors]
    every = {n: changes.get(n) or unchanged(t, dtype) for n, t in base.tensors.items()}
    every |= {work.name: work for work in added}
    done: set[str] = set()
    for position, shard in enumerate(base.shards):
        kept = [tensor for tensor in shard.tensors if tensor.name not in dropped]
        works = [work for tensor in kept for work in _works(base, tensor, every, done)]
        if position == len(base.shards) - 1:
            works += added
        files.append(FileWork(_file_name(base, shard), tuple(works), shard))
    edits = {} if dtype == "keep" else dtype_fields(base, DTYPE_WORDS[dtype])
    return Checkpoint(base, tuple(files), {**(config or {}), **edits})


def _works(
    base: BaseModel, tensor: BaseTensor, works: Mapping[str, TensorWork], done: set[str]
) -> Iterator[TensorWork]:
    """Yield what the output stores for one stored tensor of the base; ``done`` grows."""
    whole = works.get(base.parts[tensor.name].name if tensor.name in base.parts else tensor.name)
    if whole is None:
        # It only matters beside a quantised weight.
        if base.companions[tensor.name] in works and works[base.companions[tensor.name]].is_packed:
            yield unchanged(tensor)
    elif whole.packer:
        yield from part_works(whole)
    elif not whole.is_packed:
        if whole.name not in done:
            yield whole
        done.add(whole.name)
    elif whole.source.packed:
        # The source's own part, which is another model's where one is restored from its base.
        roles = {part.name: (role, part) for role, part in whole.source.packed.tensors.items()}
        role, part = roles[tensor.name]
        yield replace(unchanged(part), whole=whole, role=role)


def with_words(checkpoint: Checkpoint, words: Mapping[str, Value | None]) -> Checkpoint:
    """Return the checkpoint with metadata set in its first GGUF file, or left out (``None``)."""
    first, *others = checkpoint.files
    return replace(checkpoint, files=(replace(first, words=words), *others))


def unchanged(tensor: BaseTensor, dtype: str = "keep") -> TensorWork:
    """Return the work that keeps a tensor, converted to ``dtype`` if it is a float."""
    if tensor.packed is not None:
        return TensorWork(tensor.name, tensor.packed.scheme, tensor.shape, tensor)
    return TensorWork(tensor.name, output_dtype(tensor.dtype, dtype), tensor.shape, tensor)


def output_dtype(word: str, dtype: str) -> str:
    """Return the safetensors word of a tensor of dtype ``word`` after ``--dtype``."""
    return DTYPE_WORDS[dtype] if dtype != "keep" and word in FLOAT_WORDS else word


def dtype_fields(base: BaseModel, word: str) -> dict[str, str]:
    """Return the fields of a base's config that name another float type than ``word``, set right.

    Args:
        base: the model.
        word: safetensors' word.
    """
    written, sections = FLOAT_NAMES[word], text_sections(base.config)
    return {
        name: written
        for name in DTYPE_FIELDS
        if any(section.get(name) not in (None, written) for section in sections)
    }


def _file_name(base: BaseModel, shard: Shard) -> str:
    """Return the output's file name: the shard's, with torch's names in safetensors' dress."""
    name = shard.path.name
    if not base.is_folder or name.endswith((".safetensors", ".gguf")):
        return name
    stem = re.sub(r"^pytorch_model", "model", name.rpartition(".")[0])
    return f"{stem}.safetensors"


Results = Mapping[str, Mapping[str, TensorResult]]
"""Component ("" for a model by itself) → output tensor → what happened to it."""


def write_checkpoints(
    plans: Mapping[str, Checkpoint],
    output: Path,
    *,
    compute: Compute,
    root: Path,
    other_files: Sequence[Path] = (),
    overwrite: bool = False,
    inputs: Sequence[Path] = (),
    accept: Callable[[Results], None] | None = None,
    progress: Progress | None = None,
) -> Results:
    """Write the planned checkpoints to ``output``, complete or not at all.

    Args:
        plans: sub-folder → checkpoint; the empty name for a model that is the output itself.
        output: a folder, or a file for a base that is one.
        compute: device and threads.
        root: the input's path.
        other_files: files below ``root`` that are copied as they are, relative to it.
        overwrite: replace an existing output.
        inputs: paths that must survive: every file that is read, since any may be a link.
        accept: sees the results before the output appears and may raise to prevent it.
        progress: called with counts of bytes written, from several threads.

    Raises:
        OutputError: the destination is refused or too small (see ``staged_output``).
        NonFiniteError, CorruptFileError: see ``rewrite``.
    """
    folder = root.is_dir() or any(plan.base.is_folder for plan in plans.values())
    size = sum(plan.nbytes for plan in plans.values())
    size += sum((root / name).stat().st_size for name in other_files)
    results = {}
    with staged_output(output, folder=folder, overwrite=overwrite, inputs=inputs) as work:
        require_space(work.parent, size)
        for name, plan in plans.items():
            home = work / name
            if folder:
                home.mkdir(exist_ok=True)
            results[name] = rewrite(_placed(plan, home), compute, progress)
        if accept:
            accept(results)
        for name, plan in plans.items():
            if folder:
                _write_beside(plan, work / name)
        copy_files(root, work, other_files)
    return results


def copy_files(root: Path, target: Path, names: Sequence[Path]) -> None:
    """Copy files below ``root`` to the same places below ``target``, links as their contents."""
    for name in names:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(root / name, target / name)


def check_suffix(root: Path, output: Path, *, folder: bool) -> None:
    """Raise OutputError if a file's output is not called as its base is, or a folder's is."""
    expected = ".gguf" if root.suffix == ".gguf" else ".safetensors"
    if folder and output.suffix in (".gguf", ".safetensors"):
        several, hint = "in several parts", f"for example: -o {output.with_suffix('')}"
        if root.is_dir():
            several = "a folder"
        if root.is_dir() and output.suffix == ".gguf":
            hint += "; `loratools quantize` with --template makes a GGUF file of that"
        raise OutputError(f"{output}: the base is {several}, so the output is a folder", hint)
    if not folder and output.suffix != expected:
        raise OutputError(
            f"{output}: the base is one file, so the output is a {expected} file",
            hint=f"for example: -o {output.with_suffix(expected)}",
        )


def _placed(plan: Checkpoint, work: Path) -> list[tuple[FileWork, Path]]:
    """Join each file to its path: inside the staged folder, or the staged file itself."""
    inside = plan.base.is_folder
    return [(file, work / file.name if inside else work) for file in plan.files]


def _write_beside(plan: Checkpoint, folder: Path) -> None:
    """Write the index, the corrected config and the side files into the staged folder."""
    base = plan.base
    if base.index:
        name = base.index.removesuffix(INDEX_SUFFIX)
        stem = re.sub(r"^pytorch_model", "model", name.rpartition(".")[0])
        (folder / f"{stem}.safetensors{INDEX_SUFFIX}").write_text(_index(plan), encoding="utf-8")
    copy_files(base.path, folder, base.side_files)
    if plan.config and base.config is not None:
        text = json.dumps(edited_config(base.config, plan.config), indent=2, ensure_ascii=False)
        # The side file keeps its permissions, and loses its link if it was one.
        (folder / "config.json").write_text(text + os.linesep, encoding="utf-8", newline="")


def _index(plan: Checkpoint) -> str:
    weight_map = {work.name: file.name for file in plan.files for work in file.tensors}
    metadata = dict(plan.base.index_metadata or {})
    metadata.pop("total_size", None)
    if "total_parameters" in metadata:
        metadata["total_parameters"] = sum(work.elements for work in plan.works.values())
    return encode_index(weight_map, plan.nbytes, metadata)


def edited_config(config: Mapping[str, Any], edits: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``config`` with ``edits`` at the top, and in the text model's section if it has them.

    A word that only the section has is set there alone, except for the embeddings' tie, which
    readers look for in both places.
    """
    removed = {name for name, value in edits.items() if value is REMOVED}
    if removed:
        return edited_config(_without(config, removed), _without(edits, removed))
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        return {**config, **edits}
    inner = {name: value for name, value in edits.items() if name in text}
    outer = {
        name: value
        for name, value in edits.items()
        if name in config or name not in text or name == "tie_word_embeddings"
    }
    return {**config, **outer, "text_config": {**text, **inner}}


def _without(config: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return a config without some words, at the top and in the text model's section."""
    kept = {name: value for name, value in config.items() if name not in names}
    text = kept.get("text_config")
    if isinstance(text, Mapping):
        kept["text_config"] = {name: value for name, value in text.items() if name not in names}
    return kept
