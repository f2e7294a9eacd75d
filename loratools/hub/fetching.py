"""Fetching what a reference means into the Hub's cache, and no more than that."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from loratools.errors import CorruptFileError
from loratools.hub.choosing import Choice, choose_adapter, choose_model, with_shards
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


def fetch_choice(listing: Listing, choice: Choice) -> Path:
    """Fetch what was chosen; returns the place of its root in the cache."""
    root = fetch_files(listing, choice.files)
    return root / choice.root if choice.root else root


def complete(listing: Listing, choice: Choice) -> Choice:
    """Return a choice with the shards that its indexes name; the indexes are fetched."""
    if not choice.indexes:
        return choice
    root = fetch_files(listing, choice.indexes)
    return with_shards(choice, (name for i in choice.indexes for name in _shards(root, i)))


def fetch_files(listing: Listing, names: Iterable[str]) -> Path:
    """Fetch files of a repository into the cache; returns the folder that stands for it.

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
                )
            )
        )


def _shards(root: Path, index: str) -> list[str]:
    file = root / index
    try:
        named = json.loads(file.read_text(encoding="utf-8"))["weight_map"].values()
        shards = sorted(set(named))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{file}: not an index of shards", "its owner can mend it") from error
    folder = PurePosixPath(index).parent
    return [str(folder / name) for name in shards]
