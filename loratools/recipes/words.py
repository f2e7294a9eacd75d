"""The words of a written step: what is wrong with them, and which steps they mention."""

from __future__ import annotations

import re
from collections.abc import Iterator

from loratools.held import MARK
from loratools.recipes.faults import Fault
from loratools.recipes.reading import NAME, Option, Word, WrittenStep
from loratools.recipes.verbs import Parameter, Verb
from loratools.suggest import did_you_mean

TRUE, FALSE = frozenset({"true", "yes", "on"}), frozenset({"false", "no", "off"})
_OF_RUN = {
    name: f"say it to the whole: `loratools run --{name}`"
    for name in ("json", "quiet", "verbose", "dry-run", "all")
}
"""Options that steps have not, because ``run`` has them."""

MENTION = re.compile(re.escape(MARK) + rf"({NAME.pattern})(.*)", re.DOTALL)
"""``$NAME``, and what follows: a strength, or a path inside."""


def word_faults(step: WrittenStep, verb: Verb) -> Iterator[Fault]:
    """Yield what is wrong with the names and counts of a step's words."""
    options, where = verb.options, f"step {step.name.text}"
    for name, option in step.options.items():
        if name not in options:
            hint = _OF_RUN.get(name) or did_you_mean(name, options)
            yield Fault(option.line, f"{where}: {verb.name} has no option {name!r}", hint)
        elif fault := _count_fault(options[name], option):
            yield Fault(option.line, f"{where}: {name}: {fault}")
    many = any(one.several for one in verb.arguments)
    most = len(verb.arguments)
    if not many and len(step.arguments) > most:
        line = step.arguments[most].line
        yield Fault(line, f"{where}: {verb.name} takes {most} inputs, not {len(step.arguments)}")


def _count_fault(parameter: Parameter, option: Option) -> str | None:
    texts = [word.text for word in option.words]
    if parameter.switch and (len(texts) != 1 or texts[0].lower() not in TRUE | FALSE):
        return "is true or false"
    if not texts:
        return "has no value"
    return "takes one value" if len(texts) > 1 and not parameter.several else None


def mentions(step: WrittenStep) -> Iterator[str]:
    """Yield the names of steps that a step refers to."""
    for word in _all_words(step):
        if match := MENTION.fullmatch(word.text):
            yield match[1]


def _all_words(step: WrittenStep) -> Iterator[Word]:
    yield from step.arguments
    for option in step.options.values():
        yield from option.words
