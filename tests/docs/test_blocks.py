"""Every fenced block of the pages is run, compared, or on the short list of those that are not.

``console`` blocks and files are run by test_commands; here are all others.
"""

from __future__ import annotations

import re
import shlex
from importlib import import_module
from pathlib import Path

import click
import pytest

from loratools import cli

from .conftest import served
from .test_commands import NAMES, PAGES, ROOT, block_pattern, make_files

NOT_RUN = {
    "pip install": "would change the environment",
    "make ": "the targets exist: test_links; what they do is what this runs under",
    "hf://[models/]": "the grammar of a reference",
    "eval ": "test_completion sources what it evaluates",
    "_LORATOOLS_COMPLETE=": "test_completion runs it",
}
"""How the blocks begin that are not run → why."""

GENERATED = ("python signature", "text")
"""What ``make pages`` writes: signatures, and the tree of errors."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """Return what stands behind the backquotes, and the text, of a page's blocks."""
    found = block_pattern.finditer(page.read_text("utf-8"))
    return [(block["info"], block["body"]) for block in found]


def is_synopsis(page: Path, body: str) -> bool:
    """Return whether a block is the usage line of the command that the page is about."""
    return page.stem in NAMES and body.startswith(f"loratools {page.stem} ") and "[" in body


def is_of_commands(info: str, body: str) -> bool:
    """Return whether a block is command lines without their output."""
    lines = body.splitlines()
    return info in ("", "sh") and all(line.startswith("loratools ") for line in lines)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_listed(page: Path) -> None:
    for info, body in blocks(page):
        run = info in ("console", "python") or info.count(" ") == 1
        listed = any(body.startswith(start) for start in NOT_RUN)
        usage = is_synopsis(page, body) or is_of_commands(info, body)
        assert run or listed or usage or info in GENERATED, body


def test_the_list_has_no_reason_too_many() -> None:
    bodies = [body for page in PAGES for _, body in blocks(page)]
    assert [start for start in NOT_RUN if not any(b.startswith(start) for b in bodies)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(
    page: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The blocks of a page run in their order, beside the files that all pages take for given."""
    code = [body for info, body in blocks(page) if info == "python"]
    if not code:
        return
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    with served(page, tmp_path_factory.mktemp("hub")):
        for body in code:
            exec(compile(body, page.name, "exec"), names)
    assert capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_without_output_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After those with output, whose results they may take."""
    found = block_pattern.finditer(page.read_text("utf-8"))
    wanted = [
        (block["info"], block["body"])
        for block in found
        if block["info"] == "console"
        or (is_of_commands(block["info"], block["body"]) and not is_synopsis(page, block["body"]))
    ]
    if all(info == "console" for info, _ in wanted):
        return
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for info, body in wanted:
        for line in body.splitlines():
            said = line.removeprefix("$ ")
            if info != "console":
                assert cli.run([*shlex.split(said)[1:], "-q"]) == 0, said
            elif line.startswith("$ loratools ") and "|" not in line:
                cli.run([*shlex.split(said)[1:], "-q"])


@pytest.mark.parametrize("name", NAMES)
def test_the_usage_line_has_the_arguments(name: str) -> None:
    """The page's first block: arguments in their order, and the options that are required."""
    page = ROOT / f"docs/{name}.md"
    _, body = blocks(page)[0]
    assert is_synopsis(page, body)
    command: click.Command = import_module(f"loratools._cli.{name}").command
    with click.Context(command, info_name=name) as context:
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        places = [body.find(one.make_metavar(context).strip("[]")) for one in arguments]
    assert -1 not in places
    assert places == sorted(places)
    shown = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", body))
    options = [one for one in command.params if isinstance(one, click.Option)]
    assert shown <= {word for one in options for word in one.opts}
    assert [one.name for one in options if one.required and not shown & set(one.opts)] == []
