"""Sketches: files that have a remote file's header and size, and none of its weights.

Whoever reads headers alone reads them as if they were the files. Weights are holes, which take no
room on file systems that know holes; a mark beside them says that numbers are not to be believed.
"""

from __future__ import annotations

import tempfile
from contextlib import ExitStack
from pathlib import Path, PurePosixPath

from loratools.hub.choosing import Choice, choose_adapter, choose_model, may_be_adapter
from loratools.hub.fetching import complete, fetch_choice, fetch_files, is_cached
from loratools.hub.listing import Listing, list_files
from loratools.hub.ranges import RemoteFile, first_bytes, get_ranges, join_ranges, remote_file
from loratools.hub.references import Reference
from loratools.tensorfiles.file_names import ADAPTER_CONFIG, INDEX_SUFFIX, PIPELINE_INDEX
from loratools.tensorfiles.header import TensorSpec, read_header

MARK = ".loratools-sketch"
_READ = ("config.json", ADAPTER_CONFIG, PIPELINE_INDEX)
"""Small files that say what the weights are."""

_FEW = 8
"""Numbers in a tensor that is fetched even so: an alpha, a scale."""

_STATE_BYTES = 4096
"""The same for what bitsandbytes says of a weight."""

_MOST_REQUESTS = 256
"""Beyond it, an adapter is fetched whole: it comes sooner than so many answers."""

_OF_ADAPTERS = ("alpha", "scalar")

_SKETCHED = (".safetensors", ".gguf")


def is_sketch(path: Path) -> bool:
    """Return whether a file or folder is a sketch, or in one."""
    return any((folder / MARK).is_file() for folder in (path, *path.parents))


def sketch_model(reference: Reference, stack: ExitStack) -> Path:
    """Return a sketch of the model or pipeline that a reference means.

    It is gone when ``stack`` closes. What is in the cache whole is not sketched.

    Raises:
        HubError: see ``fetching.fetch_model``.
    """
    listing = list_files(reference)
    return _sketch(listing, complete(listing, choose_model(listing)), stack)


def sketch_anything(reference: Reference, stack: ExitStack) -> Path:
    """Return a sketch of the adapter, model or pipeline that a reference means; see above."""
    listing = list_files(reference)
    if may_be_adapter(listing):
        return _sketch(listing, choose_adapter(listing), stack)
    return _sketch(listing, complete(listing, choose_model(listing)), stack)


def _sketch(listing: Listing, choice: Choice, stack: ExitStack) -> Path:
    plain = any(not name.endswith(_SKETCHED) for name in choice.weights)
    if listing.commit is None or plain or is_cached(listing, choice.files):
        return fetch_choice(listing, choice)
    root = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="loratools-")))
    (root / MARK).touch()
    for name in choice.files:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if name not in choice.weights:
            # Counted, and read only if it is among those below.
            target.touch()
        elif not _sketch_file(remote_file(listing, name), target):
            return fetch_choice(listing, choice)
    told = [name for name in choice.files if PurePosixPath(name).name in _READ]
    told += [name for name in choice.files if name.endswith(INDEX_SUFFIX)]
    if told:
        _copy(fetch_files(listing, told), root, told)
    return root / choice.root if choice.root else root


def _copy(source: Path, root: Path, names: list[str]) -> None:
    for name in names:
        (root / name).write_bytes((source / name).read_bytes())


def _sketch_file(file: RemoteFile, target: Path) -> bool:
    """Write a sketch of a file; returns whether that is possible in a few requests."""
    head = first_bytes(file)
    with target.open("wb") as sketch:
        sketch.write(head)
        sketch.truncate(file.size)
    if target.suffix != ".safetensors":
        return True
    told = [spec for spec in read_header(target).tensors.values() if _is_told(spec)]
    ranges = join_ranges((spec.start, spec.stop) for spec in told)
    if len(ranges) > _MOST_REQUESTS:
        # A scale for each weight of a model says nothing about names and shapes.
        return not any(word in spec.name for spec in told for word in _OF_ADAPTERS)
    with target.open("r+b") as sketch:
        for start, data in get_ranges(file, ranges):
            sketch.seek(start)
            sketch.write(data)
    return True


def _is_told(spec: TensorSpec) -> bool:
    """Return whether a small tensor says how the others are to be read."""
    if "quant_state" in spec.name:
        return 0 < spec.nbytes <= _STATE_BYTES
    return 0 < spec.elements <= _FEW
