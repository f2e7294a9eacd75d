"""What a recipe knows of a command: its words, their roles, and how to run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from loratools.report import Report

Role = Literal["input", "output", "value"]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One argument or option.

    Attributes:
        name: the word in a recipe: ``conv-rank``; of an argument, its name in the usage line.
        key: the name among the parsed values.
        flag: the word on the command line, or None for an argument.
        role: whether it is a path that is read, one that is written, or neither.
        adapter: whether the path is an adapter's, which may be a value in memory.
        repository: whether it names a repository on the Hub, which is read whole, at the revision
            that an option may name.
        several: whether it may be given more than once.
        switch: whether it stands alone, without a value.
        required: whether the command cannot do without.
        choices: all values there are, if they are few.
        convert: text → value; raises LoratoolsError for what it cannot be.
    """

    name: str
    key: str
    flag: str | None
    role: Role = "value"
    adapter: bool = False
    repository: bool = False
    several: bool = False
    switch: bool = False
    required: bool = False
    choices: Sequence[str] = ()
    convert: Callable[[str], Any] = str


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command returned: its exit code and what it reported."""

    code: int
    reports: tuple[Report, ...]


@dataclass(frozen=True, slots=True)
class Verb:
    """One command.

    Attributes:
        name: as on the command line.
        parameters: arguments in their order, and options.
        dry_run: the flag that makes it only plan, if it has one.
        parse: command line → values; raises LoratoolsError for wrong usage.
        is_batch: whether these values mean one result for each of several inputs.
        run: command line → outcome.
        beside: values → paths that the command may write beside its output.
        elsewhere: what other tools call it.
    """

    name: str
    parameters: tuple[Parameter, ...]
    dry_run: str | None
    parse: Callable[[Sequence[str]], Mapping[str, Any]]
    is_batch: Callable[[Mapping[str, Any]], bool]
    run: Callable[[Sequence[str]], Outcome]
    beside: Callable[[Mapping[str, Any]], Sequence[str]] = lambda values: ()
    elsewhere: Sequence[str] = ()

    @property
    def arguments(self) -> tuple[Parameter, ...]:
        """What stands without a word before it."""
        return tuple(one for one in self.parameters if one.flag is None)

    @property
    def options(self) -> dict[str, Parameter]:
        """The options by their names in recipes."""
        return {one.name: one for one in self.parameters if one.flag is not None}

    @property
    def result(self) -> Parameter | None:
        """The option that says where the result goes, if there is one."""
        found = self.options.get("output")
        return found if found and found.role == "output" else None
