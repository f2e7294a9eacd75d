"""``hf://[models/]ID[@REVISION][/PATH]``: the name of a repository, or of something inside it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from loratools.errors import HubError, OptionError
from loratools.tensorfiles.missing import address_hint, shown

SCHEME = "hf://"
GRAMMAR = "hf://ID[@REVISION][/PATH], where ID is OWNER/NAME"

_REPOSITORY = re.compile(r"[^/\s:]+/[^/\s:@]+(?:@[^/]+)?(?:/.*)?")
_SNAPSHOT = re.compile(r"models--(?P<id>[^/\\]+)[/\\]snapshots[/\\][^/\\]+(?P<path>.*)", re.DOTALL)
"""The place of a repository's files in the cache of the Hub's library."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A model repository on the Hub, or a file or folder in it.

    Attributes:
        text: as the user gave it.
        repo: ``OWNER/NAME``.
        revision: a branch, tag or commit; ``None`` is the main branch.
        path: inside the repository, ``""`` for all of it.
    """

    text: str
    repo: str
    revision: str | None = None
    path: str = ""

    def inside(self, path: str) -> str:
        """Return the reference to another path of the same repository and revision."""
        revision = f"@{self.revision.replace('/', '%2F')}" if self.revision else ""
        return f"{SCHEME}{self.repo}{revision}" + (f"/{path}" if path else "")


def is_reference(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is meant to be on the Hub."""
    return isinstance(path, str) and path.startswith(SCHEME)


def parse_reference(text: str) -> Reference:
    """Take a reference apart, by the grammar of the Hub's own library.

    Raises:
        HubError: not of the grammar, or something other than a model repository.
    """
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    try:
        found = parse_hf_uri(text)
    except HfUriError as error:
        raise HubError(f"{text}: {error.msg.strip()}", f"write {GRAMMAR}") from error
    if found.type != "model":
        raise HubError(f"{text}: a {found.type}, not a model repository", f"write {GRAMMAR}")
    parts = found.path_in_repo.strip("/")
    if ".." in PurePosixPath(parts).parts:
        raise HubError(f"{text}: a path inside a repository has no ..", f"write {GRAMMAR}")
    return Reference(text, found.id, found.revision, parts)


def parse_repository(text: str) -> Reference:
    """Take ``OWNER/NAME`` or a reference, with or without ``hf://``; raises HubError."""
    if is_reference(text):
        return parse_reference(text)
    if not _REPOSITORY.fullmatch(text):
        hint = address_hint(text) or f"write OWNER/NAME, or {GRAMMAR}"
        raise HubError(f"{shown(text)}: not a name of a repository", hint)
    return parse_reference(SCHEME + text)


def with_revision(reference: Reference, revision: str | None) -> Reference:
    """Return a reference at the revision that an option names; OptionError for two of them."""
    if revision is None:
        return reference
    if reference.revision not in (None, revision):
        raise OptionError(
            f"{reference.text} says revision {reference.revision}, and --revision {revision}",
            hint="say one of them",
        )
    return replace(reference, revision=revision)


def reference_at(text: str, revision: str | None) -> str:
    """Return ``OWNER/NAME`` or a reference as a reference, at a revision if that is named.

    What is no name of a repository is returned with the scheme, for whoever parses it to refuse.
    """
    try:
        found = parse_repository(text)
    except HubError:
        return text if is_reference(text) else SCHEME + text
    return replace(found, revision=revision or found.revision).inside(found.path)


def repository_of(path: str | os.PathLike[str]) -> str | None:
    """Return ``OWNER/NAME`` for a path inside the Hub's cache, or ``None`` for any other."""
    match = _SNAPSHOT.search(str(path))
    return match["id"].replace("--", "/", 1) if match else None


def plain_name(path: str | os.PathLike[str]) -> str:
    """Return the last word of a path; a whole repository in the cache has the repository's."""
    match = _SNAPSHOT.search(str(path))
    if match and not match["path"].strip("/\\"):
        return match["id"].rpartition("--")[2]
    return Path(path).name
