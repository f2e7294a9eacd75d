"""Publishing an adapter, a model or a pipeline on the Hub, with a model card."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from loratools.errors import OptionError, UploadError
from loratools.hub.failures import LOG_IN, has_token
from loratools.hub.references import SCHEME, parse_repository, plain_name, with_revision
from loratools.hub.taking import takes_references
from loratools.publishing.card import RELATIONS, CardFacts, completed_card, new_card, read_card
from loratools.publishing.contents import CARD, Contents, read_card_file, read_contents
from loratools.publishing.licences import look_up_base, settle_licence
from loratools.publishing.repository import There, check_card, check_login, look_at, upload
from loratools.publishing.words import BASE_WORDS, repo_id_of
from loratools.report import Json, Note, Report
from loratools.tensorfiles.file_names import ADAPTER_CONFIG

PathLike = str | os.PathLike[str]


@takes_references(path="whole", card="file")
def push_to_hub(  # noqa: PLR0913 - one keyword for each option of the command
    path: PathLike,
    repo_id: str,
    *,
    private: bool = False,
    create_pr: bool = False,
    revision: str | None = None,
    message: str | None = None,
    base_model: Sequence[str] = (),
    license: str | None = None,  # noqa: A002 - the Hub's word
    relation: str | None = None,
    merged: Sequence[tuple[str, float]] = (),
    card: PathLike | None = None,
    allow_conflict: bool = False,
    dry_run: bool = False,
) -> Report:
    """Upload what is at ``path`` to a repository on the Hub, in one commit with its card.

    Everything is checked first: nothing is uploaded, and no repository made, if the base model is
    unknown, licences conflict, nobody is logged in, or the Hub would refuse the card.

    Args:
        path: an adapter of any format, a model or a diffusers pipeline.
        repo_id: ``OWNER/NAME``, or ``hf://OWNER/NAME[@BRANCH]``; made if it does not exist.
        private: make the repository private, if it is made.
        create_pr: propose the change instead of making it.
        revision: the branch to commit to; made if it does not exist.
        message: the commit's.
        base_model: names on the Hub; by default what the files or the card say.
        license: the Hub's identifier; by default the card's, or the base model's.
        relation: ``adapter``, ``merge``, ``quantized`` or ``finetune``; by default as files tell.
        merged: name and strength of each adapter that was merged, for the card.
        card: a Markdown file to use instead of the card that is there.
        allow_conflict: the user answers for a licence that differs from the base model's.
        dry_run: check everything, upload nothing.

    Raises:
        InputError: files that cannot be read; HubError, if the Hub does not answer.
        UploadError: no base model, a conflict of licences, a card that the Hub refuses, no right
            to write.
        OptionError: an unknown relation, two branches, a proposal to a branch that is not there,
            or a path inside the repository.
    """
    target, revision = _target(path, repo_id, revision)
    if relation not in (None, *RELATIONS):
        raise OptionError(f"unknown relation {relation!r}", f"use one of {', '.join(RELATIONS)}")
    contents = read_contents(Path(path))
    if not dry_run:
        check_login(target)
    there = look_at(target, revision)
    if create_pr and revision and not there.has_revision:
        raise OptionError(
            f"{target} has no branch {revision} to propose a change of",
            hint="leave --revision out, or push to it without --create-pr first",
        )
    text = _card_text(card, there, contents)
    bases = _bases(base_model, text, contents)
    stated = {"license": license, "base_model_relation": relation}
    facts, notes = _facts(target, contents, bases, stated, merged, text, allow_conflict)
    words: dict[str, Json] = {key: value for key, value in stated.items() if value}
    words |= {"base_model": bases[0] if len(bases) == 1 else bases} if base_model else {}
    written = completed_card(text, contents, facts, words) if text else new_card(contents, facts)
    check_card(written, target)
    files = {**_with_base(contents, facts), CARD: written.encode()}
    notes += _more_notes(contents, there, private=private, own_card=card is not None)
    report = _report(str(path), target, revision, contents, facts, files, notes)
    if dry_run:
        return replace(report, dry_run=True)
    made = upload(target, files, there, message, revision, private=private, propose=create_pr)
    return replace(report, facts={**report.facts, **made})


def _target(path: PathLike, repo_id: str, revision: str | None) -> tuple[str, str | None]:
    """Return the repository's name and the branch; raises HubError, OptionError."""
    if not Path(path).exists() and Path(repo_id).exists():
        raise OptionError(f"{repo_id}: a path here", "the path comes first, then OWNER/NAME")
    reference = with_revision(parse_repository(repo_id), revision)
    if reference.path:
        raise OptionError(
            f"{repo_id}: a place inside a repository",
            f"say {reference.repo}; files get the names that tools look for",
        )
    return reference.repo, reference.revision


def _card_text(card: PathLike | None, there: There, contents: Contents) -> str | None:
    if card is not None:
        return read_card_file(Path(card))
    return there.card if there.card is not None else contents.local_card


def _bases(given: Sequence[str], text: str | None, contents: Contents) -> list[str]:
    """Return the base models' names: the user's, the card's or the files'."""
    if given:
        unfit = [name for name in given if repo_id_of(name) is None]
        if unfit:
            raise OptionError(f"--base-model {unfit[0]}: not a name on the Hub", "write OWNER/NAME")
        return [str(repo_id_of(name)) for name in given]
    said = getattr(read_card(text).data, "base_model", None) if text else None
    names = [said] if isinstance(said, str) else list(said or ())
    if names or contents.bases:
        return names or list(contents.bases)
    local = next(iter(contents.named_bases), None)
    told = f"; they call it {local!r}, which is no name on the Hub" if local else ""
    raise UploadError(
        f"the base model is not known: the files do not name it{told}",
        hint="say --base-model OWNER/NAME",
    )


def _facts(
    target: str,
    contents: Contents,
    names: Sequence[str],
    stated: Mapping[str, str | None],
    merged: Sequence[tuple[str, float]],
    text: str | None,
    allow_conflict: bool,
) -> tuple[CardFacts, list[Note]]:
    bases = [look_up_base(name) for name in names]
    licence = stated["license"] or _card_licence(text) or contents.license
    unseen = [base.repo for base in bases if not base.found]
    if unseen and licence is None:
        raise UploadError(
            f"the base model {unseen[0]} is not on the Hub, or not visible to you, so its licence "
            "cannot be taken over",
            hint="correct --base-model, or state --license",
        )
    settled = settle_licence(licence, bases, allowed=allow_conflict)
    notes = [Note(settled.note, subject="license")] if settled.note else []
    notes += [Note("not on the Hub, or not visible to you", "warning", name) for name in unseen]
    relation = stated["base_model_relation"] or contents.relation
    if relation is None:
        notes.append(Note("taken for a merge of adapters; --relation says otherwise"))
    made_of = [(plain_name(name), value) for name, value in merged] or contents.made_of
    return CardFacts(target, bases, relation or "merge", settled, made_of), notes


def _card_licence(text: str | None) -> str | None:
    found = getattr(read_card(text).data, "license", None) if text else None
    first = found[0] if isinstance(found, list) and found else found
    return first if isinstance(first, str) else None


def _with_base(contents: Contents, facts: CardFacts) -> dict[str, Path | bytes]:
    """Return the files, with the base's name in the config where a local path stood."""
    files = dict(contents.files)
    config = files.get(ADAPTER_CONFIG)
    if not isinstance(config, Path) or len(facts.bases) != 1:
        return files
    words = json.loads(config.read_text(encoding="utf-8"))
    field = BASE_WORDS.get(contents.format, "base_model_name_or_path")
    named = words.get(field)
    if named is None or repo_id_of(str(named)) is None:
        words[field] = facts.bases[0].repo
        files[ADAPTER_CONFIG] = (json.dumps(words, indent=2, ensure_ascii=False) + "\n").encode()
    return files


def _more_notes(contents: Contents, there: There, *, private: bool, own_card: bool) -> list[Note]:
    notes = []
    if contents.pickled:
        notes.append(
            Note("pickled weights may run code; `loratools convert` writes safetensors", "warning")
        )
    if contents.left:
        few, more = contents.left[:6], len(contents.left) - 6
        rest = f" and {more} more" if more > 0 else ""
        notes.append(Note(f"stay here, as no part of it: {', '.join(few)}{rest}"))
    if not has_token():
        notes.append(Note(f"nobody is logged in, as the upload needs: {LOG_IN}", "warning"))
    if private and there.exists and not there.private:
        notes.append(Note("the repository is there and public; --private changes nothing"))
    if there.card is not None and not own_card:
        notes.append(Note("the repository's own text is kept", subject=CARD))
    return notes


def _report(
    path: str,
    target: str,
    revision: str | None,
    contents: Contents,
    facts: CardFacts,
    files: Mapping[str, Path | bytes],
    notes: Sequence[Note],
) -> Report:
    items = tuple({"file": name, "bytes": _size(file)} for name, file in files.items())
    words: dict[str, Json] = {
        "what": contents.what,
        "format": contents.format,
        "base_model": [base.repo for base in facts.bases],
        "relation": facts.relation,
        "license": facts.licence.license,
        "files": len(items),
        "bytes": sum(item["bytes"] for item in items),
    }
    where = SCHEME + target + (f"@{revision}" if revision else "")
    return Report("push", (path,), where, words, items, tuple(notes))


def _size(file: Path | bytes) -> int:
    return len(file) if isinstance(file, bytes) else file.stat().st_size
