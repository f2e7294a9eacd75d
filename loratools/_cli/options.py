"""Options and argument types that several commands share, each declared once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

import click
from click.shell_completion import CompletionItem

from loratools._cli.output import Output
from loratools._cli.type_names import BLOCK_TYPES, FOLDER_TYPES, GGUF_MIXES
from loratools._cli.usage import BadWord
from loratools.hub.client import BARS
from loratools.hub.references import SCHEME, is_reference
from loratools.suggest import did_you_mean

Command = TypeVar("Command", bound=Callable[..., Any])

EMPTY = "an empty path; is a variable unset?"
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")


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
            if head and not (Path(head).exists() or _is_reference_before(head, tail)):
                return str(value), 1.0
            raise BadWord(
                f"{word} {tail!r} after {head} is not a number", _as_number(head, tail), ctx, param
            ) from None
        if not math.isfinite(strength) or strength == 0:
            hint = f"leave the adapter out, or write a number: {head}:0.8"
            message = f"{word} {tail} after {head}: give a finite number other than 0"
            raise BadWord(message, hint, ctx, param)
        if not head:
            hint = f"write it behind its adapter, without a blank: ADAPTER{value}"
            raise BadWord(f"{value!r} has a {word} but no path", hint, ctx, param)
        return head, strength


def _is_reference_before(head: str, tail: str) -> bool:
    """Return whether ``tail`` follows a whole reference, whose own parts have no colon."""
    return is_reference(head) and "/" not in tail


def _as_number(head: str, tail: str) -> str:
    """Return how a strength is written that is no number."""
    if tail.endswith("%") and _float(tail[:-1]) is not None:
        return f"write {head}:{float(tail[:-1]) / 100:g}"
    if (number := _float(tail.replace(",", "."))) is not None:
        return f"write {head}:{number:g}"
    return f"write a number behind the colon, {head or 'ADAPTER'}:0.8, or leave out the colon"


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


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
        """Refuse the empty path, and an output that is not on this machine."""
        if value == "":
            self.fail(EMPTY, param, ctx)
        if self.role == "output" and _ADDRESS.match(str(value)):
            hint = "write to a folder or file here; `loratools push` uploads it"
            raise BadWord(f"{value} is not on this machine", hint, ctx, param)
        return value


class RepositoryParam(click.ParamType):  # type: ignore[type-arg]
    """``OWNER/NAME`` or a reference, that is read."""

    name = "REPO_ID"
    role = "input"
    is_adapter = False


class TableName(click.ParamType):  # type: ignore[type-arg]
    """A name in a table; completion offers the table's names.

    The operation checks it, or where it may have no use for it, so that a mistyped name would
    pass unseen, what has a ``noun`` is checked here; ``note`` ends the hint.
    """

    def __init__(
        self,
        name: str,
        names: Callable[[], Iterable[str]],
        *,
        noun: str = "",
        note: str = "",
    ) -> None:
        self.name = name
        self.names = names
        self.noun = noun
        self.note = note

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Refuse a name that is not in the table, if that is checked here."""
        if self.noun and str(value).lower() not in {name.lower() for name in self.names()}:
            words = did_you_mean(str(value), self.names())
            raise BadWord(f"no {self.noun} is called {value!r}", words + self.note, ctx, param)
        return value

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        """Offer the names that begin so."""
        return [CompletionItem(name) for name in self.names() if name.startswith(incomplete)]


def _formats() -> Iterable[str]:
    from loratools.formats import FORMATS

    return [row.name for row in FORMATS if row.writes]


def _extracted() -> Iterable[str]:
    from loratools.formats import FORMATS

    return [row.name for row in FORMATS if row.extracts]


def _methods() -> Iterable[str]:
    from loratools.merge_methods import METHODS

    return [row.name for row in METHODS]


def _architectures() -> Iterable[str]:
    from loratools.keymaps.registry import ARCHITECTURES

    return [architecture.id for architecture in ARCHITECTURES]


def _devices() -> Iterable[str]:
    return ("cpu", "cuda", "mps", "auto")


def _mixes_and_types() -> Iterable[str]:
    return (*GGUF_MIXES, *FOLDER_TYPES)


def _quant_words() -> Iterable[str]:
    return ("keep", "dequantize", *BLOCK_TYPES)


FORMAT_NAME = TableName("FORMAT", _formats)
EXTRACTED_NAME = TableName("FORMAT", _extracted)
METHOD_NAME = TableName("METHOD", _methods)
ARCH_NAME = TableName(
    "ARCH", _architectures, noun="architecture", note="; language models need none"
)
DEVICE_NAME = TableName("DEVICE", _devices)
QUANT_NAME = TableName("TYPE", _quant_words)
TYPE_NAME = TableName("TYPE", _mixes_and_types)

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


def output_option(text: str, kind: PathParam = OUT) -> Callable[[Command], Command]:
    """Return the decorator for ``-o``; ``text`` says what is written."""
    return click.option("-o", "--output", required=True, type=kind, metavar="OUT", help=text)


def dtype_option(text: str, *more: str) -> Callable[[Command], Command]:
    """Return the decorator for ``--dtype``; ``more`` are words beside the usual ones."""
    words = click.Choice(["keep", "fp32", "bf16", "fp16", *more])
    return click.option("--dtype", default="keep", show_default=True, type=words, help=text)


OVERWRITE = click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Plan and check everything, write nothing, exit alike."
)
FOR_ADAPTER = click.option(
    "--for-adapter", type=ADAPTER, metavar="ADAPTER",
    help="Choose what this adapter was trained against, by the base that it records.",
)  # fmt: skip
DEVICE = click.option(
    "--device", default="cpu", show_default=True, metavar="DEVICE", type=DEVICE_NAME,
    help="Where to compute: cpu, cuda, cuda:N, mps, or auto for the GPU if there is one.",
)  # fmt: skip
ARCH = click.option(
    "--arch", type=ARCH_NAME, metavar="ARCH",
    help="The architecture (sdxl, flux1 ...), where the files do not tell.",
)  # fmt: skip
DTYPE = dtype_option("Type of the output's float tensors.")


def examples(*lines: str) -> str:
    """Return an epilog that shows the lines as they are typed."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)
