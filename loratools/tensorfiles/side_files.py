"""What lies in a model's folder beside its weights."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path

from loratools.errors import InputError, MissingFileError
from loratools.tensorfiles.file_names import (
    ADAPTER_CONFIG,
    INDEX_SUFFIX,
    LEFT_FOLDERS,
    WEIGHT_SUFFIXES,
)


def side_files(
    where: Path, used: Collection[Path], index: str | None
) -> tuple[tuple[Path, ...], tuple[Path, ...]]:
    """Split what lies beside the weights into what comes along and what does not.

    Args:
        where: the model's folder.
        used: the weights.
        index: the name of the file that ties shards together, if there is one.

    Returns:
        Paths below ``where``: those that come along, and copies of the weights in other formats.

    Raises:
        MissingFileError: a link to a file that is not there.
        InputError: see ``files_below``.
    """
    side: list[Path] = []
    left: list[Path] = []
    for path in files_below(where):
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
    if path.name == ADAPTER_CONFIG:
        return True
    if path.suffix not in WEIGHT_SUFFIXES and not path.name.endswith(INDEX_SUFFIX):
        return False
    # A sub-folder with its own config is another module (sentence-transformers' 2_Dense).
    is_module = path.parent != where and (path.parent / "config.json").is_file()
    return not (is_module and path.suffix in (".safetensors", ".bin"))


def files_below(where: Path) -> Iterator[Path]:
    """Yield every file that belongs to a model folder, in a fixed order; links are followed.

    Raises InputError for a link to a folder around it, which would have no end.
    """
    for folder, folders, files in os.walk(where, followlinks=True):
        folders[:] = sorted(name for name in folders if not LEFT_FOLDERS.fullmatch(name))
        for path in (Path(folder) / name for name in folders):
            if path.is_symlink() and _leads_back(path):
                raise InputError(f"{path}: a link to a folder around it", hint="remove the link")
        yield from (Path(folder) / name for name in sorted(files))


def _leads_back(link: Path) -> bool:
    """Return whether a link leads to a folder that it was reached through, or one around that."""
    target = link.resolve()
    return any(parent.resolve().is_relative_to(target) for parent in link.parents)
