"""The commands in the documentation run and print what it says; the options are click's.

A block ``console`` holds commands and their output; one whose first line names a file after the
language (``yaml recipe.yaml``) is that file. ``loratools`` runs in this process, also before a
pipe; jq, make and the like run in a shell.

``python tests/docs/test_commands.py`` writes the output of today into the pages; read the diff.
"""

from __future__ import annotations

import io
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

import click
import pytest

from loratools import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [name for name, _ in cli.COMMANDS]
HOME = "/home/me"
"""What the pages call the working directory."""

block_pattern = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?")


def make_files(folder: Path) -> None:
    """Make what the pages take for given; imported here, since this file is a script too."""
    from tests.docs import examples

    examples.make_files(folder)


def console_blocks(text: str) -> list[str]:
    """Return the blocks of commands."""
    return [found["body"] for found in block_pattern.finditer(text) if found["info"] == "console"]


def write_file(found: re.Match[str]) -> None:
    """Write a block that is a file into the working directory."""
    _, _, name = found["info"].partition(" ")
    if name:
        Path(name).write_text(found["body"], "utf-8")


def steps(block: str) -> Iterator[tuple[str, str]]:
    """Yield each command of a block with the output that follows it."""
    for step in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        command, _, output = step.partition("\n")
        yield command, output


def execute(command: str) -> str:
    """Run one command line in the working directory; returns all that it prints."""
    first, bar, rest = command.partition(" | ")
    if not first.startswith("loratools "):
        return in_shell(command)
    code, out, err = in_process(first)
    if bar:
        return in_shell(rest, out)
    text = (out + err).replace(str(Path.cwd()), HOME)
    failed = text.startswith(("Error: ", '{\n  "schema": 1,\n  "error"'))
    # That adapters differ is an answer too.
    assert (code != 0) == (failed or "\n  same                 no\n" in text), text
    return text


def in_process(command: str) -> tuple[int, str, str]:
    """Run loratools; returns code, stdout, stderr. Only where nothing is piped, they are one."""
    _, *words = shlex.split(command)
    data = b""
    if "<" in words:
        position = words.index("<")
        data = Path(words[position + 1]).read_bytes()
        del words[position : position + 2]
    out = err = io.StringIO()
    if "--json" in words:
        err = io.StringIO()
    before, sys.stdin = sys.stdin, io.TextIOWrapper(io.BytesIO(data), encoding="utf-8")
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = cli.run(words)
    finally:
        sys.stdin = before
    return code, out.getvalue(), err.getvalue() if err is not out else ""


def in_shell(command: str, given: str = "") -> str:
    """Run a line in a shell that finds this loratools; skips where the program is missing."""
    program = shlex.split(command)[0]
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "loratools"
        start.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loratools "$@"\n')
        start.chmod(0o755)
        paths = os.environ | {
            "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
        }
        # These tests may run under `make` themselves.
        paths = {name: word for name, word in paths.items() if not name.startswith("MAKE")}
        paths.pop("MFLAGS", None)
        done = subprocess.run(
            ["sh", "-c", command],
            check=False, capture_output=True, text=True, input=given, env=paths,
        )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def agrees(found: str, written: str) -> bool:
    """Compare line by line; ``...`` stands for any lines.

    Numbers may differ by rounding, and columns by their width.
    """
    if "...\n" not in written:
        return _same_lines(found, written)
    start, end = written.split("...\n", 1)
    return (
        _same_lines(found[: _end_of_lines(found, start)], start)
        and found.count("\n") >= written.count("\n") - 1
        and _same_lines("".join(found.splitlines(True)[-end.count("\n") or len(found) :]), end)
    )


def _end_of_lines(text: str, start: str) -> int:
    return len("".join(text.splitlines(True)[: start.count("\n")]))


def _same_lines(found: str, written: str) -> bool:
    if _skeleton(found) != _skeleton(written):
        return False
    pairs = zip(_NUMBER.findall(found), _NUMBER.findall(written), strict=True)
    return all(_is_close(*pair) for pair in pairs)


def _skeleton(text: str) -> str:
    return re.sub(r"(?<=\S) {2,}", "  ", _NUMBER.sub("#", text))


def _is_close(found: str, written: str) -> bool:
    # What an exponent like e-06 measures is rounding, another on every processor.
    if "e-" in found and "e-" in written:
        return True
    first, second = (float(word.replace(",", "")) for word in (found, written))
    return abs(first - second) <= 0.01 * abs(second)


# ---------------------------------------------------------------------------- tests


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_files(tmp_path)
    monkeypatch.chdir(tmp_path)
    for block in block_pattern.finditer(page.read_text("utf-8")):
        if block["info"] != "console":
            write_file(block)
            continue
        for command, written in steps(block["body"]):
            found = execute(command)
            assert agrees(found, written), f"$ {command}\n{found}"


@pytest.mark.parametrize("name", NAMES)
def test_every_command_has_its_page(name: str) -> None:
    page = ROOT / f"docs/{name}.md"
    assert page in PAGES
    blocks = console_blocks(page.read_text("utf-8"))
    shown = [command for block in blocks for command, _ in steps(block)]
    assert len([line for line in shown if line.startswith(f"loratools {name}")]) >= 1
    assert f"]({name}.md)" in (ROOT / "docs/index.md").read_text("utf-8")


@pytest.mark.parametrize("name", NAMES)
def test_the_options_are_those_of_the_command(name: str) -> None:
    text = (ROOT / f"docs/{name}.md").read_text("utf-8")
    section = re.split(r"^## ", text.partition("\n## Options\n")[2], flags=re.MULTILINE)[0]
    params = import_module(f"loratools._cli.{name}").command.params
    options = [param for param in params if isinstance(param, click.Option)]
    offered = {word for option in options for word in option.opts if word.startswith("--")}
    assert set(re.findall(r"(?<=[`/])--[a-z-]+", section)) == offered
    for option in options:
        if isinstance(option.type, click.Choice):
            assert all(f"`{choice}`" in section for choice in option.type.choices)


@pytest.mark.parametrize(
    ("found", "written", "expected"),
    [
        ("a\nb\n", "a\nb\n", True),
        ("a\nb\n", "a\n", False),
        ("a\nb\nc\n", "a\n...\nc\n", True),
        ("a\nb\nc\n", "a\n...\n", True),
        ("a\nb\nc\n", "a\n...\nd\n", False),
        ("a\nb\nc\n", "b\n...\nc\n", False),
        ("a    b\n", "a  b\n", True),
        ("a b\n", "a  b\n", False),
        ("norm 15.02\n", "norm 15.03\n", True),
        ("norm 15.02\n", "norm 16.0\n", False),
        ("within 1.1e-06\n", "within 2.3e-07\n", True),
        ("1,000 layers\n", "1,000 layers\n", True),
        ("9 layers\n", "9 tensors\n", False),
    ],
)
def test_the_comparison_itself(found: str, written: str, expected: bool) -> None:
    assert agrees(found, written) == expected


# ---------------------------------------------------------------------------- rewriting


def rewritten(block: re.Match[str]) -> str:
    """Return a block with today's output where it disagrees; a block that is a file is written."""
    if block["info"] != "console":
        write_file(block)
        return block[0]
    text = ""
    for command, written in steps(block["body"]):
        found = execute(command)
        text += f"$ {command}\n{written if agrees(found, written) else found}"
    return f"```console\n{text}```"


def main() -> None:
    """Write today's output into every page, or into those that are named."""
    sys.path.insert(0, str(ROOT))
    from tests.docs.conftest import served

    named = [Path(name).resolve() for name in sys.argv[1:]]
    for page in named or PAGES:
        with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory() as other:
            folder = Path(name).resolve()
            make_files(folder)
            os.chdir(folder)
            text = page.read_text("utf-8")
            with served(page, Path(other)):
                page.write_text(block_pattern.sub(rewritten, text), "utf-8")
            os.chdir(ROOT)
            shutil.rmtree(folder / "merged", ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
