"""``ADAPTER[:STRENGTH]``: what is a path and what is a number."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from loratools._cli.options import StrengthParam

from .conftest import Run


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the paths that the cases name."""
    monkeypatch.chdir(tmp_path)
    there = ["there"]
    if os.name != "nt":
        there += ["style:v2", "style:0.5", "a b", "é"]
    for name in there:
        Path(name).mkdir()


def parse(value: str) -> tuple[str, float]:
    return StrengthParam().convert(value, None, None)


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("there", ("there", 1.0)),
        ("there/", ("there/", 1.0)),
        ("there:0.5", ("there", 0.5)),
        ("there/:0.5", ("there/", 0.5)),
        ("./there:2", ("./there", 2.0)),
        ("there:-0.2", ("there", -0.2)),
        ("there:+1", ("there", 1.0)),
        ("there:.5", ("there", 0.5)),
        ("there:1e-3", ("there", 0.001)),
        ("there:1e9", ("there", 1e9)),
        # What does not exist is reported as missing later, under the name that was meant.
        ("absent", ("absent", 1.0)),
        ("absent:0.5", ("absent", 0.5)),
        ("absent:v2", ("absent:v2", 1.0)),
        ("absent:", ("absent:", 1.0)),
        ("hf://org/name", ("hf://org/name", 1.0)),
        ("hf://org/name:0.5", ("hf://org/name", 0.5)),
        (r"C:\models\style", (r"C:\models\style", 1.0)),
        (r"C:\models\style:0.5", (r"C:\models\style", 0.5)),
    ],
)
def test_splits(value: str, expected: tuple[str, float]) -> None:
    assert parse(value) == expected


@pytest.mark.usefixtures("names")
@pytest.mark.skipif(os.name == "nt", reason="a colon has another meaning in Windows paths")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("style:v2", ("style:v2", 1.0)),
        ("style:v2:0.5", ("style:v2", 0.5)),
        ("style:0.5", ("style:0.5", 1.0)),
        ("style:0.5:2", ("style:0.5", 2.0)),
        ("a b:0.5", ("a b", 0.5)),
        ("é:0.5", ("é", 0.5)),
    ],
)
def test_a_path_that_exists_is_never_split(value: str, expected: tuple[str, float]) -> None:
    assert parse(value) == expected


@pytest.mark.usefixtures("names")
@pytest.mark.parametrize(
    "tail", ["0", "-0", "0.0", "nan", "inf", "-inf", "", "0,5", "half", "0.5x", "1e999"]
)
def test_refuses(tail: str) -> None:
    with pytest.raises(click.BadParameter, match="strength"):
        parse(f"there:{tail}")


def test_a_drive_letter_is_no_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loratools._cli.options._is_drive", lambda head: head == "C")
    assert parse("C:0") == ("C:0", 1.0)


@pytest.mark.parametrize("tail", ["0", "nan", "0,5", ""])
def test_a_refused_strength_is_wrong_usage(here: Path, run: Run, tail: str) -> None:
    outcome = run("merge", "base", f"adapter:{tail}", "-o", "out")
    assert outcome.code == 2
    assert f"strength {tail}" in outcome.err.replace("'", "")
    assert not Path("out").exists()


def test_strengths_reach_the_merge(here: Path, run: Run) -> None:
    document = run("merge", "base", "adapter:0.5", "second:-2", "-o", "out", "--json").document
    strengths = {adapter["path"]: adapter["strength"] for adapter in document["facts"]["adapters"]}
    assert strengths == {"adapter": 0.5, "second": -2.0}
    assert document["inputs"] == ["base", "adapter", "second"]
