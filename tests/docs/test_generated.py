"""What the pages take from the code is the code's of today, and nothing of it is left out."""

from __future__ import annotations

import re
from difflib import unified_diff
from pathlib import Path

import pytest

import loratools
from loratools.cli import COMMANDS
from loratools.formats import FORMATS

from .generate import MAKERS, ROOT, main, pages
from .regions import made_again, prose, regions

HINT = "stale: `make pages` writes it again"


def all_regions() -> list[tuple[str, str, str]]:
    return [
        (page.relative_to(ROOT).as_posix(), region.kind, region.about)
        for page in pages()
        for region in regions(page.read_text("utf-8"))
    ]


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_what_the_page_takes_from_the_code_is_of_today(page: Path) -> None:
    text = page.read_text("utf-8")
    changes = unified_diff(text.splitlines(), made_again(text, MAKERS).splitlines(), n=0)
    assert "\n".join(changes) == "", HINT


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_every_marker_belongs_to_a_region(page: Path) -> None:
    """A marker with a slip of the pen would be an ordinary comment, and its text never renewed."""
    text = page.read_text("utf-8")
    assert len(re.findall("<!--", text)) == 2 * len(list(regions(text)))


def test_every_command_has_its_options_on_its_page() -> None:
    found = [(page, about) for page, kind, about in all_regions() if kind == "options"]
    assert sorted(found) == sorted((f"docs/{name}.md", name) for name, _ in COMMANDS)


def test_the_formats_are_in_the_readme_and_on_their_page() -> None:
    assert [page for page, kind, _ in all_regions() if kind == "formats"] == [
        "README.md",
        "docs/formats.md",
    ]
    rows = re.findall(r"^\| `([^`]+)` \|", MAKERS["formats"](""), re.MULTILINE)
    assert rows == [row.name for row in FORMATS]


def test_every_public_name_has_its_entry() -> None:
    names = " ".join(about for _, kind, about in all_regions() if kind == "api").split()
    assert sorted(names) == sorted(loratools.__all__)


@pytest.mark.parametrize("name", [name for name in loratools.__all__ if name[0].islower()])
def test_every_argument_and_the_errors_are_explained(name: str) -> None:
    entry = MAKERS["api"](name)
    arguments = re.findall(r"^    (\w+): ", entry, re.MULTILINE)
    arguments = arguments or re.findall(r"[(,] ?(\w+): ", entry)
    explained = entry.partition("| argument |")[2].partition("\n\n")[0]
    assert re.findall(r"^\| `(\w+)` \|", explained, re.MULTILINE) == arguments
    assert "| raises | when |" in entry


def test_a_stale_page_fails_the_check(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "README.md"
    page.write_text("<!-- formats -->\nnothing\n<!-- end -->\n", "utf-8")
    monkeypatch.setattr("tests.docs.generate.ROOT", tmp_path)
    assert main(["--check"]) == 1
    assert capsys.readouterr().out == "stale: README.md\n"
    assert main([]) == 0
    assert "| `peft` |" in page.read_text("utf-8")
    assert main(["--check"]) == 0


@pytest.mark.parametrize(
    ("text", "markdown"),
    [
        ("With --quant keep, -v too.", "With `--quant` keep, `-v` too."),
        (
            "A .gguf file such as q8_0; see `formats`.",
            "A `.gguf` file such as `q8_0`; see `formats`.",
        ),
        ("a|b * c, 0.5, 1x1, sd-scripts ...", "a\\|b \\* c, 0.5, 1x1, sd-scripts ..."),
    ],
)
def test_words_of_code_are_marked(text: str, markdown: str) -> None:
    assert prose(text) == markdown
