"""Reports: frozen, one JSON form, nothing in it that JSON has no words for."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loratools.report import SCHEMA, Note, Report

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5))
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=8,
)

mappings = st.dictionaries(st.text(max_size=5), values, max_size=3)


def refuse(word: str) -> None:
    raise AssertionError(f"{word} is no JSON")


def assert_same(actual: object, given: object) -> None:
    """Assert that parsed JSON says what was given; numbers that are none are said as words."""
    if isinstance(given, dict):
        assert isinstance(actual, dict)
        assert actual.keys() == given.keys()
        for key, value in given.items():
            assert_same(actual[key], value)
    elif isinstance(given, (list, tuple)):
        assert isinstance(actual, list)
        assert len(actual) == len(given)
        for ours, theirs in zip(actual, given, strict=True):
            assert_same(ours, theirs)
    elif isinstance(given, float) and not math.isfinite(given):
        assert actual in ("nan", "inf", "-inf")
    else:
        assert actual == given
        assert type(actual) is type(given)


@given(facts=mappings, items=st.lists(mappings, max_size=3))
def test_json_is_strict_and_complete(
    facts: dict[str, object], items: list[dict[str, object]]
) -> None:
    """Every strict parser takes it: no NaN, no Infinity; everything else as it was."""
    report = Report(
        "merge", ("a", "b:0.5"), "out", facts, tuple(items), (Note("x", "warning", "t"),)
    )
    parsed = json.loads(report.to_json(), parse_constant=refuse)
    assert parsed.pop("facts").keys() == facts.keys()
    assert_same(json.loads(report.to_json())["facts"], facts)
    assert_same(parsed.pop("items"), items)
    assert parsed == {
        "schema": SCHEMA,
        "operation": "merge",
        "dry_run": False,
        "inputs": ["a", "b:0.5"],
        "output": "out",
        "notes": [{"level": "warning", "message": "x", "subject": "t"}],
    }


def test_schema_comes_first() -> None:
    """A reader may look at the first member to know what follows."""
    assert next(iter(json.loads(Report("inspect").to_json()))) == "schema"


def test_names_are_not_escaped() -> None:
    assert "Ω→W′" in Report("inspect", facts={"name": "Ω→W′"}).to_json()


def test_warnings_are_the_notes_that_warn() -> None:
    notes = (Note("a"), Note("b", "warning"), Note("c"), Note("d", "warning", "x"))
    assert Report("merge", notes=notes).warnings == (notes[1], notes[3])


def test_reports_are_frozen_and_share_nothing() -> None:
    report, other = Report("merge"), Report("merge")
    with pytest.raises(dataclasses.FrozenInstanceError):
        report.output = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        report.facts["x"] = 1  # type: ignore[index]
    assert report == other


def test_to_dict_does_not_give_away_the_reports_own_containers() -> None:
    report = Report("merge", facts={"a": 1}, items=({"b": 2},))
    plain = report.to_dict()
    plain["facts"]["a"] = plain["items"][0]["b"] = 3
    assert report.facts == {"a": 1}
    assert report.items == ({"b": 2},)
