"""A recipe's text as steps of words, each with its line: YAML, of its mappings, lists and texts.

Words stay as they are written: ``to: no`` is the text ``no``, and ``1e-5`` needs no dot.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from loratools.errors import InputError
from loratools.recipes.faults import Fault, raise_faults
from loratools.recipes.verbs import Verb
from loratools.suggest import did_you_mean, nearest

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")

_SHAPE = "a recipe is `steps:` and below it a mapping of names to steps"


@dataclass(frozen=True, slots=True)
class Word:
    """A text and the line it stands in."""

    text: str
    line: int


@dataclass(frozen=True, slots=True)
class Option:
    """An option's values and the line of its name."""

    line: int
    words: tuple[Word, ...]


@dataclass(frozen=True, slots=True)
class WrittenStep:
    """A step as it is written.

    Attributes:
        name: the step's.
        verb: the command.
        arguments: what follows the command.
        options: name → values.
    """

    name: Word
    verb: str
    arguments: tuple[Word, ...] = ()
    options: Mapping[str, Option] = field(default_factory=dict)


def read_recipe(text: str, source: str, verbs: Mapping[str, Verb]) -> tuple[WrittenStep, ...]:
    """Return the steps in the order of the text.

    Raises:
        InputError: no YAML.
        OptionError: YAML of another shape, a step without a command, names given twice.
    """
    root = _composed(text, source)
    faults: list[Fault] = []
    if not isinstance(root, yaml.MappingNode):
        raise_faults(source, [Fault(1, "no steps here", _SHAPE)])
    pairs = dict(_pairs(root, faults))
    others = [word for word in pairs if word.text != "steps"]
    faults += [Fault(word.line, f"unknown word {word.text!r}", _SHAPE) for word in others]
    node = next((value for word, value in pairs.items() if word.text == "steps"), None)
    if not isinstance(node, yaml.MappingNode) or not node.value:
        faults.append(Fault(1, "no steps here", _SHAPE))
        node = yaml.MappingNode("", [])
    steps = [_step(name, value, verbs, faults) for name, value in _pairs(node, faults)]
    raise_faults(source, faults)
    return tuple(step for step in steps if step is not None)


def _composed(text: str, source: str) -> Any:
    try:
        return yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f", line {mark.line + 1}" if mark else ""
        raise InputError(
            f"{source}{line}: not YAML: {error.problem or error.context}",
            hint="names and values are separated by a colon and a space, steps are indented alike, "
            "by blanks",
        ) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{source}: not YAML that a recipe can be: {error}") from error


def _pairs(node: Any, faults: list[Fault]) -> Iterator[tuple[Word, Any]]:
    """Yield the pairs of a mapping, each name once."""
    seen: set[str] = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode):
            faults.append(Fault(line, "a name is a text"))
        elif key.value in seen:
            faults.append(Fault(line, f"{key.value!r} is given twice"))
        else:
            seen.add(key.value)
            yield Word(key.value, line), value


def _step(
    name: Word, node: Any, verbs: Mapping[str, Verb], faults: list[Fault]
) -> WrittenStep | None:
    if not NAME.fullmatch(name.text):
        hint = "a step's name is letters, digits, - and _, a letter first"
        faults.append(Fault(name.line, f"{name.text!r} is no name", hint))
    if not isinstance(node, yaml.MappingNode):
        hint = f"write `{name.text}:`, and below it, indented, `merge: [BASE, ADAPTER]`"
        faults.append(Fault(name.line, f"step {name.text}: no command", hint))
        return None
    options: dict[str, Option] = {}
    for word, value in _pairs(node, faults):
        options[word.text] = Option(word.line, tuple(_words(word, value, faults)))
    found = [key for key in options if key in verbs]
    if len(found) != 1:
        faults.append(_no_single_verb(name, list(options), found, verbs))
        return None
    arguments = options.pop(found[0]).words
    return WrittenStep(name, found[0], arguments, options)


def _words(name: Word, node: Any, faults: list[Fault]) -> Iterator[Word]:
    """Yield a value's texts: one, several in a list, or none."""
    nodes = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for one in nodes:
        line = one.start_mark.line + 1
        if not isinstance(one, yaml.ScalarNode):
            fault = f"{name.text}: a value is a text or a list of texts"
            faults.append(Fault(line, fault, _joined(one)))
        elif one.value or one.style:
            yield Word(one.value, line)


def _joined(node: Any) -> str | None:
    """Return a hint if ``adapter: 0.8`` was written with a blank, which makes a mapping of it."""
    pairs = node.value if isinstance(node, yaml.MappingNode) else []
    if len(pairs) == 1 and all(isinstance(one, yaml.ScalarNode) for one in pairs[0]):
        return f"write {':'.join(one.value for one in pairs[0])}, without a blank"
    return None


def _no_single_verb(
    name: Word, keys: Sequence[str], found: Sequence[str], verbs: Mapping[str, Verb]
) -> Fault:
    if found:
        return Fault(
            name.line,
            f"step {name.text}: {len(found)} commands: {', '.join(found)}",
            "a step is one command; make two steps of it",
        )
    return Fault(
        name.line,
        f"step {name.text}: no command" + (f" among {', '.join(keys)}" if keys else ""),
        _command_hint(keys, verbs),
    )


def _command_hint(keys: Sequence[str], verbs: Mapping[str, Verb]) -> str:
    """Return a hint on the one of a step's words that may be meant for its command."""
    for key in keys:
        if found := [name for name, verb in verbs.items() if key in verb.elsewhere]:
            return f"did you mean {' or '.join(found)} for {key}?"
    near = next((key for key in keys if nearest(key, verbs)), "")
    return did_you_mean(near, verbs)
