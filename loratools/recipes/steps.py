"""From written steps to steps that can be run: words checked, references resolved, in order."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from loratools.errors import LoratoolsError, MissingFileError
from loratools.held import MARK
from loratools.hub.references import is_reference, reference_at
from loratools.recipes.faults import Fault, raise_faults
from loratools.recipes.order import in_order, producers
from loratools.recipes.reading import NAME, Word, WrittenStep
from loratools.recipes.verbs import Parameter, Verb
from loratools.recipes.words import MENTION, TRUE, mentions, word_faults
from loratools.suggest import did_you_mean
from loratools.tensorfiles.destination import settled
from loratools.tensorfiles.missing import no_such_path


@dataclass(frozen=True, slots=True, eq=False)
class Step:
    """A step that can be run.

    Attributes:
        name: its name.
        line: where it is written.
        verb: its command.
        words: the command line without the command.
        values: what the words mean, by parameter.
        needs: steps whose results it reads.
        inputs: paths that are read, in order; ``$NAME`` for values in memory.
        models: those of them that are no adapters.
        repositories: those of them that are read whole, from the Hub.
        outputs: paths that are written.
        beside: paths of which one may be written too.
        held: whether its result stays in memory, as ``$NAME``.
    """

    name: str
    line: int
    verb: Verb
    words: tuple[str, ...]
    values: Mapping[str, Any]
    needs: tuple[str, ...]
    inputs: tuple[str, ...]
    models: tuple[str, ...]
    repositories: tuple[str, ...]
    outputs: tuple[str, ...]
    beside: tuple[str, ...]
    held: bool

    @property
    def written(self) -> tuple[str, ...]:
        """Its outputs, and beside them what is there, or if nothing is, what may have been."""
        there = tuple(path for path in self.beside if os.path.lexists(path))
        return (*self.outputs, *(there or self.beside[:1]))

    @property
    def result(self) -> str | None:
        """What the step makes: a path, or a name for a value in memory."""
        if self.held:
            return MARK + self.name
        return self.outputs[0] if self.outputs else None

    @property
    def is_batch(self) -> bool:
        """Whether it makes one result for each of several inputs."""
        return self.verb.is_batch(self.values)


@dataclass(frozen=True, slots=True)
class _Draft:
    """A written step, its command, and where its result is known to go."""

    written: WrittenStep
    verb: Verb
    result: str | None
    held: bool


def check_steps(
    written: Sequence[WrittenStep], verbs: Mapping[str, Verb], source: str
) -> tuple[Step, ...]:
    """Return the steps in an order in which they can be run; of equal ones, the written.

    Raises one error that tells every fault with its line: unknown options and values, references to
    nothing, missing inputs, outputs that collide, circles.
    """
    faults: list[Fault] = []
    mentioned = {name for one in written for name in mentions(one)}
    drafts = {
        one.name.text: _draft(one, verbs[one.verb], one.name.text in mentioned) for one in written
    }
    steps = []
    for draft in drafts.values():
        before = len(faults)
        faults += word_faults(draft.written, draft.verb)
        if len(faults) == before and (step := _step(draft, drafts, faults)):
            steps.append(step)
    second = {step.name: step.beside for step in steps}
    made = producers(
        {name: [*_outputs_of(one), *second.get(name, ())] for name, one in drafts.items()}
    )
    linked = {step.name: _with_needs(step, made) for step in steps}
    for step in linked.values():
        faults += _input_faults(step, made)
        if step.held and step.name not in mentioned:
            hint = f"give it an `output:`, or let a step read {MARK}{step.name}"
            faults.append(Fault(step.line, f"step {step.name}: nothing uses its adapter", hint))
    faults += _collisions(steps)
    needs = {name: [one for one in step.needs if one in linked] for name, step in linked.items()}
    order = in_order(needs, {name: step.line for name, step in linked.items()}, faults)
    raise_faults(source, faults)
    return tuple(linked[name] for name in order)


def _draft(step: WrittenStep, verb: Verb, mentioned: bool) -> _Draft:
    parameter = verb.result
    given = step.options.get("output")
    path = given.words[0].text if given and given.words else None
    can = parameter is not None and parameter.adapter and path is None
    held = can and (mentioned or (parameter is not None and parameter.required))
    return _Draft(step, verb, MARK + step.name.text if held else path, held)


def _outputs_of(draft: _Draft) -> list[str]:
    """Return the paths that a step is written to write."""
    options = draft.written.options
    names = [name for name, one in draft.verb.options.items() if one.role == "output"]
    given = [options[name].words for name in names if name in options]
    return [words[0].text for words in given if words]


# ── from words to values ─────────────────────────────────────────────────────────────────────


def _step(draft: _Draft, drafts: Mapping[str, _Draft], faults: list[Fault]) -> Step | None:
    """Return a step with its words parsed, or None with what is wrong among ``faults``."""
    step, verb, before = draft.written, draft.verb, len(faults)
    needs = tuple(dict.fromkeys(mentions(step)))
    words = [*_option_words(draft, drafts, faults), "--"]
    words += [_resolved(word, step, drafts, faults) for word in step.arguments]
    if len(faults) > before:
        return None
    try:
        values = verb.parse(words)
    except LoratoolsError as error:
        faults.append(_fault(step.name.line, step, error))
        return None
    read, wrote = (list(_paths(verb, values, role)) for role in ("input", "output"))
    inputs = [path for _, found in read for path in found]
    models = [path for one, found in read if not one.adapter for path in found]
    whole = [path for one, found in read if one.repository for path in found]
    outputs = [path for _, found in wrote for path in found]
    return Step(
        step.name.text,
        step.name.line,
        verb,
        tuple(words),
        values,
        needs,
        tuple(dict.fromkeys(inputs)),
        tuple(dict.fromkeys(models)),
        tuple(whole),
        tuple(path for path in outputs if not (draft.held and path == draft.result)),
        tuple(verb.beside(values)),
        draft.held,
    )


def _option_words(
    draft: _Draft, drafts: Mapping[str, _Draft], faults: list[Fault]
) -> Iterator[str]:
    options = draft.verb.options
    for name, option in draft.written.options.items():
        parameter = options[name]
        if parameter.switch:
            yield from [parameter.flag or ""] if option.words[0].text.lower() in TRUE else []
            continue
        for word in option.words:
            text = word.text
            if parameter.role == "input":
                text = _resolved(word, draft.written, drafts, faults)
            try:
                parameter.convert(text)
            except LoratoolsError as error:
                faults.append(_fault(word.line, draft.written, error, parameter))
            # One word: a value may begin with a dash.
            yield f"{parameter.flag}={text}"
    if draft.held and draft.verb.result:
        yield f"{draft.verb.result.flag}={draft.result}"


def _fault(
    line: int, step: WrittenStep, error: LoratoolsError, parameter: Parameter | None = None
) -> Fault:
    hint = error.hint
    where = f"step {step.name.text}"
    if parameter is not None:
        where += f": {parameter.name}"
        words = [word.text for word in step.options[parameter.name].words]
        hint = hint or (did_you_mean(words[0], parameter.choices) if parameter.choices else None)
    return Fault(line, f"{where}: {error.message}", hint, type(error))


def _resolved(
    word: Word, step: WrittenStep, drafts: Mapping[str, _Draft], faults: list[Fault]
) -> str:
    """Return a word with the name of a step replaced by what the step makes."""
    match = MENTION.fullmatch(word.text)
    if match is None:
        return word.text
    name, rest = match[1], match[2]
    where = f"step {step.name.text}"
    if name not in drafts:
        fault = f"{where}: there is no step {name!r}"
        faults.append(Fault(word.line, fault, did_you_mean(name, drafts)))
        return word.text
    target = drafts[name]
    if target.result is None:
        makes = "has no output" if target.verb.result else f"is {target.verb.name}: makes nothing"
        faults.append(Fault(word.line, f"{where}: step {name} {makes}", _output_hint(name, target)))
        return word.text
    if target.held and rest.partition(":")[0]:
        fault = f"{where}: {word.text}: {MARK}{name} is an adapter in memory, not a folder"
        faults.append(Fault(word.line, fault, _output_hint(name, target)))
    return target.result + rest


def _output_hint(name: str, target: _Draft) -> str | None:
    return f"give step {name} an `output:`" if target.verb.result else None


def _paths(
    verb: Verb, values: Mapping[str, Any], role: str
) -> Iterator[tuple[Parameter, list[str]]]:
    """Yield the parameters of a role with their paths."""
    for parameter in verb.parameters:
        value = values.get(parameter.key)
        if parameter.repository:
            value = reference_at(str(value), values.get("revision"))
        if parameter.role == role and value is not None:
            yield parameter, list(_texts(value))


def _texts(value: Any) -> Iterator[str]:
    """Yield paths from a path, a (path, strength) pair, or a sequence of either."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _texts(one)


# ── all steps together ───────────────────────────────────────────────────────────────────────


def _with_needs(step: Step, made: Mapping[Path, str]) -> Step:
    """Add the steps that write a path which this one reads."""
    makers = [_maker(path, made) for path in step.inputs]
    found = [name for name in makers if name is not None]
    return replace(step, needs=tuple(dict.fromkeys((*step.needs, *found))))


def _maker(path: str, made: Mapping[Path, str]) -> str | None:
    """Return the step that writes a path or a folder around it."""
    place = settled(Path(path))
    return next((made[one] for one in (place, *place.parents) if one in made), None)


def _input_faults(step: Step, made: Mapping[Path, str]) -> Iterator[Fault]:
    where = f"step {step.name}"
    for path in step.inputs:
        if path.startswith(MARK) and NAME.fullmatch(path[1:]):
            if path in step.models:
                hint = f"give step {path[1:]} an `output:`"
                fault = f"{where}: {path} is an adapter in memory, and {step.verb.name} wants files"
                yield Fault(step.line, fault, hint)
            continue
        if is_reference(path) or Path(path).exists() or _maker(path, made):
            continue
        error = no_such_path(path)
        yield Fault(step.line, f"{where}: {error.message}", error.hint, MissingFileError)
    if step.held and step.is_batch:
        hint = "give it an `output:` folder"
        yield Fault(step.line, f"{where}: several results are no single value", hint)


def _collisions(steps: Sequence[Step]) -> Iterator[Fault]:
    """Yield outputs that two steps write, or that lie inside each other."""
    places: dict[Path, Step] = {}
    for step in steps:
        for path in (*step.outputs, *step.beside):
            place = settled(Path(path))
            for other, owner in places.items():
                if place == other or other in place.parents or place in other.parents:
                    fault = f"step {step.name}: output {path} collides with that of {owner.name}"
                    yield Fault(step.line, fault, "choose another output for one of them")
            places[place] = step
