"""The README is short, and its figures are those of docs/benchmarks.md."""

from __future__ import annotations

import re

import pytest

from .test_commands import ROOT, console_blocks

README = (ROOT / "README.md").read_text("utf-8")
COMPARISON = README.partition("\n## Compared with other tools\n")[2].partition("\n## ")[0]

FIGURES = [
    ("2.7 s and 0.18 GB against 16.9 s and 2.5 GB", "merge` | 2.70 (2.55–2.75) | 177 |"),
    ("2.7 s and 0.18 GB against 16.9 s and 2.5 GB", "save | 16.88 (16.75–19.30) | 2499 |"),
    ("with no element different", "none differs from PEFT's"),
    ("took 1.3 s against 173 s (seven layers", "7 layers | 1.32 s | PEFT's `add_weighted_adapter"),
    ("3.2 s for an SDXL file", "rank 64 to 4 (`resize.py`) | 3.17 s"),
    ("take 622 s (extrapolated", "alone: 622 s, extrapolated"),
    ("2.8 s against 116 s for one block", "most 1.0016 of the least | mergekit 0.1.5: 116 s"),
    ("a quarter (Q3_K)", "| Q3_K | 84 | 356 | 0.24 |"),
    ("to 1.3 times the speed", "| Q5_K | 99 | 75 | 1.33 |"),
]  # fmt: skip
"""What the README says, and what of the benchmarks it is taken from: change both together."""


@pytest.mark.parametrize(("said", "measured"), FIGURES)
def test_the_figures_are_those_of_the_benchmarks(said: str, measured: str) -> None:
    assert said in COMPARISON
    assert measured in (ROOT / "docs/benchmarks.md").read_text("utf-8")


def test_every_time_in_the_comparison_is_checked() -> None:
    times = set(re.findall(r"[\d.]+ (?:s|GB)\b", COMPARISON))
    assert times <= set(re.findall(r"[\d.]+ (?:s|GB)\b", " ".join(said for said, _ in FIGURES)))


def test_it_is_read_in_three_minutes() -> None:
    examples = "".join(console_blocks(README))
    assert len(README.splitlines()) <= 200
    assert len(examples.splitlines()) <= 60
    assert len(re.findall(r"^\*\*\d\. ", README, re.MULTILINE)) == 6


def test_its_first_two_sentences_name_the_formats_and_the_reader() -> None:
    start = README.partition("\n\n")[2][:500]
    assert all(word in start for word in ("LoRA", "PEFT", "kohya", "llama.cpp", "Hub"))
