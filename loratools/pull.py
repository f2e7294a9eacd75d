"""Fetching a repository, or a part of it, out of the Hub's cache layout into plain files."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools.errors import OutputError
from loratools.hub.fetching import check_access, fetch_files, fetch_past_cache, is_cached
from loratools.hub.listing import Listing, list_files
from loratools.hub.references import Reference, parse_repository, with_revision
from loratools.hub.workplace import alone_in
from loratools.report import Json, Note, Report
from loratools.tensorfiles.atomic import require_space, staged_output
from loratools.tensorfiles.destination import check_destination, settled

PathLike = str | os.PathLike[str]

_FROM_CACHE = (
    "the Hub is out of reach: these are the files that the cache has of the repository, which may "
    "hold more"
)


def pull_from_hub(
    repo_id: str,
    output: PathLike,
    *,
    revision: str | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Report:
    """Write a repository's files, or the file or folder that a reference names, to ``output``.

    A run that breaks off leaves what it has in a hidden folder beside ``output``, and the next one
    goes on from there; ``output`` itself is complete or absent.

    Args:
        repo_id: ``OWNER/NAME``, or ``hf://OWNER/NAME[@REVISION][/PATH]``.
        output: a folder; a file if the reference names one.
        revision: a branch, tag or commit.
        overwrite: replace an existing output.
        dry_run: list and check, fetch nothing.

    Raises:
        HubError: no such repository, revision or path; no access; no answer.
        OptionError: two revisions.
        OutputError: the destination is refused.
    """
    reference = with_revision(parse_repository(repo_id), revision)
    listing = list_files(reference)
    target = Path(output)
    folder = not listing.is_file
    if not folder:
        _refuse_folder(output, reference)
    check_destination(target, folder=folder, overwrite=overwrite)
    require_space(target.parent, sum(listing.files[name] for name in listing.below))
    check_access(listing, listing.below)
    report = _report(listing, None if dry_run else str(output))
    if dry_run:
        return report
    work = _work_folder(target)
    with alone_in(work, target):
        found = _fetch(listing, work)
        with staged_output(target, folder=folder, overwrite=overwrite) as staged:
            _place(listing, found, staged, work)
    return report


def _refuse_folder(output: PathLike, reference: Reference) -> None:
    """Raise OutputError if a folder is named for what is one file."""
    text = str(output)
    if text.endswith(("/", os.sep)) or Path(text).is_dir():
        place = Path(text) / reference.path.rpartition("/")[2]
        raise OutputError(f"{text}: a folder, and {reference.text} is one file", f"say -o {place}")


def _work_folder(target: Path) -> Path:
    place = settled(target)
    return place.parent / f".{place.name}.loratools-pull"


def _fetch(listing: Listing, work: Path) -> dict[str, Path]:
    """Return where each file is: in the cache, or in ``work`` where it is fetched to."""
    if listing.commit is None or is_cached(listing, listing.below):
        root = fetch_files(listing, listing.below)
        return {name: root / name for name in listing.below}
    return fetch_past_cache(listing, listing.below, work)


def _place(listing: Listing, found: Mapping[str, Path], staged: Path, work: Path) -> None:
    """Move or copy what was fetched, without the path that leads to it in the repository."""
    start = len(listing.reference.path) + 1 if listing.reference.path else 0
    times = Counter(found.values())
    for name, source in found.items():
        target = staged if listing.is_file else staged / name[start:]
        target.parent.mkdir(parents=True, exist_ok=True)
        # Two names of the same content are one file there.
        times[source] -= 1
        if work in source.parents and not times[source]:
            source.replace(target)
        else:
            shutil.copyfile(source, target)


def _report(listing: Listing, output: str | None) -> Report:
    items: Sequence[dict[str, Json]] = [
        {"file": name, "bytes": listing.files[name]} for name in listing.below
    ]
    facts: dict[str, Json] = {
        "repository": listing.reference.repo,
        "revision": listing.reference.revision,
        "commit": listing.commit,
        "files": len(items),
        "bytes": sum(item["bytes"] for item in items),
    }
    text = listing.reference.text
    notes = () if listing.commit else (Note(_FROM_CACHE, "warning"),)
    return Report("pull", (text,), output, facts, tuple(items), notes, dry_run=output is None)
