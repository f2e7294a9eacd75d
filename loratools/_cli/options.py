"""Options and argument types that several commands share, each declared once."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from loratools._cli.output import Output
from loratools.hub.client import BARS
from loratools.hub.references import SCHEME

Command = TypeVar("Command", bound=Callable[..., Any])

EMPTY = "an empty path; is a variable unset?"


class StrengthParam(click.ParamType):  # type: ignore[type-arg]
    """``ADAPTER[:STRENGTH]``: a path or reference, with a number after the last colon."""

    name = "ADAPTER[:STRENGTH]"
    role = "input"
    is_adapter = True

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer files and folders."""
        return [CompletionItem(incomplete, type="file")]

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, float]:
        """Split the strength off; a path that exists as it stands is never split."""
        if isinstance(value, tuple):
            return value
        if not value:
            self.fail(EMPTY, param, ctx)
        word = "weight" if param and "WEIGHT" in str(param.metavar) else "strength"
        head, colon, tail = str(value).rpartition(":")
        if not colon or Path(value).exists() or _is_drive(head):
            return str(value), 1.0
        try:
            strength = float(tail)
        except ValueError:
            if Path(head).exists():
                self.fail(f"{word} {tail!r} after {head} is not a number", param, ctx)
            return str(value), 1.0
        if not math.isfinite(strength) or strength == 0:
            self.fail(f"{word} {tail} after {head}: give a finite number other than 0", param, ctx)
        if not head:
            self.fail(f"{value!r} has a {word} but no path", param, ctx)
        return head, strength


def _is_drive(head: str) -> bool:
    """Return whether what stands before the last colon is a Windows drive, or ``hf``."""
    if f"{head}://" == SCHEME:
        return True
    return os.name == "nt" and len(head) == 1 and head.isalpha()


class PathParam(click.ParamType):  # type: ignore[type-arg]
    """A path or reference; the empty one would mean the working directory.

    Recipes and completion go by what is said here.

    Attributes:
        role: ``input`` for what is read, ``output`` for what is written.
        is_adapter: whether it is an adapter's, which a recipe may hand over in memory.
    """

    name = "PATH"

    def __init__(self, role: str = "input", *, adapter: bool = False) -> None:
        self.role = role
        self.is_adapter = adapter

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer files and folders."""
        return [CompletionItem(incomplete, type="file")]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse the empty path."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        return value


class TableName(click.ParamType):  # type: ignore[type-arg]
    """A name in a table, which the operation checks; completion offers the table's names."""

    def __init__(self, name: str, names: Callable[[], Iterable[str]]) -> None:
        self.name = name
        self.names = names

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the names that begin so."""
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


def _formats() -> Iterable[str]:
    from loratools.formats import FORMATS

    return [row.name for row in FORMATS if row.writes]


def _methods() -> Iterable[str]:
    from loratools.merge_methods import METHODS

    return [row.name for row in METHODS]


def _architectures() -> Iterable[str]:
    from loratools.keymaps.registry import ARCHITECTURES

    return [architecture.id for architecture in ARCHITECTURES]


FORMAT_NAME = TableName("FORMAT", _formats)
METHOD_NAME = TableName("METHOD", _methods)
ARCH_NAME = TableName("ARCH", _architectures)

Strengths = tuple[tuple[str, float], ...]


def adapters_argument(*, required: bool, word: str = "STRENGTH") -> Callable[[Command], Command]:
    """Return the decorator for ``ADAPTER[:STRENGTH]...``."""
    return click.argument(
        "adapters",
        nargs=-1,
        required=required,
        type=StrengthParam(),
        metavar=f"ADAPTER[:{word}]...",
    )


def output_options(command: Command) -> Command:
    """Add ``--json``, ``-q`` and ``-v``; the command receives ``out``, an Output."""

    @wraps(command)
    def with_output(*args: Any, json: bool, quiet: bool, verbose: bool, **kwargs: Any) -> Any:
        # A recipe that runs the command listens in the caller's place.
        listening = click.get_current_context().find_object(Output)
        out = listening or Output(json, quiet, verbose)
        bars = BARS.set(not (out.json or out.quiet))
        try:
            return command(*args, out=out, **kwargs)
        finally:
            BARS.reset(bars)

    flags = (
        click.option("--json", is_flag=True, help="Print one JSON document on stdout."),
        click.option("-q", "--quiet", is_flag=True, help="Print errors only."),
        click.option("-v", "--verbose", is_flag=True, help="Print every layer and note."),
    )
    decorated: Any = with_output
    for flag in reversed(flags):
        decorated = flag(decorated)
    result: Command = decorated
    return result


PATH = PathParam()
ADAPTER = PathParam(adapter=True)
OUT = PathParam("output")
ADAPTER_OUT = PathParam("output", adapter=True)
OUTPUT = click.option(
    "-o", "--output", required=True, type=OUT, metavar="OUT",
    help="What to write: a folder, or a file.",
)  # fmt: skip
ADAPTER_OUTPUT = click.option(
    "-o", "--output", required=True, type=ADAPTER_OUT, metavar="OUT",
    help="What to write: a folder, or a file.",
)  # fmt: skip
OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Plan and check everything, write nothing, exit alike."
)
DEVICE = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE",
    help="Where to compute: cpu, cuda, cuda:N, mps or auto.",
)  # fmt: skip
ARCH = click.option(
    "--arch", type=ARCH_NAME, metavar="ARCH", help="The architecture, where the files do not tell."
)
DTYPE = click.option(
    "--dtype", default="keep", show_default=True,
    type=click.Choice(["keep", "fp32", "bf16", "fp16"]), help="Float type of the output.",
)  # fmt: skip


def examples(*lines: str) -> str:
    """Return an epilog that shows the lines as they are typed."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
