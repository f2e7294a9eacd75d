"""Adapters from and to disk: the only module that joins a path to a format."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from loratools.adapter import Adapter
from loratools.errors import CorruptFileError, InputError, MissingFileError, UnsupportedError
from loratools.formats import detect_format, get_format
from loratools.formats.activated import refuse_activated
from loratools.formats.format import Bundle, Format, Listing
from loratools.formats.gguf_file import is_gguf, load_gguf, rounded_to, save_bundle
from loratools.formats.kohya_metadata import with_hashes
from loratools.held import held_bundle, hold, is_held
from loratools.hub.taking import takes_references
from loratools.tensorfiles.atomic import staged_output
from loratools.tensorfiles.file_names import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    INDEX_SUFFIX,
    MODEL_MARKS,
    MODEL_WEIGHTS,
    TORCH_SUFFIXES,
)
from loratools.tensorfiles.missing import no_such_path, other_contents
from loratools.tensorfiles.safetensors import load_tensors, save_tensors
from loratools.tensorfiles.torch_zip import load_torch

_SHOWN = 8


def load_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Read the adapter at ``path``: a file, or a folder that holds exactly one.

    Tensors are memory-mapped; nothing is computed. Alpha is explicit in every layer, ``down`` is
    (rank, in[, k, k]), ``up`` is (out, rank[, 1, 1]), and dtypes are those of the file.

    Args:
        path: a file or folder in any format, or an ``hf://`` reference.

    Raises:
        MissingFileError: nothing there, or no weights in the folder.
        UnknownFormatError: the file is in no known adapter format.
        MalformedAdapterError, UnsupportedError: see the format.
    """
    return open_adapter(path)[1]


@takes_references(path="adapter")
def open_adapter(
    path: str | os.PathLike[str], *, activated: bool = False
) -> tuple[Format, Adapter]:
    """Read the adapter at ``path`` and say in which format it was; see ``load_adapter``.

    ``activated``: take an adapter that acts only after certain tokens too (aLoRA).
    """
    bundle = held_bundle(path) or load_bundle(find_weights(Path(path)), source=str(path))
    _refuse_complex(bundle, str(path))
    listing = Listing(
        {name: tuple(tensor.shape) for name, tensor in bundle.tensors.items()},
        bundle.metadata,
        bundle.sidecars,
    )
    found = detect_format(listing, str(path))
    adapter = found.read(bundle)
    if not activated:
        refuse_activated(adapter.metadata, str(path))
    return found, adapter


def _refuse_complex(bundle: Bundle, source: str) -> None:
    """Raise UnsupportedError for complex numbers, half of which float32 would drop."""
    for name, tensor in bundle.tensors.items():
        if tensor.is_complex():
            raise UnsupportedError(
                f"{source}: {name} holds complex numbers, which no adapter's change is made of",
                hint="is this an adapter's weights file? Save it with real factors",
            )


def save_adapter(
    adapter: Adapter,
    path: str | os.PathLike[str],
    *,
    format: str = "peft",  # noqa: A002 - the word of the command line and the Hub
    overwrite: bool = False,
    storage: str | None = None,
) -> None:
    """Write ``adapter`` to ``path`` in ``format``, atomically.

    Hashes in the metadata are those of the bytes that are written.

    Args:
        adapter: its module paths in the format's own names; ``convert_adapter`` translates them.
        path: the file itself if the format is a single file, or if it ends in ``.safetensors``
            and the format needs no side files; else a folder.
        format: the format's name.
        overwrite: replace an existing output.
        storage: ``q8_0`` for a GGUF file of 8 bits, where rows are whole blocks of 32.

    Raises:
        OptionError: unknown format or storage.
        UnsupportedError: the format cannot hold the adapter.
        OutputError: ``path`` exists and ``overwrite`` is false.
    """
    chosen = get_format(format)
    bundle = chosen.write(adapter)
    if is_held(path):
        hold(path, _as_read(bundle, storage))
        return
    target = Path(path)
    alone = target.suffix == ".safetensors" and not bundle.sidecars
    inside = None if alone else chosen.weights_file
    with staged_output(target, folder=inside is not None, overwrite=overwrite) as work:
        weights = work / inside if inside else work
        if chosen.container == "gguf":
            save_bundle(weights, bundle, storage)
        else:
            save_tensors(weights, bundle.tensors, with_hashes(bundle.metadata, bundle.tensors))
        for name, text in bundle.sidecars.items():
            (weights.parent / name).write_text(text, encoding="utf-8")


def _as_read(bundle: Bundle, storage: str | None) -> Bundle:
    """Return what reading the file would give: hashes of the tensors, values as they are stored."""
    stored = rounded_to(bundle, storage)
    return replace(stored, metadata=with_hashes(stored.metadata, stored.tensors))


def find_weights(path: Path) -> Path:
    """Return the weights file that ``path`` means; raises MissingFileError, InputError.

    The name of a value in memory is returned as it is.
    """
    if is_held(path) or path.is_file():
        return path
    if not path.is_dir():
        raise no_such_path(path)
    direct = [path / name for name in ADAPTER_WEIGHTS if (path / name).is_file()]
    if direct:
        return direct[0]
    nested = _nested_weights(path)
    if len(nested) == 1:
        return nested[0]
    if nested:
        raise _several(path, [found.parent for found in nested])
    return _only_file(path)


def _nested_weights(path: Path) -> list[Path]:
    """Return the weights of sub-folders: where PEFT puts adapters not called ``default``."""
    folders = sorted(child for child in path.iterdir() if child.is_dir())
    found = []
    for folder in folders:
        names = [folder / name for name in ADAPTER_WEIGHTS if (folder / name).is_file()]
        found += names[:1]
    return found


def _only_file(path: Path) -> Path:
    """Return the one weights file of a folder that is no model's.

    Raises MissingFileError if there is none, InputError if there are several.
    """
    files = sorted(child for child in path.iterdir() if child.suffix in (".safetensors", ".gguf"))
    marked = [mark for mark in (*MODEL_MARKS, ADAPTER_CONFIG) if (path / mark).is_file()]
    if marked or any(_is_models(child.name) for child in path.iterdir()) or not files:
        raise _no_weights(path)
    if len(files) > 1:
        raise _several(path, files)
    return files[0]


def _is_models(name: str) -> bool:
    return name in MODEL_WEIGHTS or name.endswith(INDEX_SUFFIX)


def _several(path: Path, found: Sequence[Path]) -> InputError:
    names = ", ".join(one.name for one in found[:_SHOWN])
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return InputError(
        f"{path}: holds several adapters ({names}{more})",
        hint=f"name the one that is meant, such as {found[0]}",
    )


def _no_weights(path: Path) -> MissingFileError:
    names = {child.name for child in path.iterdir()}
    if ADAPTER_CONFIG in names:
        hint = "adapter_config.json is here but the weights are not; finish the download"
    elif not names.isdisjoint(MODEL_MARKS) or any(map(_is_models, names)):
        hint = "this looks like a base model; name the adapter's folder or file instead"
    else:
        held = f"an adapter folder holds {ADAPTER_WEIGHTS[0]} or {ADAPTER_WEIGHTS[2]}"
        hint = other_contents(path) or held
    return MissingFileError(f"{path}: no adapter weights in this folder", hint=hint)


def load_bundle(weights: Path, source: str) -> Bundle:
    """Read a weights file and the side files that formats look at."""
    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    if weights.suffix in TORCH_SUFFIXES:
        tensors, metadata = load_torch(weights), {}
    elif is_gguf(weights):
        return load_gguf(weights, source)
    else:
        tensors, metadata = load_tensors(weights)
    sidecars = {
        name: _read_text(weights.parent / name)
        for name in (ADAPTER_CONFIG,)
        if (weights.parent / name).is_file()
    }
    return Bundle(tensors, metadata, sidecars, source)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CorruptFileError(
            f"{path}: not UTF-8 text ({error.reason} at byte {error.start})",
            hint="save it again as UTF-8",
        ) from error
