"""Models in several GGUF files: ``NAME-00001-of-00003.gguf``, tied together by ``split.*`` keys."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from loratools.errors import CorruptFileError, MissingFileError
from loratools.tensorfiles.gguf import GGUFHeader, GGUFTensor, read_gguf_header
from loratools.tensorfiles.gguf_reading import Value
from loratools.tensorfiles.inputs import INCOMPLETE_HINT, quoted

SPLIT_NUMBER, SPLIT_COUNT, SPLIT_TENSORS = "split.no", "split.count", "split.tensors.count"

_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


@dataclass(frozen=True)
class GGUFModel:
    """A model of one or several GGUF files.

    Attributes:
        parts: the files' headers in order; the first has the metadata.
    """

    parts: tuple[GGUFHeader, ...]

    @property
    def metadata(self) -> Mapping[str, Value]:
        """The first file's metadata, where a split model keeps its own."""
        return self.parts[0].metadata

    @cached_property
    def tensors(self) -> Mapping[str, GGUFTensor]:
        """Every tensor by name, in the order of the files."""
        return {name: tensor for part in self.parts for name, tensor in part.tensors.items()}

    def word(self, key: str) -> object:
        """Return a metadata value as plain Python, or ``None`` where there is none."""
        return self.parts[0].word(key)


def open_gguf(path: Path) -> GGUFModel:
    """Open a GGUF model by any of its files.

    Raises:
        MissingFileError: there is no such file, or another part of the model is not beside it.
        CorruptFileError, UnsupportedError: see ``read_gguf_header``; or parts that disagree.
    """
    given = read_gguf_header(path)
    count = given.word(SPLIT_COUNT)
    if not isinstance(count, int) or count < 2:
        return GGUFModel((given,))
    names = _part_names(path, count)
    parts = tuple(given if name == path else read_gguf_header(name) for name in names)
    _check(parts, count)
    return GGUFModel(parts)


def split_name(stem: str, number: int, count: int) -> str:
    """Return the file name of part ``number`` (from 0) of ``count``."""
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def _part_names(path: Path, count: int) -> list[Path]:
    match = _NAME.fullmatch(path.name)
    if match is None or int(match["count"]) != count:
        raise CorruptFileError(
            f"{path}: one of {count} parts, by its metadata, and not so by its name",
            hint=f"give the parts their names back: {split_name('NAME', 0, count)} ...",
        )
    names = [path.with_name(split_name(match["stem"], number, count)) for number in range(count)]
    missing = [name.name for name in names if not name.is_file()]
    if missing:
        raise MissingFileError(
            f"{path}: {len(missing)} of {count} parts are missing: {', '.join(missing[:8])}",
            INCOMPLETE_HINT,
        )
    return names


def _check(parts: tuple[GGUFHeader, ...], count: int) -> None:
    seen: dict[str, Path] = {}
    for number, part in enumerate(parts):
        if (part.word(SPLIT_NUMBER), part.word(SPLIT_COUNT)) != (number, count):
            raise CorruptFileError(
                f"{part.path}: says it is part {part.word(SPLIT_NUMBER)} of "
                f"{part.word(SPLIT_COUNT)}, not {number} of {count}"
            )
        for name in part.tensors:
            if name in seen:
                raise CorruptFileError(
                    f"tensor {quoted(name)} is in {seen[name]} and in {part.path}"
                )
            seen[name] = part.path
    said = parts[0].word(SPLIT_TENSORS)
    if said is not None and said != len(seen):
        raise CorruptFileError(f"{parts[0].path}: {said} tensors are said, {len(seen)} are there")
