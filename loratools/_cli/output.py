"""The only printer: reports to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

import click

from loratools._cli.spectrum_text import PRESENTERS, rows_of
from loratools._cli.usage import usage_words
from loratools.errors import LoratoolsError
from loratools.report import SCHEMA, Json, Note, Report

if TYPE_CHECKING:
    from loratools.streaming.rewriting import Progress

_NOTES_SHOWN = 8
_WORDS_SHOWN = 16
_LINE = 90
"""Characters of a fact's line, its title not counted."""


def wants_json(arguments: Sequence[str]) -> bool:
    """Return whether ``--json`` is among the arguments, before click has parsed them."""
    before_dashes = arguments[: arguments.index("--")] if "--" in arguments else arguments
    return "--json" in before_dashes


@dataclass(frozen=True, slots=True)
class Output:
    """How a command speaks.

    Attributes:
        json: exactly one JSON document on stdout.
        quiet: only errors, and results that were asked for.
        verbose: a table of layers too.
    """

    json: bool = False
    quiet: bool = False
    verbose: bool = False

    def report(self, report: Report) -> None:
        """Show what was done."""
        if self.json:
            click.echo(report.to_json())
        else:
            if not self.quiet:
                self._notes(report.notes)
            if not self.quiet or report.operation == "inspect":
                self._text(report)

    def reports(self, reports: Sequence[Report], *, many: bool) -> None:
        """Show one report, or all of several: a list in a single JSON document."""
        if self.json and many:
            facts = {"reports": [report.to_dict() for report in reports]}
            click.echo(Report(reports[0].operation, facts=facts).to_json())
            return
        for report in reports:
            self.report(report)

    def listing(self, report: Report) -> None:
        """Show a report whose items are the answer."""
        if self.json:
            click.echo(report.to_json())
        else:
            _table(report.items)

    def error(self, error: LoratoolsError) -> None:
        """Show a failure and its next step."""
        self._failure(type(error).__name__, error.message, error.hint)

    def usage_error(
        self, error: click.UsageError, arguments: Sequence[str], commands: Collection[str]
    ) -> int:
        """Show wrong usage of the command line ``arguments``; returns the exit code."""
        if isinstance(error, click.exceptions.NoArgsIsHelpError):
            click.echo(error.format_message(), err=True)
            return 2
        self._failure("UsageError", *usage_words(error, arguments, commands))
        return 2

    def interrupted(self) -> None:
        """Say that the user stopped the command."""
        self._failure("Interrupted", "interrupted; no output was left half-written", None)

    def _failure(self, kind: str, message: str, hint: str | None) -> None:
        if self.json:
            document = {"schema": SCHEMA, "error": kind, "message": message, "hint": hint}
            click.echo(json.dumps(document, indent=2, ensure_ascii=False))
            return
        click.echo(f"{_styled('Error:', 'red')} {message}", err=True)
        if hint:
            click.echo(f"{_styled('Hint:', 'cyan')} {hint}", err=True)

    def _notes(self, notes: Sequence[Note]) -> None:
        warnings = [note for note in notes if note.level == "warning"]
        others = [note for note in notes if note.level != "warning"]
        shown = [*warnings, *(others if self.verbose else others[:_NOTES_SHOWN])]
        for note in shown:
            word, colour = ("Warning:", "yellow") if note.level == "warning" else ("Note:", "blue")
            subject = f"{note.subject}: " if note.subject else ""
            click.echo(f"{_styled(word, colour)} {subject}{note.message}", err=True)
        if len(notes) > len(shown):
            click.echo(f"({len(notes) - len(shown)} more notes with -v or --json)", err=True)

    def _text(self, report: Report) -> None:
        click.echo(_headline(report))
        for name, value in report.facts.items():
            if value not in (None, [], {}):
                title = name.replace("_", " ")
                for line in _lines(name, value):
                    click.echo(f"  {title:<20} {line}")
                    title = ""
        if report.items and (self.verbose or report.operation in _ITEMS_ALWAYS):
            _table(rows_of(report))

    @contextmanager
    def progress(self, title: str) -> Iterator[Progress | None]:
        """Yield a function that advances a bar on stderr, or None where nobody watches."""
        if self.quiet or self.json or not sys.stderr.isatty():
            yield None
            return
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TransferSpeedColumn

        columns = (title, BarColumn(), DownloadColumn(), TransferSpeedColumn())
        console = Console(stderr=True, no_color="NO_COLOR" in os.environ)
        bar = Progress(*columns, console=console, transient=True)
        task = bar.add_task(title)

        def advance(count: int, total: int) -> None:
            # Not before: downloads that come first have bars of their own.
            bar.start()
            bar.update(task, advance=count, total=total)

        try:
            yield advance
        finally:
            bar.stop()


def _styled(word: str, colour: str) -> str:
    return click.style(word, fg=colour, bold=True) if _colours(sys.stderr) else word


def _colours(stream: TextIO) -> bool:
    return stream.isatty() and "NO_COLOR" not in os.environ


_DONE = {
    "merge": ("merged", "would merge"),
    "unmerge": ("unmerged", "would unmerge"),
    "inspect": ("", ""),
    "convert": ("converted", "would convert"),
    "quantize": ("quantised", "would quantise"),
    "dequantize": ("dequantised", "would dequantise"),
    "compose": ("composed", "would compose"),
    "diff": ("compared", "compared"),
    "extract": ("extracted", "would extract"),
    "rebase": ("rebased", "would rebase"),
    "run": ("ran", "would run"),
    "resize": ("resized", "would resize"),
    "push": ("pushed", "would push"),
    "pull": ("pulled", "would pull"),
}


_ITEMS_ALWAYS = frozenset({"run", "formats", "methods"})
"""Operations whose items are the answer, beside their facts."""


def _headline(report: Report) -> str:
    done, planned = _DONE.get(report.operation, (report.operation, report.operation))
    verb = planned if report.dry_run else done
    target = f" -> {report.output}" if report.output else ""
    suffix = " (dry run: nothing was written)" if report.dry_run else ""
    joint = {
        "unmerge": " - ",
        "diff": " and ",
        "inspect": ", ",
        "extract": " to ",
        "rebase": ", ",
    }.get(report.operation, " + ")
    return f"{verb} {joint.join(report.inputs)}".strip() + target + suffix


def _lines(name: str, value: Json) -> list[str]:
    """Return a fact's lines: one for each adapter, one for anything else."""
    if name == "adapters":
        word = "weight" if "weight" in value[0] else "strength"
        return [f"{one['path']} ({word} {one[word]:g}, {_layers(one['layers'])})" for one in value]
    if name in ("ranks", "alphas"):
        return _packed([f"{key} in {_layers(count)}" for key, count in value.items()])
    if name == "choices":
        return ["; ".join(_choice_words(row)) for row in value]
    if name in PRESENTERS:
        return PRESENTERS[name](value)
    if isinstance(value, Mapping):
        return _packed(_words(value))
    return [_value(name, value)]


def _packed(words: Sequence[str]) -> list[str]:
    """Return words with commas between them, on lines that a terminal can hold."""
    lines: list[str] = []
    for position, word in enumerate(words):
        piece = word + "," if position < len(words) - 1 else word
        if lines and len(lines[-1]) + len(piece) < _LINE:
            lines[-1] += " " + piece
        else:
            lines.append(piece)
    return lines


def _choice_words(row: Mapping[str, Json]) -> Iterator[str]:
    """Yield what one line of a what-if table says, the choice's name first."""
    for name, value in row.items():
        title = "" if name == "choice" else f"{name.replace('_', ' ')} "
        yield f"{title}{_value(name, value)}"


def _value(name: str, value: Json) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, (int, float)):
        return _number(name, value)
    if isinstance(value, Mapping):
        return ", ".join(_words(value))
    if isinstance(value, list) and value and all(isinstance(item, int) for item in value):
        return "x".join(map(str, value))
    if isinstance(value, list):
        return "; ".join(_value("", item) for item in value)
    return str(value)


def _words(value: Mapping[str, Json]) -> list[str]:
    words = [f"{key}: {_value(key, item)}" for key, item in value.items() if item is not None]
    more = [f"... {len(words) - _WORDS_SHOWN} more"] if len(words) > _WORDS_SHOWN else []
    return [*words[:_WORDS_SHOWN], *more]


def _layers(count: int) -> str:
    return f"{count} layer" if count == 1 else f"{count} layers"


def _number(name: str, value: float) -> str:
    if name.startswith("bytes"):
        return human_bytes(int(value))
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.2%}" if name.startswith(("relative", "share")) else f"{value:.4g}"


def human_bytes(count: int) -> str:
    """Return a size in the largest unit that keeps it above 1: ``2.2 GB``."""
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _table(items: Sequence[Mapping[str, Json]]) -> None:
    names = [name for name in items[0] if any(item[name] is not None for item in items)]
    rows = [[_cell(name, item[name]) for name in names] for item in items]
    widths = [max(len(row[i]) for row in [names, *rows]) for i in range(len(names))]
    for row in [names, *rows]:
        line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        click.echo("  " + line.rstrip())


def _cell(name: str, value: Json) -> str:
    if isinstance(value, list):
        joint = ", " if any(isinstance(item, str) for item in value) else "x"
        return joint.join(str(item) for item in value)
    return "-" if value is None else _value(name if name.startswith("bytes_") else "", value)
