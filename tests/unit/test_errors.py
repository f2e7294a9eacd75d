"""The error tree: drawn, documented, and every error a LoratoolsError with a message and a hint."""

from __future__ import annotations

import inspect
import pickle
import re
from collections.abc import Iterator

import pytest

from loratools import errors
from loratools.errors import LoratoolsError

CLASSES = [
    value
    for _, value in inspect.getmembers(errors, inspect.isclass)
    if value.__module__ == errors.__name__
]


def drawn() -> Iterator[tuple[str, str | None]]:
    """Yield (class, parent) for each line of the drawing in the module's docstring."""
    path: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^ {4}((?:[│ ] {2,3})*(?:[├└]── )?)(\w+Error)\b", line)
        if not match:
            continue
        depth = len(match[1]) // 4
        path = [*path[:depth], match[2]]
        yield match[2], path[depth - 1] if depth else None


def test_the_drawing_is_the_tree() -> None:
    wanted = {
        cls.__name__: None if cls is LoratoolsError else cls.__mro__[1].__name__ for cls in CLASSES
    }
    assert dict(drawn()) == wanted
    assert len(list(drawn())) == len(CLASSES) >= 10


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
class TestEveryError:
    """What each class keeps."""

    def test_is_documented(self, cls: type[LoratoolsError]) -> None:
        """Its own docstring, a sentence, not one inherited."""
        text = vars(cls).get("__doc__")
        assert text
        assert text.strip().endswith(".")

    def test_is_a_loratools_error(self, cls: type[LoratoolsError]) -> None:
        assert issubclass(cls, LoratoolsError)
        assert not issubclass(cls, (OSError, ValueError))

    def test_carries_message_and_hint(self, cls: type[LoratoolsError]) -> None:
        error = cls("what and where", hint="the next step")
        assert (error.message, error.hint, str(error)) == (
            "what and where",
            "the next step",
            "what and where",
        )
        assert cls("alone").hint is None

    def test_crosses_processes(self, cls: type[LoratoolsError]) -> None:
        """Workers of test runners and of Ray send errors as pickles."""
        again = pickle.loads(pickle.dumps(cls("what", hint="next")))
        assert (type(again), again.message, again.hint) == (cls, "what", "next")


def test_public_root_is_the_same_class() -> None:
    import loratools

    assert loratools.LoratoolsError is LoratoolsError
