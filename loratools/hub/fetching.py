"""Fetching what a reference means into the Hub's cache, and no more than that."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from loratools.errors import CorruptFileError, HubError
from loratools.hub.choosing import (
    Choice,
    choose_adapter,
    choose_model,
    may_be_adapter,
    side_files,
    with_shards,
)
from loratools.hub.client import persistently, progress_bars
from loratools.hub.failures import hub_errors
from loratools.hub.listing import Listing, list_files
from loratools.hub.references import Reference
from loratools.hub.resuming import cached, fetch_to_cache, fetch_to_folder

BLOBS = ".loratools-blobs"
"""Where large files are kept by their hashes, in a folder that files are fetched to."""

_GLOB = str.maketrans({"[": "[[]", "?": "[?]", "*": "[*]"})


def fetch_adapter(reference: Reference) -> Path:
    """Return where the adapter that a reference means is in the cache, fetched if need be.

    Raises:
        HubError: see ``list_files``, ``choose_adapter`` and ``fetch_files``.
    """
    listing = list_files(reference)
    return fetch_choice(listing, choose_adapter(listing))


def fetch_model(reference: Reference) -> Path:
    """Return where the model or pipeline that a reference means is in the cache; see above."""
    listing = list_files(reference)
    return fetch_choice(listing, complete(listing, choose_model(listing)))


def fetch_anything(reference: Reference) -> Path:
    """Return where the adapter, model or pipeline that a reference means is in the cache."""
    listing = list_files(reference)
    if may_be_adapter(listing):
        return fetch_choice(listing, choose_adapter(listing))
    return fetch_choice(listing, complete(listing, choose_model(listing)))


def fetch_side_files(reference: Reference) -> Path:
    """Return where a model's config, tokenizer and the like are in the cache; see above."""
    listing = list_files(reference)
    names = (reference.path,) if listing.is_file else side_files(listing)
    return fetch_choice(listing, Choice(reference.path, names, ()))


def fetch_file(reference: Reference) -> Path:
    """Return where the one file that a reference names is in the cache; see above."""
    listing = list_files(reference)
    if not listing.is_file:
        raise HubError(
            f"{reference.text}: a repository or folder, where one file is wanted",
            hint=f"name a file in it: {reference.inside(listing.below[0])}",
        )
    return fetch_choice(listing, Choice(reference.path, (reference.path,), ()))


def fetch_choice(listing: Listing, choice: Choice) -> Path:
    """Fetch what was chosen; returns the place of its root in the cache."""
    root = fetch_files(listing, choice.files)
    return root / choice.root if choice.root else root


def complete(listing: Listing, choice: Choice) -> Choice:
    """Return a choice with the shards that its indexes name; the indexes are fetched."""
    if not choice.indexes:
        return choice
    root = fetch_files(listing, choice.indexes)
    shards = [name for index in choice.indexes for name in _shards(root, index)]
    if missing := [name for name in shards if name not in listing.files]:
        raise CorruptFileError(
            f"{listing.reference.text}: the index names {len(missing)} files that are not there: "
            f"{', '.join(map(repr, missing[:4]))}",
            hint="the repository is not complete; its owner can mend it",
        )
    return with_shards(choice, shards)


def fetch_files(listing: Listing, names: Iterable[str]) -> Path:
    """Fetch files of a repository into the cache; returns the folder that stands for it.

    Files that are there are not fetched again; a connection that breaks is taken up where it
    broke, and so is a large file of a run that was killed.

    Raises:
        HubError: the Hub does not give them, or they are in the cache neither.
    """
    names = tuple(names)
    with hub_errors(listing.reference.text), progress_bars():
        if listing.commit is not None:
            fetch_to_cache(listing, names)
        return _snapshot(listing, names)


def fetch_past_cache(listing: Listing, names: Iterable[str], folder: Path) -> dict[str, Path]:
    """Fetch files into ``folder``, but what the cache has; returns where each of them is.

    Raises:
        HubError: the Hub does not give them.
    """
    names = tuple(names)
    with hub_errors(listing.reference.text), progress_bars():
        found = fetch_to_folder(listing, names, folder / BLOBS)
        rest = [name for name in names if name not in found]
        if rest:
            _snapshot(listing, rest, folder)
    return found | {name: folder / name for name in rest}


def _snapshot(listing: Listing, names: Iterable[str], folder: Path | None = None) -> Path:
    """Let the Hub's library fetch files, into the cache or a folder."""
    from huggingface_hub import snapshot_download

    reference = listing.reference
    patterns = [name.translate(_GLOB) for name in names]
    return Path(
        persistently(
            lambda: snapshot_download(
                reference.repo,
                revision=reference.revision,
                allow_patterns=patterns,
                local_files_only=listing.commit is None,
                local_dir=folder,
            )
        )
    )


def check_access(listing: Listing, names: Iterable[str]) -> None:
    """See that a gated repository, which anyone may list, opens its files to this user.

    Files that the cache has need no access. Raises HubError.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    lacking = (name for name in names if listing.gated and not cached(listing, name))
    if (name := next(lacking, None)) is not None:
        url = hf_hub_url(listing.reference.repo, name, revision=listing.commit)
        with hub_errors(listing.reference.text):
            persistently(lambda: get_hf_file_metadata(url))


def is_cached(listing: Listing, names: Iterable[str]) -> bool:
    """Return whether files of a listing are in the cache."""
    return all(cached(listing, name) for name in names)


def _shards(root: Path, index: str) -> list[str]:
    file = root / index
    try:
        named = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted(set(named))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(
            f"{file}: not an index of shards", "its owner can mend it"
        ) from error
    folder = PurePosixPath(index).parent
    return [str(folder / name) for name in shards]
