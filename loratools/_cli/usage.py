"""Wrong usage, in words that say what to write instead."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import click

from loratools.suggest import nearest

HELP: Mapping[str, Any] = {"help_option_names": ["-h", "--help"]}
"""Settings of every command's context: click keeps what the first one that is made says."""

_COMMANDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("merge", ("fuse", "bake", "apply", "fold", "merge-lora", "merge_and_unload")),
    ("unmerge", ("unfuse", "subtract", "remove", "undo")),
    ("convert", ("export", "translate", "transform")),
    ("compose", ("combine", "mix", "sum", "add", "join", "average", "concat", "blend")),
    ("resize", ("shrink", "svd", "truncate", "reduce", "prune")),
    ("inspect", ("info", "show", "describe", "spectrum", "plot", "stats", "view", "check")),
    ("diff", ("compare", "verify", "test")),
    ("push", ("upload", "publish")),
    ("pull", ("download", "fetch", "get", "clone")),
    ("formats", ("list", "ls", "supported")),
    ("run", ("recipe", "workflow", "batch", "pipeline")),
    ("demo", ("example", "init", "quickstart", "try")),
)
"""Command → what other tools, and people, call it."""

_OPTIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("--overwrite", ("--force", "-f", "--yes", "-y", "--exist-ok", "--replace")),
    ("-o", ("--out", "--outfile", "--output-dir", "--output_dir", "--save-to", "--save_to")),
    ("--rank", ("--dim", "-r", "--r", "--new-rank", "--new_rank", "--lora-rank", "--lora_rank")),
    ("--dtype", ("--precision", "--save-precision", "--save_precision", "--outtype", "--bf16",
                 "--fp16", "--torch-dtype", "--torch_dtype")),
    ("--to", ("--format", "--type", "--target", "--outtype", "--out-type", "--quant")),
    ("--device", ("--gpu", "--cuda", "--cpu")),
    ("--dry-run", ("--dry", "-n", "--plan", "--check")),
    ("--base", ("--base-model", "--base_model", "--model")),
    ("--quiet", ("--silent", "-s")),
)  # fmt: skip
"""Option → what other tools call it; said only where the command has it."""

_STRENGTHS = frozenset(
    {"--scale", "--strength", "--strengths", "--weight", "--multiplier", "--ratio", "--alpha"}
)
_INPUTS = frozenset(
    {"--base", "--base-model", "--base_model", "--model", "-m", "--lora", "--adapter", "--adapters",
     "--models", "--input", "-i", "--path"}
)  # fmt: skip
_TOKENS = frozenset({"--token", "--hf-token", "--api-key"})

_NUMBER = re.compile(r"-(?:\d+\.?\d*|\.\d+)")
_WORDINGS = (
    (re.compile(r" \(?Did you mean.*", re.DOTALL), ""),
    (re.compile(r"is not a valid integer( range)?\."), "is not a whole number."),
    (re.compile(r"is not a valid float( range)?\."), "is not a number."),
)
_VALUES = {
    "bfloat16": "bf16", "float16": "fp16", "f16": "fp16", "half": "fp16", "float32": "fp32",
    "f32": "fp32", "float": "fp32", "full": "fp32", "single": "fp32", "none": "keep",
    "same": "keep", "auto": "keep", "comfy": "comfyui", "kohya": "sd-scripts",
    "automatic1111": "a1111",
}  # fmt: skip
"""Value → what it is called here; said only where that is a choice."""

_REFUSED = re.compile(r"'(?P<value>.*?)' is not\b", re.DOTALL)


class BadWord(click.BadParameter):
    """A value that is refused, with the next step."""

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        ctx: click.Context | None = None,
        param: click.Parameter | None = None,
    ) -> None:
        super().__init__(message, ctx, param)
        self.hint = hint


class NoSuchCommand(click.UsageError):
    """A word that is no command."""

    def __init__(self, name: str, known: Sequence[str], ctx: click.Context) -> None:
        super().__init__(f"No such command {name!r}.", ctx)
        self.name, self.known = name, known


def other_names(command: str) -> tuple[str, ...]:
    """Return what other tools, and people, call a command."""
    return dict(_COMMANDS).get(command, ())


def usage_words(
    error: click.UsageError, arguments: Sequence[str], commands: Collection[str]
) -> tuple[str, str]:
    """Return what is wrong with the arguments, and the next step.

    Args:
        error: click's.
        arguments: the whole command line.
        commands: the names that there are.
    """
    path = error.ctx.command_path if error.ctx else _command_path(arguments, commands)
    found = next((row for row in _WORDS if isinstance(error, row[0])), None)
    hint = found[1](error, arguments) if found else None
    page = f"see `{path} --help`"
    return _plain(error.format_message()), f"{hint} ({page})" if hint else page


def _plain(message: str) -> str:
    """Return click's message without its own guesses, and numbers by their usual names."""
    for theirs, ours in _WORDINGS:
        message = theirs.sub(ours, message)
    return message


def _command_path(arguments: Sequence[str], commands: Collection[str]) -> str:
    """Return the command that errors of click's parser do not tell."""
    name = next((word for word in arguments if word in commands), None)
    return f"loratools {name}" if name else "loratools"


def _meant(names: Iterable[str]) -> str | None:
    words = " or ".join(names)
    return f"did you mean {words}?" if words else None


def _of_command(error: click.UsageError, _: Sequence[str]) -> str | None:
    wrong = cast(NoSuchCommand, error)
    word = wrong.name.lower()
    called = [name for name, others in _COMMANDS if word in others]
    return _meant(called or nearest(word, wrong.known, count=2))


def _of_option(error: click.UsageError, arguments: Sequence[str]) -> str | None:
    name = cast(click.NoSuchOption, error).option_name
    whole = next((word for word in arguments if word.startswith(name)), name)
    command = error.ctx.command if error.ctx else None
    if _NUMBER.fullmatch(whole):
        return f"a strength stands after its adapter's last colon: ADAPTER:{whole}"
    if not whole.startswith("--") and (Path(whole).suffix or Path(whole).exists()):
        return f"a path that begins with a dash is written ./{whole}"
    if command is None or isinstance(command, click.Group):
        return "options stand behind the command: loratools COMMAND ... " + name
    return _known_elsewhere(name, command) or _meant(nearest(name, _flags(command), count=2))


def _known_elsewhere(name: str, command: click.Command) -> str | None:
    """Return a hint on an option that other tools have."""
    flags = set(_flags(command))
    called = [flag for flag, others in _OPTIONS if flag in flags and name in others]
    arguments = [param.make_metavar(click.Context(command)) for param in _arguments(command)]
    if called:
        return _meant(called)
    if name in _STRENGTHS and any("[:" in word for word in arguments):
        return "a strength stands after its adapter's last colon: ADAPTER:0.8"
    if name in _INPUTS and arguments:
        return f"inputs stand without an option, in this order: {' '.join(arguments)}"
    if name in _TOKENS:
        return "set HF_TOKEN in the environment, or run `hf auth login`"
    return None


def _flags(command: click.Command) -> list[str]:
    options = (param for param in command.params if isinstance(param, click.Option))
    return [flag for option in options for flag in (*option.opts, "--help")]


def _arguments(command: click.Command) -> list[click.Argument]:
    return [param for param in command.params if isinstance(param, click.Argument)]


def _of_value(error: click.UsageError, _: Sequence[str]) -> str | None:
    wrong = cast(click.BadParameter, error)
    if hint := getattr(wrong, "hint", None):
        return str(hint)
    kind: Any = wrong.param.type if wrong.param else None
    match = _REFUSED.match(wrong.message)
    if not isinstance(kind, click.Choice) or match is None:
        return None
    choices, value = list(map(str, kind.choices)), match["value"].lower()
    called = _VALUES.get(value)
    return _meant([called] if called in choices else nearest(value, choices, count=2))


def _of_words(error: click.UsageError, _: Sequence[str]) -> str | None:
    """Return the first example of the command's help: what belongs where is seen there."""
    text = (error.ctx.command.epilog if error.ctx else None) or ""
    lines = text.partition("Examples:\n")[2].splitlines()
    return f"for example `{lines[0].strip()}`" if lines else None


Words = Callable[[click.UsageError, Sequence[str]], str | None]
_WORDS: tuple[tuple[type[click.UsageError], Words], ...] = (
    (NoSuchCommand, _of_command),
    (click.NoSuchOption, _of_option),
    (click.MissingParameter, _of_words),
    (click.BadParameter, _of_value),
    (click.UsageError, _of_words),
)
"""Kind of wrong usage → what to write instead; the first that fits counts."""
