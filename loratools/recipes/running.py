"""Running a checked recipe, or planning it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loratools.errors import LoratoolsError
from loratools.held import held_bundle, holding, let_go
from loratools.hub.references import is_reference
from loratools.recipes.deciding import Decision, decide, output_faults, remote_faults, state_of
from loratools.recipes.faults import raise_faults
from loratools.recipes.reading import read_recipe
from loratools.recipes.records import State, write_records
from loratools.recipes.remote import Remotes
from loratools.recipes.sizes import Cost, bytes_beside, estimate, shortages, stored_bytes, totals
from loratools.recipes.steps import Step, check_steps
from loratools.recipes.verbs import Outcome, Verb
from loratools.report import Json, Note, Report

Show = Callable[[Step, Sequence[Report]], None]
"""Called with a step's reports as soon as it is done."""


@dataclass(frozen=True, slots=True)
class Done:
    """What became of a recipe.

    Attributes:
        report: of the whole.
        reports: step → its own.
        code: 0, or that of the step that ended it.
    """

    report: Report
    reports: Mapping[str, Sequence[Report]]
    code: int = 0


@dataclass(slots=True)
class _Progress:
    """What has been done so far."""

    rows: list[dict[str, Json]] = field(default_factory=list)
    reports: dict[str, Sequence[Report]] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    stopped: str | None = None
    code: int = 0


def run_recipe(
    text: str,
    source: str,
    verbs: Mapping[str, Verb],
    *,
    dry_run: bool = False,
    everything: bool = False,
    overwrite: bool = False,
    show: Show | None = None,
) -> Done:
    """Check a recipe whole, then run those of its steps that have something to do.

    Args:
        text: the recipe, YAML.
        source: how errors and the report call it.
        verbs: the commands by name.
        dry_run: plan: estimate what each step takes; nothing is written.
        everything: run also what would make the same again.
        overwrite: let every step replace its output.
        show: told of each step that has run.

    Raises:
        OptionError, MissingFileError, HubError, OutputError: faults of the recipe, before anything
            has run.
        LoratoolsError: what a step raises, with its name and line; those before it are done.
    """
    steps = check_steps(read_recipe(text, source, verbs), verbs, source)
    remotes = Remotes()
    decisions = decide(steps, remotes, everything=everything)
    raise_faults(source, list(remote_faults(decisions, remotes)))
    raise_faults(source, list(output_faults(decisions, overwrite=overwrite)))
    work = _plan if dry_run else _execute
    return work(decisions, source, overwrite, show or (lambda step, reports: None), remotes)


# ── for real ─────────────────────────────────────────────────────────────────────────────────


def _execute(
    decisions: Sequence[Decision], source: str, overwrite: bool, show: Show, remotes: Remotes
) -> Done:
    done = _Progress()
    with holding(one.step.result or "" for one in decisions if one.step.held):
        for position, decision in enumerate(decisions):
            _execute_one(decision, source, overwrite, show, done, remotes)
            _let_go(decisions, position)
            if done.code:
                break
    ran = sum(row["action"] == "run" for row in done.rows)
    facts = {"steps": len(decisions), "run": ran, "skipped": len(done.rows) - ran}
    facts |= {"stopped_at": done.stopped} if done.stopped else {}
    sizes = [row["bytes_written"] for row in done.rows]
    facts["bytes_written"] = sum(size for size in sizes if size is not None)
    return Done(Report("run", (source,), None, facts, tuple(done.rows)), done.reports, done.code)


def _execute_one(
    decision: Decision,
    source: str,
    overwrite: bool,
    show: Show,
    done: _Progress,
    remotes: Remotes,
) -> None:
    step = decision.step
    state = state_of(step, done.states, remotes)
    if step.held:
        done.states[step.result or ""] = state
    if decision.why is None:
        done.rows.append(_row(decision, bytes_written=None))
        return
    with _named(source, step):
        outcome = step.verb.run(_words(step, overwrite))
    done.reports[step.name] = outcome.reports
    show(step, outcome.reports)
    if outcome.code:
        done.stopped, done.code = step.name, outcome.code
    else:
        write_records(state, step.written)
    written = sum(stored_bytes(path) for path in step.written)
    done.rows.append(_row(decision, bytes_written=written))


def _let_go(decisions: Sequence[Decision], position: int) -> None:
    """Forget the values that no later step reads."""
    wanted = {path for one in decisions[position + 1 :] if one.why for path in one.step.inputs}
    for one in decisions[: position + 1]:
        if one.step.held and one.step.result not in wanted:
            let_go(one.step.result or "")


def _words(step: Step, overwrite: bool, *flags: str) -> list[str]:
    switch = step.verb.options.get("overwrite")
    replacing = [switch.flag] if overwrite and switch and switch.flag else []
    return [*replacing, *flags, *step.words]


@contextmanager
def _named(source: str, step: Step) -> Iterator[None]:
    """Add a step's name and line to an error that leaves the block."""
    try:
        yield
    except LoratoolsError as error:
        error.message = f"{source}, line {step.line}: step {step.name}: {error.message}"
        error.args = (error.message,)
        raise


# ── the plan ─────────────────────────────────────────────────────────────────────────────────


def _plan(
    decisions: Sequence[Decision], source: str, overwrite: bool, show: Show, remotes: Remotes
) -> Done:
    done, costs = _Progress(), []
    sizes: dict[str, int] = {}
    adapters = [one.step.result for one in decisions if one.why and _makes_adapter(one.step)]
    with holding(path for path in adapters if path):
        for decision in decisions:
            if decision.why is None:
                done.rows.append(_planned_row(decision))
                continue
            with _named(source, decision.step):
                outcome, tried = _try(decision.step, overwrite)
            step, reports = decision.step, outcome.reports if outcome else ()
            cost = estimate(step, reports, sizes, remotes)
            if step.result:
                sizes[step.result] = cost.held
            sizes |= dict.fromkeys(step.beside, bytes_beside(reports))
            if reports:
                done.reports[step.name] = reports
                show(step, reports)
            costs.append((step, cost))
            done.rows.append(_planned_row(decision, cost, tried))
    facts: dict[str, Json] = {"steps": len(decisions), "run": len(costs)}
    facts |= {"skipped": len(decisions) - len(costs), **totals(costs)}
    notes = [Note(text, "warning") for text in shortages(costs)]
    notes += [
        Note(
            "what it reads is not made yet: its words are checked, its bytes guessed",
            subject=row["step"],
        )
        for row in done.rows
        if row["tried"] is False
    ]
    report = Report("run", (source,), None, facts, tuple(done.rows), tuple(notes), dry_run=True)
    return Done(report, done.reports)


def _makes_adapter(step: Step) -> bool:
    """Return whether a step's result is one adapter, which a plan can hold in memory."""
    result = step.verb.result
    return bool(result and result.adapter and step.result) and not step.is_batch


def _try(step: Step, overwrite: bool) -> tuple[Outcome | None, bool | None]:
    """Make a step's adapter in memory, or its own dry run.

    Returns the outcome, and whether there is one: None where the command has nothing to try.
    """
    makes = _makes_adapter(step)
    if not makes and not step.verb.dry_run:
        return None, None
    if not all(_is_there(path) for path in step.inputs):
        return None, False
    flags = [] if makes or not step.verb.dry_run else [step.verb.dry_run]
    return step.verb.run(_words(step, overwrite, *flags)), True


def _is_there(path: str) -> bool:
    return is_reference(path) or held_bundle(path) is not None or Path(path).exists()


# ── rows ─────────────────────────────────────────────────────────────────────────────────────


def _row(decision: Decision, **more: Any) -> dict[str, Json]:
    step = decision.step
    return {
        "step": step.name,
        "verb": step.verb.name,
        "action": "run" if decision.why else "skip",
        "output": step.result,
        **more,
        "why": decision.why,
    }


def _planned_row(
    decision: Decision, cost: Cost | None = None, tried: bool | None = None
) -> dict[str, Json]:
    return _row(
        decision,
        bytes_read=cost.read if cost else None,
        bytes_written=cost.written if cost else None,
        bytes_memory=cost.memory if cost else None,
        tried=tried,
    )
