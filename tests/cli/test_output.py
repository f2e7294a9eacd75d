"""What is printed, and where: reports on stdout, everything else on stderr."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from loratools import cli
from loratools._cli.output import Output, human_bytes, wants_json
from loratools.report import SCHEMA, Note, Report

from .conftest import Run

DOCUMENT = ["schema", "operation", "dry_run", "inputs", "output", "facts", "items", "notes"]
ESCAPE = "\x1b["
MERGE = ["merge", "base", "adapter", "-o", "out"]
COMMANDS = {
    "merge": MERGE,
    "dry run": [*MERGE, "--dry-run"],
    "unmerge": ["unmerge", "base", "adapter", "-o", "out"],
    "restore": ["unmerge", "base", "-o", "out", "--base", "base"],
    "convert": ["convert", "ink.safetensors", "-o", "ink", "--to", "diffusers"],
    "diff": ["diff", "adapter", "adapter"],
    "inspect adapter": ["inspect", "adapter"],
    "inspect base": ["inspect", "base"],
    "compose": ["compose", "adapter:0.7", "second", "-o", "out", "--rank", "4"],
    "formats": ["formats"],
    "methods": ["methods"],
    "demo": ["demo"],
}


# ---------------------------------------------------------------------------- JSON


@pytest.mark.parametrize("name", COMMANDS)
def test_one_json_document_and_nothing_else(here: Path, run: Run, name: str) -> None:
    outcome = run(*COMMANDS[name], "--json")
    document = outcome.document
    assert (outcome.code, outcome.err) == (0, "")
    assert list(document) == DOCUMENT
    assert document["schema"] == SCHEMA
    assert document["operation"] == COMMANDS[name][0]
    assert document["dry_run"] == (name == "dry run")
    assert document["facts"]
    assert all(item.keys() == document["items"][0].keys() for item in document["items"])
    assert all(note.keys() == {"level", "message", "subject"} for note in document["notes"])
    assert {note["level"] for note in document["notes"]} <= {"note", "warning"}


def test_the_facts_of_a_merge(here: Path, run: Run) -> None:
    document = run(*MERGE, "--json").document
    assert document["output"] == "out"
    facts = document["facts"]
    assert (facts["tensors"], facts["tensors_touched"], facts["tensors_changed"]) == (30, 9, 9)
    assert facts["bytes_written"] > facts["bytes_copied"] > 0
    item = next(i for i in document["items"] if i["module"] == "model.layers.0.mlp.down_proj")
    assert (item["tensor"], item["rank"], item["alpha"], item["shape"]) == (
        "model.layers.0.mlp.down_proj.weight",
        4,
        8.0,
        [64, 160],
    )
    assert item["change_norm"] > 0


def test_numbers_that_json_has_no_words_for(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    Output(json=True).report(Report("inspect", facts={"a": float("nan"), "b": [float("inf")]}))
    assert '"nan"' in (text := capsys.readouterr().out)
    assert '"inf"' in text


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["merge", "--json"], True),
        (["merge", "--", "--json"], False),
        (["merge", "--json", "--", "x"], True),
        ([], False),
    ],
)
def test_json_is_recognised_before_parsing(arguments: list[str], expected: bool) -> None:
    assert wants_json(arguments) == expected


# ---------------------------------------------------------------------------- text


@pytest.mark.parametrize("name", COMMANDS)
def test_text_goes_to_stdout_without_escapes(here: Path, run: Run, name: str) -> None:
    outcome = run(*COMMANDS[name])
    assert outcome.code == 0
    assert outcome.out
    assert ESCAPE not in outcome.out + outcome.err


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_prints_only_answers(here: Path, run: Run, name: str) -> None:
    outcome = run(*COMMANDS[name], "-q")
    assert (outcome.code, outcome.err) == (0, "")
    assert bool(outcome.out) == (COMMANDS[name][0] in ("inspect", "formats", "methods"))


def test_quiet_still_prints_errors(here: Path, run: Run) -> None:
    outcome = run("inspect", "nowhere", "-q")
    assert (outcome.code, outcome.out) == (1, "")
    assert "nowhere" in outcome.err


def test_verbose_adds_a_row_for_each_layer(here: Path, run: Run) -> None:
    brief, full = (run("inspect", "adapter", *flag).out for flag in ([], ["-v"]))
    assert full.startswith(brief)
    rows = full[len(brief) :].splitlines()
    assert rows[0].split() == [
        *["module", "kind", "rank", "alpha", "scale"],
        *["shape", "dtype", "parameters", "delta_norm"],
    ]
    assert len(rows) == 1 + 9
    assert "model.layers.0.mlp.down_proj" in rows[1]
    assert "64x160" in rows[1]


def test_the_headline_says_what_went_where(here: Path, run: Run) -> None:
    assert run(*MERGE, "--dry-run").out.startswith("would merge base + adapter")
    assert run(*MERGE).out.startswith("merged base + adapter -> out\n")


def test_the_headline_of_unmerge(here: Path, run: Run) -> None:
    assert " + " not in run("unmerge", "base", "adapter", "-o", "out").out.splitlines()[0]


def test_a_restored_model_says_from_what(here: Path, run: Run) -> None:
    document = run("unmerge", "base", "-o", "out", "--base", "./base", "--json").document
    assert document["facts"]["base"] == "./base"


def test_notes_go_to_stderr(here: Path, run: Run) -> None:
    outcome = run("unmerge", "base", "adapter", "-o", "out")
    assert outcome.err.startswith("Warning: subtracted, not restored")
    assert "Warning" not in outcome.out


def test_many_notes_are_cut_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("merge", notes=tuple(Note(f"number {i}") for i in range(20)))
    Output().report(report)
    brief = capsys.readouterr().err
    Output(verbose=True).report(report)
    full = capsys.readouterr().err
    assert "(12 more notes with -v or --json)" in brief
    assert brief.count("Note: ") == 8
    assert full.count("Note: ") == 20


def test_a_warning_is_never_cut(capsys: pytest.CaptureFixture[str]) -> None:
    notes = (*(Note(f"number {i}") for i in range(20)), Note("danger", "warning"))
    Output().report(Report("merge", notes=notes))
    assert "danger" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 kB"),
        (2_200_000_000, "2.2 GB"),
        (10**15, "1000.0 TB"),
    ],
)
def test_sizes(count: int, text: str) -> None:
    assert human_bytes(count) == text


# ---------------------------------------------------------------------------- a terminal


def test_no_bar_where_nobody_watches(capsys: pytest.CaptureFixture[str]) -> None:
    for output in (Output(), Output(json=True), Output(quiet=True)):
        with output.progress("merging") as progress:
            assert progress is None
    assert capsys.readouterr() == ("", "")


def on_terminal(folder: Path, *arguments: str, **environment: str) -> tuple[str, str, int]:
    """Run a command with a terminal as stderr; returns stdout, what the terminal got, the code."""
    import pty

    own, terminal = pty.openpty()
    kept = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    kept["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    command = [sys.executable, "-m", "loratools", *arguments]
    with subprocess.Popen(
        command,
        cwd=folder,
        env=kept | {"TERM": "xterm", "COLUMNS": "80"} | environment,
        stdout=subprocess.PIPE,
        stderr=terminal,
    ) as child:
        os.close(terminal)
        shown = b""
        try:
            while piece := os.read(own, 65536):
                shown += piece
        except OSError:
            pass  # Linux says so when the other end has closed
        finally:
            os.close(own)
        assert child.stdout is not None
        out = child.stdout.read().decode()
    return out, shown.decode(), child.returncode


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_a_bar_comes_and_goes(here: Path) -> None:
    out, shown, code = on_terminal(here, *MERGE)
    assert code == 0
    assert out.startswith("merged base + adapter -> out\n")
    assert ESCAPE not in out
    assert "merging" in shown
    # Shown again: the cursor. Erased at the end: the line of the bar.
    assert shown.rstrip().endswith(f"{ESCAPE}2K")
    assert shown.rindex(f"{ESCAPE}?25h") > shown.rindex("merging")


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
def test_the_bar_knows_its_end(here: Path) -> None:
    _, shown, _ = on_terminal(here, *MERGE)
    assert re.search(r"698\.1/698\.1 kB", re.sub(r"\x1b\[[0-9;]*m", "", shown))


@pytest.mark.skipif(os.name == "nt", reason="pseudo-terminals")
@pytest.mark.parametrize("asked", [True, False])
def test_colours(here: Path, asked: bool) -> None:
    environment = {} if asked else {"NO_COLOR": "1"}
    _, shown, code = on_terminal(here, "inspect", "nowhere", **environment)
    assert code == 1
    assert bool(re.search(r"\x1b\[[0-9;]*m", shown)) == asked
    assert re.sub(r"\x1b\[[0-9;]*m", "", shown).startswith("Error: no such file")


@pytest.mark.parametrize(("stop", "code"), [(KeyboardInterrupt, 130), (cli.Terminated, 143)])
def test_who_stopped_it_is_in_the_exit_code(
    run: Run, here: Path, monkeypatch: pytest.MonkeyPatch, stop: type[BaseException], code: int
) -> None:
    def stopped(*paths: object, **options: object) -> None:
        raise stop

    monkeypatch.setattr("loratools.summary.summarize_files", stopped)
    done = run("inspect", "adapter")
    assert (done.code, done.out) == (code, "")
    assert "interrupted" in done.err
