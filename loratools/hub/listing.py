"""What is in a repository at a revision, asked of the Hub or, out of its reach, of the cache."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.errors import HubError
from loratools.hub.client import hub_api, persistently
from loratools.hub.failures import hub_errors, is_unreachable
from loratools.hub.references import Reference
from loratools.tensorfiles.inputs import quoted

_OF_THE_REPOSITORY = frozenset({".gitattributes", ".gitignore"})
"""Files about the repository, which are no part of what is in it."""


_UNSAFE = re.compile(r"[A-Za-z]:|.*[\\\0]", re.DOTALL)
"""Drive letters, and other systems' separators."""


@dataclass(frozen=True, slots=True)
class Listing:
    """A repository's files.

    Attributes:
        reference: what was asked for.
        files: path in the repository → size in bytes, of the whole repository.
        commit: the commit that the revision means now, or ``None`` where the cache answered.
        cached: then the commit that the cache has.
        gated: whether the files open only to those whom the owner admits.
    """

    reference: Reference
    files: Mapping[str, int]
    commit: str | None
    cached: str | None = None
    gated: bool = False

    @property
    def is_file(self) -> bool:
        """Whether the reference's path is one file."""
        return self.reference.path in self.files

    @property
    def below(self) -> tuple[str, ...]:
        """The files in the folder that the reference means, or the one file itself."""
        path = self.reference.path
        if not path or self.is_file:
            return (path,) if path else tuple(self.files)
        return tuple(name for name in self.files if name.startswith(f"{path}/"))


def list_files(reference: Reference) -> Listing:
    """Return what is in a repository; the reference's path is seen to be there.

    Raises:
        HubError: no such repository, revision or path; no access; no answer and nothing cached.
    """
    with hub_errors(reference.text):
        try:
            listing = _ask(reference)
        except Exception as error:
            if not is_unreachable(error):
                raise
            listing = _look_in_cache(reference, error)
    if not listing.below:
        raise _no_such_path(listing)
    return listing


def _ask(reference: Reference) -> Listing:
    api = hub_api()

    def ask() -> tuple[Any, list[Any]]:
        found = api.model_info(reference.repo, revision=reference.revision)
        entries = api.list_repo_tree(reference.repo, revision=found.sha, recursive=True)
        return found, list(entries)

    found, entries = persistently(ask)
    files = {
        entry.path: entry.size
        for entry in entries
        if hasattr(entry, "size") and entry.path not in _OF_THE_REPOSITORY
    }
    _refuse_unsafe(reference, files)
    return Listing(reference, files, found.sha, gated=bool(found.gated))


def _refuse_unsafe(reference: Reference, names: Iterable[str]) -> None:
    """Refuse names that would lead out of the folder that they are written to."""
    for name in names:
        parts = name.split("/")
        if not {"", ".", ".."}.isdisjoint(parts) or _UNSAFE.match(name):
            raise HubError(
                f"{reference.text}: holds a file with the unsafe name {quoted(name)}",
                hint="do not use this repository",
            )


def _look_in_cache(reference: Reference, error: Exception) -> Listing:
    """Return what the cache holds of a repository; raises ``error`` if it holds nothing."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        # No file is named so that a part of the repository is enough.
        found = snapshot_download(
            reference.repo,
            revision=reference.revision,
            local_files_only=True,
            allow_patterns=["."],
        )
    except LocalEntryNotFoundError:
        raise error from None
    root = Path(found)
    files = {
        path.relative_to(root).as_posix(): path.stat().st_size
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name not in _OF_THE_REPOSITORY
    }
    return Listing(reference, files, None, root.name)


def _no_such_path(listing: Listing) -> HubError:
    reference = listing.reference
    if not reference.path:
        return HubError(
            f"{reference.text}: an empty repository", "check the name; push something first"
        )
    folders = {
        name.rsplit("/", depth)[0]
        for name in listing.files
        for depth in range(1, name.count("/") + 1)
    }
    names = [*listing.files, *sorted(folders)]
    close = difflib.get_close_matches(reference.path, names, n=3, cutoff=0.5)
    words = ", ".join(close or names[:5])
    return HubError(
        f"{reference.text}: {reference.repo} has no {reference.path}",
        f"{'did you mean' if close else 'it holds'} {words}",
    )
