"""Large files, fetched so that a run that breaks off, or is killed, is taken up where it broke.

The Hub's library writes to a file of a random name, which nobody finds again after a kill. Here
the name is that of the content, ``SHA256.loratools.incomplete``; complete and with the right hash,
it becomes the blob that the library would have made, and the library does the rest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path

from loratools.errors import CorruptFileError
from loratools.hub.listing import Listing
from loratools.hub.parts import LargeFile, NoRangesError

LARGE = 32 * 2**20
"""Bytes; smaller files are the library's business from beginning to end."""

_SHA256 = re.compile(r"[0-9a-f]{64}")
_CHUNK = 2**20


def fetch_to_cache(listing: Listing, names: Iterable[str]) -> None:
    """Put the large ones of some files where the Hub's library looks for them before it fetches.

    Raises:
        CorruptFileError: other bytes came than the Hub promised.
    """
    from huggingface_hub import constants
    from huggingface_hub.file_download import are_symlinks_supported, repo_folder_name
    from huggingface_hub.utils import WeakFileLock

    cache = Path(constants.HF_HUB_CACHE)
    folder = repo_folder_name(repo_id=listing.reference.repo, repo_type="model")
    for name in _large(listing, names):
        if cached(listing, name) or _is_shared(listing, name, cache):
            continue
        file = LargeFile(listing, name)
        if not _SHA256.fullmatch(file.etag):
            continue
        # The library's own lock: who fetches the same file waits, and finds it.
        lock = cache / ".locks" / folder / f"{file.etag}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        blob = cache / folder / "blobs" / file.etag
        with WeakFileLock(lock):
            if blob.exists() or not _fetch(file, blob):
                continue
            if not are_symlinks_supported(cache):
                pointer = cache / folder / "snapshots" / str(listing.commit) / name
                pointer.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(blob, pointer)


def fetch_to_folder(listing: Listing, names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Return where the large ones of some files are now: in ``folder``, or in the cache.

    A file for which the Hub knows no hash, or gives no parts, is left out.
    """
    found: dict[str, Path] = {}
    for name in _large(listing, names):
        if place := cached(listing, name):
            found[name] = place
            continue
        file = LargeFile(listing, name)
        blob = folder / file.etag
        if _SHA256.fullmatch(file.etag) and (blob.exists() or _fetch(file, blob)):
            found[name] = blob
    return found


def cached(listing: Listing, name: str) -> Path | None:
    """Return where a file of a listing is in the cache, if it is."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(listing.reference.repo, name, revision=listing.commit)
    return Path(found) if isinstance(found, str) else None


def _large(listing: Listing, names: Iterable[str]) -> list[str]:
    return [name for name in names if listing.files[name] >= LARGE]


def _is_shared(listing: Listing, name: str, cache: Path) -> bool:
    """Return whether the library would link the file to that of another repository."""
    from huggingface_hub import hf_hub_download

    if not (cache / "blobs").is_dir():
        return False
    repo = listing.reference.repo
    return not hf_hub_download(repo, name, revision=listing.commit, dry_run=True).will_download


def _fetch(file: LargeFile, target: Path) -> bool:
    """Make ``target`` out of what an earlier run left and the rest; returns whether it can be."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.loratools.incomplete")
    begun = partial.exists() and partial.stat().st_size > 0
    try:
        right = _fill(file, partial)
        if begun and not right:
            partial.unlink()
            right = _fill(file, partial)
    except NoRangesError:
        partial.unlink(missing_ok=True)
        return False
    if not right:
        partial.unlink()
        raise CorruptFileError(
            f"{file.text}: the bytes that came are not those that the Hub names by their hash",
            hint="try again; a proxy or mirror may change files on their way",
        )
    try:
        partial.replace(target)
    except FileNotFoundError:
        # Where locks do not hold, another process wrote the same bytes and was the first.
        if not target.exists():
            raise
    return True


def _fill(file: LargeFile, partial: Path) -> bool:
    """Write what is missing; returns whether the whole has the hash that it must have."""
    from huggingface_hub.utils import tqdm

    digest, size = hashlib.sha256(), 0
    # Bytes are written at their place, not appended: two writers would write the same.
    with open(partial, "r+b", opener=lambda path, flags: os.open(path, flags | os.O_CREAT)) as out:
        while chunk := out.read(_CHUNK):
            digest.update(chunk)
            size += len(chunk)
        if size > file.size:
            return False
        name = file.text.rpartition("/")[2][-40:]
        with (
            tqdm(  # type: ignore[no-untyped-call]
                desc=name, total=file.size, initial=size, unit="B", unit_scale=True
            ) as bar,
            closing(file.from_byte(size)) as parts,
        ):
            for data in parts:
                out.write(data)
                out.flush()
                digest.update(data)
                bar.update(len(data))
    return digest.hexdigest() == file.etag
