"""``loratools run``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loratools._cli.options import PATH, examples, output_options
from loratools._cli.output import Output
from loratools.errors import InputError, MissingFileError
from loratools.report import Report
from loratools.tensorfiles.missing import no_such_path

if TYPE_CHECKING:
    from loratools.recipes.steps import Step


@click.command(
    "run",
    epilog=examples("loratools run recipe.yaml --dry-run", "loratools run recipe.yaml --json"),
)
@click.argument("recipe", type=PATH)
@click.option("--all", "everything", is_flag=True, help="Run also the steps that are up to date.")
@click.option("--overwrite", is_flag=True, help="Let every step replace its output.")
@click.option(
    "--dry-run",
    is_flag=True,
    help="Check everything, estimate memory, disk and bytes of each step, write nothing.",
)
@output_options
def command(recipe: str, everything: bool, overwrite: bool, dry_run: bool, out: Output) -> int:
    """Run the steps of RECIPE, a YAML file (- for standard input).

    A step is a command with the words of the command line. Adapters without an output are handed on
    in memory, as $NAME. Everything is checked before the first step runs, and steps whose inputs
    and options are unchanged are skipped.
    """
    from loratools._cli.verbs import make_verbs
    from loratools.recipes.running import run_recipe

    def show(step: Step, reports: Sequence[Report]) -> None:
        if not out.json and (out.verbose or (step.result is None and not dry_run)):
            for report in reports:
                out.report(report)

    done = run_recipe(
        _text(recipe),
        recipe,
        make_verbs(click.get_current_context(), out),
        dry_run=dry_run,
        everything=everything,
        overwrite=overwrite,
        show=show,
    )
    report = done.report
    if out.json:
        documents = {name: [one.to_dict() for one in each] for name, each in done.reports.items()}
        report = replace(report, facts={**report.facts, "reports": documents})
    out.report(report)
    return done.code


def _no_recipe(path: Path) -> MissingFileError:
    if path.is_dir():
        return MissingFileError(f"{path}: a folder, not a recipe", "name the YAML file itself")
    error = no_such_path(path, "file")
    error.hint = f"{error.hint}; a recipe is a YAML file, - reads standard input"
    return error


def _text(recipe: str) -> str:
    """Return the recipe's text; raises MissingFileError, InputError."""
    path = Path(recipe)
    if recipe != "-" and not path.is_file():
        raise _no_recipe(path)
    data = sys.stdin.buffer.read() if recipe == "-" else path.read_bytes()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{recipe}: not UTF-8 text", hint="save it again as UTF-8") from error
