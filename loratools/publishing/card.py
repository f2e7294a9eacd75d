"""Model cards: metadata and text, written with the Hub's own card classes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loratools.errors import UploadError
from loratools.publishing.contents import Contents
from loratools.publishing.licences import BaseCard, Licence
from loratools.publishing.usage import usage

RELATIONS = ("adapter", "merge", "quantized", "finetune")
"""The Hub's words, https://huggingface.co/docs/hub/model-cards#specifying-a-base-model."""

_METADATA = re.compile(r"\s*---[ \t]*\r?\n(?P<data>(?:.*?\n)??)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
"""What stands at the top of a card; it may be empty."""

_DONE = {
    "adapter": "An adapter for {bases}.",
    "merge": "{bases} with adapters merged into its weights.",
    "quantized": "{bases} in weights of fewer bits.",
    "finetune": "A fine-tuned version of {bases}.",
}


@dataclass(frozen=True, slots=True)
class CardFacts:
    """What a card says beyond the contents of the files.

    Attributes:
        repo: where it will be.
        bases: the base models.
        relation: to them.
        licence: settled.
        made_of: name and strength of each adapter that was merged.
    """

    repo: str
    bases: Sequence[BaseCard]
    relation: str
    licence: Licence
    made_of: Sequence[tuple[str, float]] = ()


def card_metadata(contents: Contents, facts: CardFacts) -> dict[str, Any]:
    """Return the card's metadata in the Hub's words; nothing that is not known."""
    names = [base.repo for base in facts.bases]
    tasks = {base.pipeline_tag for base in facts.bases if base.found}
    merged = ["merge"] if facts.relation == "merge" else []
    words: dict[str, Any] = {
        "base_model": names[0] if len(names) == 1 else names,
        "base_model_relation": facts.relation,
        "library_name": contents.library,
        "pipeline_tag": next(iter(tasks)) if len(tasks) == 1 else contents.pipeline_tag,
        "license": facts.licence.license,
        "license_name": facts.licence.license_name,
        "license_link": facts.licence.license_link,
        "instance_prompt": contents.trigger,
        "tags": [*contents.tags, *merged],
    }
    return {key: value for key, value in words.items() if value not in (None, [], "")}


def new_card(contents: Contents, facts: CardFacts) -> str:
    """Return a card for something that has none."""
    from huggingface_hub import ModelCardData

    data = ModelCardData(**card_metadata(contents, facts))
    return f"---\n{data.to_yaml()}\n---\n{_text(contents, facts)}"


def completed_card(
    text: str, contents: Contents, facts: CardFacts, stated: Mapping[str, Any]
) -> str:
    """Return an existing card with its text untouched and what its metadata lacks.

    Args:
        text: the card.
        contents: what is published.
        facts: what else is known.
        stated: metadata that the user asked for, which replaces the card's own.

    Raises:
        UploadError: the card's metadata cannot be read.
    """
    card = read_card(text)
    for key, value in {**card_metadata(contents, facts), **stated}.items():
        present = getattr(card.data, key, None)
        if key == "tags":
            card.data.tags = list(dict.fromkeys([*(present or []), *value]))
        elif key in stated or present in (None, [], ""):
            setattr(card.data, key, value)
    return str(card)


def read_card(text: str) -> Any:
    """Return a ModelCard; raises UploadError if its metadata cannot be read."""
    from huggingface_hub import ModelCard
    from yaml import YAMLError

    try:
        return ModelCard(_framed(text))
    except (ValueError, TypeError, YAMLError) as error:
        words = str(error).partition("\n")[0]
        raise UploadError(
            f"README.md: its metadata cannot be read ({words})",
            hint="mend the lines between the two --- at its top",
        ) from error


def _framed(text: str) -> str:
    """Return a card with its metadata between lines of the form that the library looks for."""
    end = "\r\n" if "\r\n" in text else "\n"
    found = _METADATA.match(text)
    data, rest = (found["data"], text[found.end() :]) if found else ("", text)
    return f"---{end}{data or end}---{end}{rest}"


def _text(contents: Contents, facts: CardFacts) -> str:
    bases = " and ".join(f"[{b.repo}](https://huggingface.co/{b.repo})" for b in facts.bases)
    parts = [
        f"# {facts.repo.rpartition('/')[2]}",
        _DONE[facts.relation].format(bases=bases),
        _trigger(contents),
        _merged(facts),
        _table(contents),
        "## Use",
        usage(contents, facts.repo, [base.repo for base in facts.bases]),
    ]
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def _trigger(contents: Contents) -> str:
    return f"Trigger words: `{contents.trigger}`" if contents.trigger else ""


def _merged(facts: CardFacts) -> str:
    if not facts.made_of:
        return ""
    rows = "\n".join(f"| {name} | {strength:g} |" for name, strength in facts.made_of)
    head = "Merged with [loratools](https://pypi.org/project/loratools/):"
    return f"{head}\n\n| adapter | strength |\n| --- | --- |\n{rows}"


def _table(contents: Contents) -> str:
    rows = "\n".join(f"| {title} | {value} |" for title, value in contents.facts.items())
    return f"| | |\n| --- | --- |\n{rows}" if rows else ""
