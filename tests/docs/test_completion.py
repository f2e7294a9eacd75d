"""The lines of docs/completion.md work in the shells that are installed, and values complete."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from loratools._cli import type_names
from loratools.codecs.ggml_mixes import MIXES
from loratools.planning.pack_targets import PACKED_TARGETS
from loratools.planning.quantising import block_types

from .test_commands import ROOT

PAGE = ROOT / "docs/completion.md"
SHELLS = ("bash", "zsh", "fish")


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return variables under which a shell finds this loratools."""
    start = tmp_path / "loratools"
    start.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m loratools "$@"\n')
    start.chmod(0o755)
    return os.environ | {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "HOME": str(tmp_path),
    }


@pytest.mark.parametrize("shell", SHELLS)
def test_the_line_for_the_shell_is_on_the_page(shell: str) -> None:
    assert f"_LORATOOLS_COMPLETE={shell}_source loratools" in PAGE.read_text("utf-8")


@pytest.mark.parametrize("shell", SHELLS)
def test_the_line_registers_the_completion(shell: str, environment: dict[str, str]) -> None:
    """The page's block is run as it is written; then the shell says what it completes."""
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (line,) = [block for block in blocks if f"={shell}_source" in block and ">" not in block]
    before = "autoload -U compinit && compinit -u\n" if shell == "zsh" else ""
    asked = {
        "bash": "complete -p loratools",
        "zsh": "echo $_comps[loratools]",
        "fish": "complete -c loratools",
    }[shell]
    done = subprocess.run(
        [shell, "-c", f"{before}{line}\n{asked}"],
        check=True, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert "loratools" in done.stdout


def test_the_script_in_a_file_does_the_same(environment: dict[str, str], tmp_path: Path) -> None:
    blocks = re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    (lines,) = [block for block in blocks if ">>" in block]
    subprocess.run(["bash", "-c", lines], check=True, env=environment)
    asked = f". {tmp_path}/.bashrc && complete -p loratools"
    done = subprocess.run(
        ["bash", "-c", asked], check=True, capture_output=True, text=True, env=environment
    )
    assert "loratools" in done.stdout


def test_names_of_types_are_those_of_the_tables() -> None:
    assert set(type_names.GGUF_MIXES) == {name.lower() for name in MIXES}
    assert set(type_names.FOLDER_TYPES) == set(PACKED_TARGETS)
    assert set(type_names.BLOCK_TYPES) == set(block_types())


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("quantize m.gguf --to q4_k", {"q4_k_m", "q4_k_s"}),
        ("quantize folder --to nf4", {"nf4", "nf4-double"}),
        ("merge b a --quant q8", {"q8_0"}),
        ("merge b a --quant de", {"dequantize"}),
        ("merge b a --device cu", {"cuda"}),
        ("merge b a --rounding a", {"adapter-aware"}),
        ("merge b a --compat ly", {"lycoris"}),
        ("convert a --dtype q", {"q8_0"}),
        ("dequantize m --dtype f", {"fp32", "fp16"}),
        ("resize a --score s", {"spectral"}),
        ("push a me/a --relation m", {"merge"}),
        ("resize a --sv-", {"--sv-ratio", "--sv-cumulative", "--sv-fro"}),
        ("extract a b --to g", set()),
    ],
)
def test_values_complete(words: str, offered: set[str]) -> None:
    from click.shell_completion import ShellComplete

    from loratools.cli import cli

    *before, last = words.split()
    complete = ShellComplete(cli, {}, "loratools", "_LORATOOLS_COMPLETE")
    found = complete.get_completions(before, last)
    assert {item.value for item in found} == offered


@pytest.mark.parametrize(
    "words",
    ["merge ba", "merge b a", "diff a", "inspect a", "push a", "run re", "quantize b --template m",
     "merge b a -o o", "unmerge m --base b", "inspect a --plot p"],
)  # fmt: skip
def test_paths_complete(words: str) -> None:
    from click.shell_completion import ShellComplete

    from loratools.cli import cli

    *before, last = words.split()
    complete = ShellComplete(cli, {}, "loratools", "_LORATOOLS_COMPLETE")
    assert [item.type for item in complete.get_completions(before, last)] == ["file"]
