"""The commands as recipes see them, made from click's own declarations."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import click

from loratools._cli.batch import split_inputs
from loratools._cli.options import RepositoryParam
from loratools._cli.output import Output
from loratools._cli.usage import HELP, other_names
from loratools.errors import OptionError
from loratools.recipes.verbs import Outcome, Parameter, Role, Verb
from loratools.report import Report
from loratools.tensorfiles.beside import residual_places

_OWN = frozenset({"json", "quiet", "verbose", "dry_run"})
"""Options that a recipe's steps do not have: ``run`` has them."""


@dataclass(frozen=True, slots=True)
class Listener(Output):
    """Keeps the reports of a command instead of printing them."""

    kept: list[Report] = field(default_factory=list)

    def report(self, report: Report) -> None:
        """Keep one report."""
        self.kept.append(report)

    def reports(self, reports: Sequence[Report], *, many: bool) -> None:
        """Keep several."""
        self.kept.extend(reports)

    def listing(self, report: Report) -> None:
        """Keep a listing."""
        self.kept.append(report)


def make_verbs(context: click.Context, out: Output) -> dict[str, Verb]:
    """Return all commands but the one that asks; steps show their progress as ``out`` would."""
    root = context.find_root()
    group = cast(click.Group, root.command)
    names = [name for name in group.list_commands(root) if name != context.command.name]
    commands = {name: group.get_command(root, name) for name in names}
    return {name: make_verb(found, out) for name, found in commands.items() if found}


def make_verb(command: click.Command, out: Output) -> Verb:
    """Return what a recipe must know of a command."""
    flags = {param.name: param.opts[-1] for param in command.params}
    return Verb(
        command.name or "",
        tuple(_parameter(param) for param in command.params if param.name not in _OWN),
        flags.get("dry_run"),
        partial(_parse, command),
        partial(_is_batch, command),
        partial(_run, command, out),
        partial(_beside, command.name or ""),
        other_names(command.name or ""),
    )


def _beside(name: str, values: Mapping[str, Any]) -> Sequence[str]:
    """Return where a command may write beside its output."""
    if name == "merge" and values.get("residual_rank") is not None:
        return [str(place) for place in residual_places(Path(values["output"]))]
    return ()


def _parameter(param: click.Parameter) -> Parameter:
    """Return an argument or option; its name is its long flag without the dashes."""
    is_option = isinstance(param, click.Option)
    flag = max(param.opts, key=len) if is_option else None
    choices = param.type.choices if isinstance(param.type, click.Choice) else ()
    return Parameter(
        name=flag.lstrip("-") if flag else param.human_readable_name,
        key=param.name or "",
        flag=flag,
        role=cast(Role, getattr(param.type, "role", "value")),
        adapter=getattr(param.type, "is_adapter", False),
        repository=isinstance(param.type, RepositoryParam),
        several=param.multiple or param.nargs != 1,
        switch=bool(getattr(param, "is_flag", False)),
        required=param.required,
        choices=tuple(map(str, choices)),
        convert=partial(_convert, param),
    )


def _convert(param: click.Parameter, text: str) -> Any:
    return _stated(lambda: param.type.convert(text, param, None))


def _parse(command: click.Command, words: Sequence[str]) -> Mapping[str, Any]:
    values: Mapping[str, Any] = _stated(lambda: _context(command, words, None)).params
    return values


def _stated(ask: Callable[[], Any]) -> Any:
    """Return what ``ask`` returns, click's refusals as ours."""
    try:
        return ask()
    except click.MissingParameter as error:
        raise OptionError(error.format_message(), _where_it_goes(error.param)) from error
    except click.BadParameter as error:
        hint = getattr(error, "hint", None)
        raise OptionError(error.message or error.format_message(), hint) from error
    except click.UsageError as error:
        raise OptionError(error.format_message()) from error


def _where_it_goes(param: click.Parameter | None) -> str | None:
    """Return how a recipe says what a command line lacks."""
    if isinstance(param, click.Option):
        return f"add `{max(param.opts, key=len).lstrip('-')}: ...` to the step"
    return "inputs stand behind the command: `merge: [BASE, ADAPTER]`" if param else None


def _context(command: click.Command, words: Sequence[str], out: Output | None) -> click.Context:
    return command.make_context(command.name, list(words), obj=out, **HELP)


def _is_batch(command: click.Command, values: Mapping[str, Any]) -> bool:
    """Return whether the command makes one result for each of several adapters."""
    for param in command.params:
        each = isinstance(param, click.Argument) and param.nargs == -1
        given = values.get(param.name or "")
        if each and given and all(isinstance(path, str) for path in given):
            return split_inputs(given)[1]
    return False


def _run(command: click.Command, out: Output, words: Sequence[str]) -> Outcome:
    listener = Listener(out.json, out.quiet, out.verbose)
    with _context(command, words, listener) as context:
        code = command.invoke(context)
    return Outcome(code if isinstance(code, int) else 0, tuple(listener.kept))
