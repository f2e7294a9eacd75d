"""Which files of a repository an adapter, a model or a pipeline consists of.

The rules are those by which folders on disk are read (``adapter_io``, ``basemodel``), applied to
names alone, so that nothing else is fetched.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

from loratools.errors import HubError
from loratools.hub.listing import Listing
from loratools.tensorfiles.file_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX_SUFFIX,
    LEFT_FOLDERS,
    MODEL_MARKS,
    MODEL_WEIGHTS,
    PIPELINE_INDEX,
    PIPELINE_NETWORKS,
    WEIGHT_SUFFIXES,
    index_wins,
)

_PART = re.compile(r"(?P<stem>.*)-\d{5}-of-(?P<count>\d{5})\.gguf")
_PRECISION = re.compile(r"\.(fp16|bf16|fp8|non_ema)(?=[.-])")
"""A variant's word in diffusers' file names."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What to fetch.

    Attributes:
        root: the file or folder of the repository that the reference stands for, ``""`` for all.
        files: paths in the repository, weights first.
        weights: those of ``files`` that hold tensors.
        indexes: indexes among ``files`` whose shards are still to be added.
    """

    root: str
    files: tuple[str, ...]
    weights: tuple[str, ...]
    indexes: tuple[str, ...] = ()


def choose_adapter(listing: Listing) -> Choice:
    """Return the weights of the one adapter that a reference means, and its config.

    Raises:
        HubError: no adapter there, or several.
    """
    path = listing.reference.path
    if listing.is_file:
        return _adapter(listing, path, path)
    direct = _first_weights(listing, path)
    if direct:
        return _adapter(listing, path, direct)
    nested = [folder for folder in _folders(listing, path) if _first_weights(listing, folder)]
    alone = [] if nested else _single_files(listing, path)
    found = nested or alone
    if len(found) == 1:
        return _adapter(listing, found[0], _first_weights(listing, found[0]) or found[0])
    if found:
        raise HubError(
            f"{listing.reference.text}: holds several adapters ({', '.join(found[:8])})",
            hint=f"name one of them: {listing.reference.inside(found[0])}",
        )
    raise _no_adapter(listing)


def is_adapter(listing: Listing) -> bool:
    """Return whether a reference means an adapter rather than a model, as far as names tell."""
    path = listing.reference.path
    if listing.is_file:
        name = PurePosixPath(path)
        return name.name in ADAPTER_WEIGHTS or _join(str(name.parent), ADAPTER_CONFIG) in (
            listing.files
        )
    own = (*ADAPTER_WEIGHTS, ADAPTER_CONFIG)
    if any(_join(path, name) in listing.files for name in own):
        return True
    if any(_join(path, mark) in listing.files for mark in MODEL_MARKS):
        return False
    return any(_first_weights(listing, folder) for folder in _folders(listing, path))


def may_be_adapter(listing: Listing) -> bool:
    """Return whether a reference means an adapter, or one file that only its header can tell."""
    if is_adapter(listing):
        return True
    path = listing.reference.path
    if listing.is_file:
        return not _PART.fullmatch(path)
    marked = any(_join(path, mark) in listing.files for mark in MODEL_MARKS)
    return not marked and len([n for n in listing.below if n.endswith(WEIGHT_SUFFIXES)]) == 1


def choose_model(listing: Listing) -> Choice:
    """Return the files of the model or diffusers pipeline that a reference means.

    Other copies of the weights, in other containers or precisions, stay where they are.
    """
    path = listing.reference.path
    if listing.is_file:
        files = _parts(listing, path)
        return Choice(path, files, files)
    if _join(path, PIPELINE_INDEX) in listing.files:
        return _pipeline(listing, path)
    return _model(listing, path)


def side_files(listing: Listing) -> tuple[str, ...]:
    """Return what lies beside the weights in the folder that a reference means."""
    folder = listing.reference.path
    return tuple(name for name in listing.below if _comes_along(listing, folder, name))


def with_shards(choice: Choice, shards: Iterable[str]) -> Choice:
    """Return a choice with the shards that its indexes name."""
    more = tuple(dict.fromkeys(shards))
    return Choice(choice.root, (*more, *choice.files), (*more, *choice.weights))


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder not in ("", ".") else name


def _inside(listing: Listing, folder: str) -> list[str]:
    """Return the names directly in a folder."""
    start = f"{folder}/" if folder else ""
    rest = (name[len(start) :] for name in listing.files if name.startswith(start))
    return [name for name in rest if "/" not in name]


def _folders(listing: Listing, folder: str) -> list[str]:
    start = f"{folder}/" if folder else ""
    rest = (name[len(start) :] for name in listing.below)
    return sorted({_join(folder, name.split("/")[0]) for name in rest if "/" in name})


def _first_weights(listing: Listing, folder: str) -> str | None:
    names = (_join(folder, name) for name in ADAPTER_WEIGHTS)
    return next((name for name in names if name in listing.files), None)


def _single_files(listing: Listing, folder: str) -> list[str]:
    """Return the weights files of a folder that is no model's: an adapter as one file."""
    if any(_join(folder, mark) in listing.files for mark in MODEL_MARKS):
        return []
    names = _inside(listing, folder)
    for suffixes in ((".safetensors", ".gguf"), WEIGHT_SUFFIXES):
        found = [name for name in names if name.endswith(suffixes)]
        if found:
            return [_join(folder, name) for name in found]
    return []


def _adapter(listing: Listing, root: str, weights: str) -> Choice:
    config = _join(str(PurePosixPath(weights).parent), ADAPTER_CONFIG)
    files = (weights, config) if config in listing.files else (weights,)
    return Choice(root, files, (weights,))


def _no_adapter(listing: Listing) -> HubError:
    marks = [_join(listing.reference.path, mark) for mark in MODEL_MARKS]
    if any(mark in listing.files for mark in marks):
        hint = "this looks like a base model; name the adapter's repository instead"
    else:
        hint = f"an adapter's repository holds {ADAPTER_WEIGHTS[0]} or one .safetensors file"
    return HubError(f"{listing.reference.text}: no adapter weights in there", hint)


def _parts(listing: Listing, path: str) -> tuple[str, ...]:
    """Return a file, or all parts of a split GGUF model that it is one of."""
    match = _PART.fullmatch(path)
    if not match:
        return (path,)
    end = f"-of-{match['count']}.gguf"
    start = f"{match['stem']}-"
    found = tuple(n for n in listing.files if n.startswith(start) and n.endswith(end))
    return tuple(sorted(name for name in found if _PART.fullmatch(name)))


def _model(listing: Listing, folder: str) -> Choice:
    weights, indexes = _weights_of(listing, folder)
    start = f"{folder}/" if folder else ""
    below = [name for name in listing.files if name.startswith(start)]
    side = [name for name in below if _comes_along(listing, folder, name)]
    files = tuple(dict.fromkeys((*weights, *indexes, *side)))
    return Choice(folder, files, tuple(weights), tuple(indexes))


def _weights_of(listing: Listing, folder: str) -> tuple[list[str], list[str]]:
    """Return the weights of a model folder, or the index that names them."""
    names = set(_inside(listing, folder))
    for single in MODEL_WEIGHTS:
        index = single + INDEX_SUFFIX
        if index in names and index_wins(single, whole=single in names):
            return [], [_join(folder, index)]
        if single in names:
            return [_join(folder, single)], []
    others = sorted(name for name in names if name.endswith(".safetensors"))
    if len(others) == 1:
        return [_join(folder, others[0])], []
    gguf = sorted(name for name in names if name.endswith(".gguf"))
    hint = f"a model's folder holds one of: {', '.join(MODEL_WEIGHTS)} (or their index)"
    if several := [*others, *gguf]:
        hint = f"name the file itself: {listing.reference.inside(_join(folder, several[0]))}"
    raise HubError(f"{listing.reference.inside(folder)}: no model weights in this folder", hint)


def _comes_along(listing: Listing, folder: str, name: str) -> bool:
    """Return whether a file beside the weights belongs to the model."""
    inner = PurePosixPath(name[len(folder) :].lstrip("/"))
    if any(LEFT_FOLDERS.fullmatch(part) for part in inner.parts[:-1]):
        return False
    if inner.name == ADAPTER_CONFIG:
        return False
    if not inner.name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX)):
        return True
    is_module = len(inner.parts) > 1 and _join(str(PurePosixPath(name).parent), "config.json") in (
        listing.files
    )
    return is_module and inner.suffix in (".safetensors", ".bin")


def _pipeline(listing: Listing, folder: str) -> Choice:
    """Return the networks' files and everything else that is no second copy of weights."""
    networks = [_join(folder, name) for name in PIPELINE_NETWORKS]
    present = [n for n in networks if any(name.startswith(f"{n}/") for name in listing.files)]
    parts = [_model(listing, network) for network in present]
    inside = tuple(f"{network}/" for network in present)
    others = [name for name in listing.below if not name.startswith(inside or ("\0",))]
    kept = [name for name in _without_copies(others) if _is_of_pipeline(folder, name)]
    return Choice(
        folder,
        (*(name for part in parts for name in part.files), *kept),
        tuple(name for part in parts for name in part.weights),
        tuple(name for part in parts for name in part.indexes),
    )


def _is_of_pipeline(folder: str, name: str) -> bool:
    inner = PurePosixPath(name[len(folder) :].lstrip("/"))
    # A whole model in one file, beside the folders that hold it in pieces.
    alone = len(inner.parts) == 1 and inner.name.endswith(WEIGHT_SUFFIXES)
    return not alone and not any(LEFT_FOLDERS.fullmatch(part) for part in inner.parts[:-1])


def _without_copies(names: Sequence[str]) -> list[str]:
    """Return names without weights that a folder holds in another container or precision too."""
    folders: dict[str, list[str]] = defaultdict(list)
    for name in names:
        folders[str(PurePosixPath(name).parent)].append(name)
    left: set[str] = set()
    for found in folders.values():
        weights = [name for name in found if name.endswith((*WEIGHT_SUFFIXES, INDEX_SUFFIX))]
        safe = [name for name in weights if ".safetensors" in name]
        whole = [name for name in safe or weights if not _PRECISION.search(name)]
        left |= set(weights) - set(whole or safe or weights)
    return [name for name in names if name not in left]
