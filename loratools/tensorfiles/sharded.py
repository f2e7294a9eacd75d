"""The index that ties the shards of a checkpoint together.

Layout: https://huggingface.co/docs/transformers/big_models#sharded-checkpoints
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from loratools.errors import CorruptFileError, MissingFileError
from loratools.tensorfiles.file_names import INDEX_SUFFIX, MODEL_WEIGHTS
from loratools.tensorfiles.header import read_header
from loratools.tensorfiles.inputs import INCOMPLETE_HINT, open_input, parse_object, quoted

# Separators of every system, drive letters and streams: a shard lies beside its index.
_FORBIDDEN = frozenset("/\\:\0")
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class ShardIndex:
    """Where each tensor is: ``weight_map`` is tensor name to file name, beside the index."""

    weight_map: Mapping[str, str]
    metadata: Mapping[str, Any]


def read_index(path: Path) -> ShardIndex:
    """Read a ``*.index.json`` and see that every shard it names is there.

    A shard may be a symbolic link to anywhere, as in the cache of the Hub.

    Raises:
        MissingFileError: the index, or any of the shards, does not exist.
        CorruptFileError: the index is not what it should be, or names a file elsewhere.
    """
    with open_input(path) as file:
        members = parse_object(file.read(), str(path))
    weight_map = members.get("weight_map")
    metadata = members.get("metadata", {})
    if not isinstance(weight_map, dict) or not isinstance(metadata, dict):
        raise CorruptFileError(f"{path}: weight_map and metadata must be JSON objects")
    for name, shard in weight_map.items():
        if fault := _file_name_fault(shard):
            raise CorruptFileError(
                f"{path}: tensor {quoted(name)}: shard {quoted(shard)} {fault}",
                hint="An index may name files in its own folder only.",
            )
    _check_presence(path, frozenset(weight_map.values()))
    return ShardIndex(MappingProxyType(weight_map), MappingProxyType(metadata))


def folder_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Return tensor name → shape of a Hugging Face folder's safetensors files; empty without them.

    Raises CorruptFileError, MissingFileError: see ``read_index`` and ``read_header``.
    """
    index = folder / (MODEL_WEIGHTS[0] + INDEX_SUFFIX)
    names = {MODEL_WEIGHTS[0]} if (folder / MODEL_WEIGHTS[0]).is_file() else set()
    if index.is_file():
        names = set(read_index(index).weight_map.values())
    headers = (read_header(folder / name) for name in sorted(names))
    return {name: spec.shape for header in headers for name, spec in header.tensors.items()}


def check_index(index: ShardIndex, headers: Mapping[str, Collection[str]]) -> None:
    """See that an index and its shards tell the same story.

    Args:
        index: as read from the checkpoint.
        headers: file name to the tensor names in that file, for every shard.

    Raises:
        CorruptFileError: a tensor that is not where the index says, that the index does not
            mention, or that lies in two shards; everything found is in the one message.
    """
    homes: dict[str, list[str]] = defaultdict(list)
    for shard, names in headers.items():
        for name in names:
            homes[name].append(shard)
    absent = [
        f"{quoted(name)} is not in {shard}"
        for name, shard in index.weight_map.items()
        if shard not in homes.get(name, ())
    ]
    unlisted = [
        f"{quoted(name)} in {shards[0]} is not in the index"
        for name, shards in homes.items()
        if name not in index.weight_map
    ]
    doubled = [
        f"{quoted(name)} is in {' and in '.join(shards)}"
        for name, shards in homes.items()
        if len(shards) > 1
    ]
    if faults := [*absent, *unlisted, *doubled]:
        raise CorruptFileError(f"the index and its shards disagree: {_listed(faults)}")


def encode_index(
    weight_map: Mapping[str, str], total_size: int, metadata: Mapping[str, Any]
) -> str:
    """Return an index as text, laid out as Hugging Face libraries write it.

    Args:
        weight_map: tensor name to file name.
        total_size: bytes of tensor data in all shards; replaces the ``total_size`` of ``metadata``.
        metadata: further facts to keep.
    """
    index = {"metadata": {**metadata, "total_size": total_size}, "weight_map": dict(weight_map)}
    return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _file_name_fault(shard: object) -> str | None:
    if not isinstance(shard, str):
        return "is not text"
    if shard in ("", ".", "..") or not _FORBIDDEN.isdisjoint(shard):
        return "is not a plain file name"
    return None


def _check_presence(path: Path, shards: Collection[str]) -> None:
    missing = sorted(shard for shard in shards if not (path.parent / shard).is_file())
    if missing:
        raise MissingFileError(
            f"{path}: {len(missing)} of {len(shards)} shards are missing: {', '.join(missing)}",
            INCOMPLETE_HINT,
        )


def _listed(faults: list[str]) -> str:
    more = f"; and {len(faults) - _SHOWN} more" if len(faults) > _SHOWN else ""
    return "; ".join(faults[:_SHOWN]) + more
