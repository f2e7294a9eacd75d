"""Fetching what a reference means into the Hub's cache, and no more than that."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from loratools.errors import CorruptFileError
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


def fetch_files(listing: Listing, names: Iterable[str], into: Path | None = None) -> Path:
    """Fetch files of a repository into the cache; returns the folder that stands for it.

    With ``into``, they are fetched there, past the cache.

    Files that are there are not fetched again; a connection that breaks is taken up where it broke.

    Raises:
        HubError: the Hub does not give them, or they are in the cache neither.
    """
    from huggingface_hub import snapshot_download

    reference = listing.reference
    patterns = [name.translate(_GLOB) for name in names]
    with hub_errors(reference.text), progress_bars():
        return Path(
            persistently(
                lambda: snapshot_download(
                    reference.repo,
                    revision=reference.revision,
                    allow_patterns=patterns,
                    local_files_only=listing.commit is None,
                    local_dir=into,
                )
            )
        )


def is_cached(listing: Listing, names: Iterable[str]) -> bool:
    """Return whether files of a listing are in the cache."""
    from huggingface_hub import try_to_load_from_cache

    repo, commit = listing.reference.repo, listing.commit
    found = (try_to_load_from_cache(repo, name, revision=commit) for name in names)
    return all(isinstance(place, str) for place in found)


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
