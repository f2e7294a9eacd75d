"""Files that ``torch.save`` wrote (.bin, .pt, .pth, .ckpt), read without running what is inside."""

from __future__ import annotations

import pickle
import re
import struct
import warnings
import zipfile
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from loratools.errors import CorruptFileError, UnsupportedError
from loratools.tensorfiles.impostors import (
    FIRST_BYTES,
    TORCH_SAVED,
    not_what_it_says,
    recognise,
)
from loratools.tensorfiles.inputs import INCOMPLETE_HINT, open_input, quoted

_ZIP_MAGIC = b"PK\x03\x04"
_CONVERT_HINT = "Ask for a safetensors version of the file, or convert it where you trust it."
_GLOBAL = re.compile(r"GLOBAL (\S+)")

# The restricted unpickler lets whatever damaged bytes provoke escape.
_DAMAGE = (
    pickle.UnpicklingError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    AssertionError,
    struct.error,
    OverflowError,
    MemoryError,
)


def load_torch(path: Path) -> dict[str, torch.Tensor]:
    """Load a dict of tensors; a ``state_dict`` wrapped in a dict without tensors is unwrapped.

    Zip files are memory-mapped as in ``safetensors.load_tensors``, unless their entries are
    compressed; the older format is read into memory. Nothing but tensors and plain containers is
    ever unpickled.

    Returns:
        Dense CPU tensors by name, in the order of the file; none requires gradients.

    Raises:
        MissingFileError: there is no such file.
        CorruptFileError: the file is truncated or damaged, or nothing that torch.save wrote.
        UnsupportedError: it holds code, or something else than dense tensors by name.
    """
    if path.suffix == ".safetensors":
        # torch.load goes by this name, whatever the file holds.
        raise UnsupportedError(f"{path}: named as a safetensors file", "Name it .bin or .pt.")
    with open_input(path) as file:
        head = file.read(FIRST_BYTES)
    sizes = _stored_sizes(path) if head.startswith(_ZIP_MAGIC) else None
    try:
        with warnings.catch_warnings():
            # Said of what is refused, or read all the same.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=sizes is not None)
    except _DAMAGE as error:
        raise _explained(path, error, head) from error
    tensors = {name: _plain(path, name, item) for name, item in _named(path, value).items()}
    if sizes is not None:
        _check_storages(path, tensors.values(), sizes)
    return tensors


def _stored_sizes(path: Path) -> Counter[int] | None:
    """Return the sizes in bytes of a zip file's entries, or None if some are compressed.

    Mapping a compressed entry would take its compressed bytes for numbers, without an error.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error) as error:
        raise CorruptFileError(f"{path}: damaged zip file: {error}", INCOMPLETE_HINT) from error
    if any(entry.filename.endswith("/constants.pkl") for entry in entries):
        raise UnsupportedError(f"{path}: is a TorchScript program, not tensors", _CONVERT_HINT)
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        return None
    return Counter(entry.file_size for entry in entries)


def _check_storages(path: Path, tensors: Iterable[torch.Tensor], sizes: Counter[int]) -> None:
    """Refuse storages that are larger than their entries: they would show the next entry."""
    storages = {storage.data_ptr(): storage.nbytes() for storage in map(_storage, tensors)}
    storages.pop(0, None)
    if not Counter(storages.values()) <= sizes:
        raise CorruptFileError(f"{path}: tensors and zip entries differ in size", INCOMPLETE_HINT)


def _storage(tensor: torch.Tensor) -> torch.UntypedStorage:
    return tensor.untyped_storage()


def _explained(
    path: Path, error: BaseException, head: bytes
) -> CorruptFileError | UnsupportedError:
    if found := _GLOBAL.search(str(error)):
        return UnsupportedError(
            f"{path}: contains {found[1]}, which could run code and is not loaded", _CONVERT_HINT
        )
    if (known := recognise(head)) and known.what != TORCH_SAVED:
        return not_what_it_says(path, TORCH_SAVED, head, "")
    return CorruptFileError(
        f"{path}: not {TORCH_SAVED}, or a truncated or damaged one ({type(error).__name__})",
        INCOMPLETE_HINT,
    )


def _named(path: Path, value: Any) -> Mapping[str, Any]:
    """Return the mapping that should hold the tensors."""
    if not isinstance(value, dict):
        raise UnsupportedError(
            f"{path}: holds a {type(value).__name__}, not tensors by name", _CONVERT_HINT
        )
    inner = value.get("state_dict")
    others = (item for key, item in value.items() if key != "state_dict")
    if isinstance(inner, dict) and not any(isinstance(item, torch.Tensor) for item in others):
        return inner
    return value


def _plain(path: Path, name: Any, item: Any) -> torch.Tensor:
    where = f"{path}: entry {quoted(name)}"
    if not isinstance(name, str):
        raise UnsupportedError(f"{where} is not named by text", _CONVERT_HINT)
    if not isinstance(item, torch.Tensor):
        raise UnsupportedError(f"{where} is a {type(item).__name__}, not a tensor", _CONVERT_HINT)
    if item.layout != torch.strided or item.is_meta or item.is_quantized:
        raise UnsupportedError(f"{where} is not a dense tensor with data", _CONVERT_HINT)
    return item.detach()
