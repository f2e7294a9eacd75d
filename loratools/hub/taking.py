"""Functions that take paths, taught to take ``hf://`` references in the same places."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from loratools.errors import LoratoolsError
from loratools.hub.fetching import (
    fetch_adapter,
    fetch_anything,
    fetch_file,
    fetch_model,
    fetch_side_files,
)
from loratools.hub.references import is_reference, parse_reference
from loratools.hub.sketching import sketch_anything, sketch_model
from loratools.report import Json, Note, Report

Params = ParamSpec("Params")
Result = TypeVar("Result")

_FETCHERS = {
    "adapter": fetch_adapter,
    "model": fetch_model,
    "side": fetch_side_files,
    "file": fetch_file,
    "whole": fetch_anything,
}
_SKETCHERS = {"names": sketch_model, "anything": sketch_anything}

_VALUES_WANTED = ("spectrum", "alignment", "plot")
"""Arguments for which headers do not do."""


_ONLY_HEADERS = "only headers were fetched: what the weights themselves would tell is not looked at"


def takes_references(
    **places: str,
) -> Callable[[Callable[Params, Result]], Callable[Params, Result]]:
    """Return a decorator that lets parameters be references, alone, in pairs or in sequences.

    What they mean is fetched before the function runs, which sees paths in the cache; in reports
    and errors the references stand again.

    Args:
        places: parameter → what is read from there: ``adapter``, ``model`` (a model or pipeline),
            ``planned`` (a model whose names and types are enough for a dry run), ``names`` (of a
            model's tensors), ``side`` (a model's config and tokenizer), ``file``, ``anything`` (to
            be described) or ``whole`` (the same, with its values).
    """

    def decorate(function: Callable[Params, Result]) -> Callable[Params, Result]:
        signature = inspect.signature(function)

        @wraps(function)
        def taking(*args: Params.args, **kwargs: Params.kwargs) -> Result:
            bound = signature.bind(*args, **kwargs)
            given = bound.arguments
            if not any(_mentions(given.get(name)) for name in places):
                return function(*args, **kwargs)
            with ExitStack() as stack:
                whole = any(given.get(word) for word in _VALUES_WANTED)
                takes = _Taking(stack, whole, planning=bool(given.get("dry_run")))
                for name in (name for name in places if name in given):
                    given[name] = takes.local(given[name], places[name])
                try:
                    found = function(*bound.args, **bound.kwargs)
                except LoratoolsError as error:
                    error.message = takes.renamed(error.message)
                    error.hint = takes.renamed(error.hint)
                    error.args = (error.message,)
                    raise
                result: Result = takes.reported(found)
                return result

        return taking

    return decorate


def _mentions(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_mentions, value))
    return is_reference(value) if isinstance(value, (str, os.PathLike)) else False


class _Taking:
    """One call's references and what they became."""

    def __init__(self, stack: ExitStack, whole: bool, *, planning: bool) -> None:
        self._stack = stack
        self._whole = whole
        self._planning = planning
        self._sketched: list[str] = []
        self._names: dict[str, str] = {}

    def local(self, value: Any, place: str) -> Any:
        """Return an argument with paths where references were."""
        if isinstance(value, (list, tuple)):
            return type(value)(self.local(item, place) for item in value)
        if not (isinstance(value, (str, os.PathLike)) and is_reference(value)):
            return value
        reference = parse_reference(str(value))
        place = "adapter" if place == "anything" and self._whole else place
        if place == "planned":
            place = "names" if self._planning else "model"
            self._sketched += [reference.text] if self._planning else []
        if place in _FETCHERS:
            path = _FETCHERS[place](reference)
        else:
            path = _SKETCHERS[place](reference, self._stack)
        self._names[str(path)] = reference.text
        return str(path)

    def renamed(self, value: Json) -> Json:
        """Return a value of a report, or a message, with references where paths were."""
        if isinstance(value, str):
            for path, text in sorted(self._names.items(), key=lambda pair: -len(pair[0])):
                value = value.replace(path, text)
            return value
        if isinstance(value, Mapping):
            return {key: self.renamed(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return type(value)(self.renamed(item) for item in value)
        return value

    def _renamed_words(self, note: Note) -> dict[str, Any]:
        return {word: self.renamed(getattr(note, word)) for word in ("message", "subject")}

    def reported(self, found: Any) -> Any:
        """Return a function's result with the references in its reports."""
        if isinstance(found, tuple):
            return tuple(map(self.reported, found))
        if not isinstance(found, Report):
            return found
        return replace(
            found,
            inputs=self.renamed(found.inputs),
            facts=self.renamed(found.facts),
            items=self.renamed(found.items),
            notes=(
                *(replace(note, **self._renamed_words(note)) for note in found.notes),
                *(Note(_ONLY_HEADERS, subject=text) for text in self._sketched),
            ),
        )
