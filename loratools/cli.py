"""The command line: a click group whose commands are imported when they run.

Exit codes: 0 done; 1 failed for a stated reason; 2 wrong usage; 130 interrupted.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import NoReturn

import click

from loratools import __version__
from loratools._cli.output import Output, wants_json
from loratools._cli.usage import HELP, NoSuchCommand
from loratools.errors import LoratoolsError, OptionError
from loratools.tensorfiles.inputs import system_hint

COMMANDS: tuple[tuple[str, str], ...] = (
    ("merge", "Fold adapters into a base model."),
    ("unmerge", "Take adapters out of a merged model again."),
    ("convert", "Write adapters in another format, with the same ΔW."),
    ("resize", "Change adapters' rank, by the SVD of their factors."),
    ("compose", "Combine adapters into one, by an exact sum or another method."),
    ("extract", "Write what training changed in a model as an adapter."),
    ("rebase", "Carry an adapter to another base of the same shape."),
    ("quantize", "Write a model in types of fewer bits."),
    ("dequantize", "Write a quantised model in plain numbers."),
    ("run", "Run the steps of a recipe, those that have something to do."),
    ("diff", "Compare two adapters by the change they make."),
    ("inspect", "Say what is in an adapter or a base model."),
    ("push", "Upload an adapter or model to the Hub, with a model card."),
    ("pull", "Fetch an adapter or model from the Hub."),
    ("formats", "List the adapter formats."),
    ("methods", "List the ways of combining adapters."),
    ("demo", "Make a small base and adapter, merge them, prove the result."),
)
"""Names and one-line helps; each command is ``command`` in the module of its name in ``_cli``."""


class LazyGroup(click.Group):
    """A group that imports a command only when it is asked for it."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the table's order."""
        return [name for name, _ in COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in dict(COMMANDS):
            return None
        command: click.Command = import_module(f"loratools._cli.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands from the table, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS))

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Take ``help`` before a command's name for ``--help`` behind it."""
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command."""
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in dict(COMMANDS):
            raise NoSuchCommand(name, list(dict(COMMANDS)), ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings=dict(HELP),
    epilog="Each command's --help has examples. Exit codes: 0 done, 1 failed for a stated "
    "reason, 2 wrong usage, 130 interrupted.",
)
@click.version_option(__version__, prog_name="loratools")
def cli() -> None:
    """Work on LoRA adapters from files alone: merge, unmerge, convert, compare, inspect."""


class Terminated(KeyboardInterrupt):
    """SIGTERM, handled like Ctrl-C so that unfinished output is removed."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, stop)
    code = run(sys.argv[1:] if arguments is None else list(arguments))
    if "torch" in sys.modules:
        _leave(code)
    sys.exit(code)


def _leave(code: int) -> NoReturn:
    """End the process without taking the interpreter apart, which takes 0.15 s with torch in it.

    Nothing is left to do: outputs are synced and renamed, threads have ended.
    """
    with suppress(OSError):
        sys.stdout.flush()
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def run(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit code; errors become messages here."""
    output = Output(json=wants_json(arguments))
    try:
        code = cli.main(args=list(arguments), prog_name="loratools", standalone_mode=False)
    except click.UsageError as error:
        return output.usage_error(error, arguments, dict(COMMANDS))
    except (KeyboardInterrupt, click.Abort) as stopped:
        output.interrupted()
        # click raises an Abort from what stopped it.
        return 143 if Terminated in (type(stopped), type(stopped.__cause__)) else 130
    except BrokenPipeError:
        # The reader has gone (`| head`); there is nobody left to tell.
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
        return 1
    except (LoratoolsError, OSError) as error:
        if os.environ.get("LORATOOLS_DEBUG") == "1":
            raise
        output.error(error if isinstance(error, LoratoolsError) else system_error(error))
        return 2 if isinstance(error, OptionError) else 1
    return code if isinstance(code, int) else 0


def system_error(error: OSError) -> LoratoolsError:
    """Return what the operating system refused as an error that names the file, if it does."""
    where = f"{error.filename}: " if error.filename else ""
    return LoratoolsError(
        f"{where}{error.strerror or error}",
        hint=system_hint(error) or "LORATOOLS_DEBUG=1 shows where it happened",
    )


if __name__ == "__main__":
    main()
