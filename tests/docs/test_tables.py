"""Nothing is left out of the documentation: commands, options, formats, methods."""

from __future__ import annotations

import re
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import click
import pytest

from loratools.cli import COMMANDS
from loratools.formats import FORMATS
from loratools.merge_methods import METHODS

from .test_commands import PAGES, ROOT

DOCS = ROOT / "docs"


def text_of(name: str) -> str:
    return (DOCS / name).read_text("utf-8")


def first_cells(text: str) -> list[str]:
    """Return what stands in backquotes in the first cell of each row of the text's tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE)


def test_every_method_has_its_row() -> None:
    written = first_cells(text_of("methods.md").partition("\n## Options\n")[0])
    assert sorted(written) == sorted(row.name for row in METHODS)


def test_every_method_has_its_default_density() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| ([\d.]*) ?\|", text_of("methods.md"), re.MULTILINE))
    for row in METHODS:
        assert (float(rows[row.name]) if rows[row.name] else None) == row.density, row.name


def test_every_format_is_in_the_listing() -> None:
    listing = text_of("formats.md")
    for row in FORMATS:
        assert re.search(rf"^  {row.name}  ", listing, re.MULTILINE), row.name


def test_the_index_lists_every_page_and_every_command_once() -> None:
    index = text_of("index.md")
    rows = re.findall(r"^\| \[([a-z]+)\]\(([a-z]+)\.md\) \|", index, re.MULTILINE)
    assert sorted(rows) == sorted((name, name) for name, _ in COMMANDS)
    linked = set(re.findall(r"\]\(([\w-]+\.md)[#)]", index))
    assert {page.name for page in PAGES if page.parent == DOCS} - linked == {"index.md"}


def options_of(name: str) -> Iterable[click.Option]:
    params = import_module(f"loratools._cli.{name}").command.params
    return [param for param in params if isinstance(param, click.Option)]


@pytest.mark.parametrize("name", [name for name, _ in COMMANDS])
def test_every_short_option_is_named_with_its_long_one(name: str) -> None:
    text = text_of(f"{name}.md")
    for option in options_of(name):
        for short in (word for word in option.opts if not word.startswith("--")):
            assert re.search(rf"`{short}`[,/] ?`--", text), short


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_options_that_a_page_speaks_of_exist(page: Path) -> None:
    """``--word`` in the text is an option of some command of ours, or of a tool that is named."""
    known = {word for name, _ in COMMANDS for option in options_of(name) for word in option.opts}
    known |= {"--help", "--version"}
    text = page.read_text("utf-8")
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text)) - known - FOREIGN == set()


FOREIGN = frozenset({"--allow-requantize", "--lora", "--max-lora-rank", "--skip-8b"})
"""Options of llama.cpp, vLLM and our own benchmarks."""
