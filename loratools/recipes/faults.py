"""What is wrong with a recipe: every fault with its line, told together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loratools.errors import LoratoolsError, OptionError

_SHOWN = 20


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that is wrong.

    Attributes:
        line: counted from 1.
        message: what is wrong, without the place.
        hint: the next step.
        kind: the error that it is by itself.
    """

    line: int
    message: str
    hint: str | None = None
    kind: type[LoratoolsError] = OptionError


def raise_faults(source: str, faults: Sequence[Fault]) -> None:
    """Raise one error for all faults, in the order of their lines; nothing if there are none."""
    if not faults:
        return
    ordered = sorted(faults, key=lambda fault: fault.line)
    first = ordered[0]
    if len(ordered) == 1:
        raise first.kind(f"{source}, line {first.line}: {first.message}", first.hint)
    lines = [_told(fault) for fault in ordered[:_SHOWN]]
    lines += [f"  ... and {len(ordered) - _SHOWN} more"] if len(ordered) > _SHOWN else []
    raise first.kind(
        f"{source}: {len(ordered)} faults:\n" + "\n".join(lines), hint="nothing has been run"
    )


def _told(fault: Fault) -> str:
    hint = f" ({fault.hint})" if fault.hint else ""
    return f"  line {fault.line}: {fault.message}{hint}"
