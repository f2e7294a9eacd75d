"""A repository that something is published in: what is there, and the commit that adds to it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loratools.errors import UploadError
from loratools.hub.client import hub_api, persistently, progress_bars
from loratools.hub.failures import hub_errors
from loratools.publishing.card import read_card
from loratools.publishing.contents import CARD, read_card_file
from loratools.report import Json


@dataclass(frozen=True, slots=True)
class There:
    """What the Hub has under a name.

    Attributes:
        exists: whether there is a repository.
        has_revision: whether it has the branch.
        card: the text of its ``README.md`` there, or ``None``.
        private: whether only its owner sees it.
    """

    exists: bool
    has_revision: bool
    card: str | None
    private: bool = False


def check_login(target: str) -> None:
    """See that somebody is logged in; raises UploadError."""
    with hub_errors(target, uploading=True):
        persistently(lambda: hub_api().whoami())


def look_at(target: str, revision: str | None) -> There:
    """Return what is at a repository's revision; raises HubError."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = hub_api()
    with hub_errors(target):
        try:
            found = persistently(lambda: api.model_info(target))
        except GatedRepoError:
            raise
        except RepositoryNotFoundError:
            return There(False, False, None)
        present = revision
        try:
            persistently(lambda: api.model_info(target, revision=revision))
        except RevisionNotFoundError:
            present = None
        try:
            file = hf_hub_download(target, CARD, revision=present)
            text = read_card_file(Path(file))
        except EntryNotFoundError:
            text = None
    return There(True, present == revision, text, bool(found.private))


def check_card(text: str, target: str) -> None:
    """Ask the Hub whether it takes a card; raises UploadError with its reasons."""
    card = read_card(text)
    with hub_errors(target, uploading=True):
        try:
            persistently(card.validate)
        except ValueError as error:
            raise UploadError(
                f"{target}: the Hub refuses the card's metadata: {_reasons(str(error))}",
                hint="mend README.md, or the option that the word comes from",
            ) from error


def _reasons(answer: str) -> str:
    try:
        errors = json.loads(answer)["errors"]
        return "; ".join(str(error["message"]) for error in errors)
    except (ValueError, KeyError, TypeError):
        return answer[:300]


def upload(
    target: str,
    files: Mapping[str, Path | bytes],
    there: There,
    message: str | None,
    revision: str | None,
    *,
    private: bool,
    propose: bool,
) -> dict[str, Json]:
    """Make the repository and the branch if need be, and commit the files; raises UploadError.

    Returns:
        ``commit``, ``url`` and ``pull_request`` for a report.
    """
    from huggingface_hub import CommitOperationAdd

    api = hub_api()
    operations = [
        CommitOperationAdd(name, file if isinstance(file, bytes) else str(file))
        for name, file in sorted(files.items())
    ]
    with hub_errors(target, uploading=True), progress_bars():
        if not there.exists:
            persistently(lambda: api.create_repo(target, private=private, exist_ok=True))
        if revision and not there.has_revision:
            persistently(lambda: api.create_branch(target, branch=revision, exist_ok=True))
        done: Any = api.create_commit(
            target,
            operations,
            commit_message=message or f"Upload {_title(files)} with loratools",
            revision=revision,
            create_pr=propose,
        )
    return {"commit": done.oid, "url": done.commit_url, "pull_request": done.pr_url}


def _title(files: Mapping[str, Path | bytes]) -> str:
    names = [name for name in files if name != CARD]
    return names[0] if len(names) == 1 else f"{len(names)} files"
