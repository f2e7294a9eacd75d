"""Whether an output may go where it was told to go."""

from __future__ import annotations

import os
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path

from loratools.errors import OutputError

_MODEL_FILES = (
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "config.json",
    "adapter_config.json",
    "model_index.json",
)
_NOT_WRITABLE = "Choose another output path, or have the folder's permissions changed."


def settled(path: Path) -> Path:
    """Return ``path`` absolute, with links resolved in its parents but not in its last part."""
    if path.name in ("", ".."):
        return path.resolve()
    return path.parent.resolve() / path.name


def check_destination(
    target: Path, *, folder: bool, overwrite: bool, inputs: Sequence[Path] = ()
) -> None:
    """Refuse a destination that exists, or whose making would destroy something else.

    Changes nothing, so that a dry run can ask.

    Args:
        target: where the output is to appear.
        folder: whether the output is a folder.
        overwrite: whether something there may be replaced: a file by a file, a folder with model
            files by a folder.
        inputs: paths that must survive; the output may neither be, contain nor lie in any of them.

    Raises:
        OutputError: with what is in the way.
    """
    target = settled(target)
    _check_inputs(target, inputs)
    _check_parents(target)
    if os.path.lexists(target):
        _check_existing(target, folder=folder, overwrite=overwrite)


def _check_inputs(target: Path, inputs: Sequence[Path]) -> None:
    # A link and what it points to are both the input.
    places = [(given, place) for given in inputs for place in (settled(given), given.resolve())]
    for given, place in places:
        if fault := _overlap(_identities(target), _identities(place)):
            raise OutputError(
                f"{target}: the output {fault} {given}", "Choose another output path."
            )


def _overlap(target: Sequence[object], given: Sequence[object]) -> str | None:
    """Return how two paths collide, each given as itself and its parents."""
    if target[0] == given[0]:
        return "is the input"
    if target[0] in given:
        return "contains the input"
    return "lies inside the input" if given[0] in target else None


def _check_parents(target: Path) -> None:
    nearest = next((path for path in target.parents if os.path.lexists(path)), target)
    if not nearest.is_dir():
        raise OutputError(f"{target}: {nearest} is not a folder", "Choose another output path.")
    if not may_write(nearest):
        raise OutputError(f"{target}: {nearest} is not writable for you", _NOT_WRITABLE)


def may_write(folder: Path) -> bool:
    """Return whether the system lets this process make files in a folder.

    Windows tells only what an attribute says, so that there the attempt itself decides.
    """
    effective = os.access in os.supports_effective_ids
    return os.access(folder, os.W_OK | os.X_OK, effective_ids=effective)


def _check_existing(target: Path, *, folder: bool, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{target}: already exists", "Pass --overwrite to replace it.")
    if target.is_symlink():
        raise OutputError(
            f"{target}: is a symbolic link", f"Name what it points to: {target.resolve()}"
        )
    if folder:
        fault = _folder_fault(target)
    else:
        fault = None if target.is_file() else "is not a regular file, and the output is one"
    if fault:
        raise OutputError(f"{target}: {fault}", "Choose another output path.")


def _folder_fault(target: Path) -> str | None:
    """Return why a folder must not be replaced, or None."""
    if not target.is_dir():
        return "is not a folder, and the output is one"
    kept = _identities(Path("~").expanduser()) + _identities(Path.cwd())
    if _identities(target)[0] in kept:
        return "is or contains the home or working folder"
    names = [path.name for path in target.iterdir()]
    if ".git" in names:
        return "is a git repository, which would be lost"
    if names and not any(fnmatch(name, rule) for name in names for rule in _MODEL_FILES):
        return "is not empty and holds no model files"
    return None


def _identities(path: Path) -> list[object]:
    """Return what tells ``path`` and each of its parents apart from all other files.

    Device and inode see through links, mounts and case; what does not exist has its path.
    """
    return [_identity(place) for place in (path, *path.parents)]


def _identity(path: Path) -> object:
    try:
        status = path.stat()
    except OSError:
        return path
    return (status.st_dev, status.st_ino)
