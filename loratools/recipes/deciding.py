"""Which steps have to run, and what of theirs is in the way."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from loratools.errors import OutputError
from loratools.held import MARK
from loratools.hub.references import is_reference
from loratools.recipes.faults import Fault
from loratools.recipes.records import State, fingerprint, settings_of, why_to_run
from loratools.recipes.remote import Remotes
from loratools.recipes.steps import Step


@dataclass(frozen=True, slots=True, eq=False)
class Decision:
    """What is to happen to a step.

    Attributes:
        step: the step.
        why: why it runs; None if it is skipped.
    """

    step: Step
    why: str | None


def state_of(
    step: Step, held: Mapping[str, State], remotes: Remotes, unknown: Sequence[str] = ()
) -> State:
    """Return what decides what a step makes, as the files are now.

    Args:
        step: the step.
        held: ``$NAME`` → the state of the step that makes it.
        remotes: what the Hub says.
        unknown: paths that are to be written again first.
    """
    inputs: dict[str, str | None] = {}
    for path in step.inputs:
        if path in held:
            inputs[path] = held[path].whole
        elif is_reference(path):
            inputs[path] = remotes[path].fingerprint
        else:
            inputs[path] = None if path in unknown else fingerprint(path)
    return State(settings_of(step.verb.name, step.values), inputs)


def decide(steps: Sequence[Step], remotes: Remotes, *, everything: bool = False) -> list[Decision]:
    """Return for each step, in order, whether and why it runs.

    A step without output answers, and runs each time. One whose adapter stays in memory runs if a
    step that runs reads it.
    """
    states: dict[str, State] = {}
    why: dict[str, str | None] = {}
    by_name = {step.name: step for step in steps}
    for step in steps:
        remade = [name for name in step.needs if why[name] and not by_name[name].held]
        unknown = [path for name in remade for path in step.inputs if _is_of(path, by_name[name])]
        state = state_of(step, states, remotes, unknown)
        if step.held:
            states[f"{MARK}{step.name}"] = state
            why[step.name] = None
        elif not step.outputs:
            why[step.name] = "it has no output to keep"
        elif everything:
            why[step.name] = "all were asked for"
        else:
            why[step.name] = _why(step, state, remade)
    for step in reversed(steps):
        if why[step.name]:
            for name in step.needs:
                if by_name[name].held:
                    why[name] = why[name] or f"{step.name} reads it"
    return [Decision(step, why[step.name]) for step in steps]


def _is_of(path: str, maker: Step) -> bool:
    """Return whether a path is, or lies in, what a step writes."""
    made = (*maker.outputs, *maker.beside)
    return any(path == one or path.startswith(one + os.sep) for one in made)


def _why(step: Step, state: State, remade: Sequence[str]) -> str | None:
    if not all(map(os.path.lexists, step.written)):
        return why_to_run(state, step.written)
    if remade:
        return f"{remade[0]} runs"
    loose = next((p for p, h in state.inputs.items() if h is None and is_reference(p)), None)
    if loose:
        return f"the commit of {loose} is not known"
    return why_to_run(state, step.written)


def output_faults(decisions: Sequence[Decision], *, overwrite: bool) -> Iterator[Fault]:
    """Yield the outputs that exist where a step that runs may not replace them."""
    for decision in decisions:
        step = decision.step
        if decision.why is None or overwrite or step.values.get("overwrite"):
            continue
        for output in step.written:
            if os.path.lexists(output):
                reason = f" ({decision.why})" if str(output) not in decision.why else ""
                fault = f"step {step.name}: {output} already exists{reason}"
                hint = "--overwrite replaces it"
                yield Fault(step.line, fault, hint, OutputError)


def remote_faults(decisions: Sequence[Decision], remotes: Remotes) -> Iterator[Fault]:
    """Yield the references that steps which run could not read."""
    for step in (decision.step for decision in decisions if decision.why):
        for path in filter(is_reference, step.inputs):
            if fault := remotes[path].fault(adapter=path not in step.models):
                message = f"step {step.name}: {fault.message}"
                yield Fault(step.line, message, fault.hint, type(fault))
