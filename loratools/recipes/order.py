"""The order of steps: what each needs first, and circles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from loratools.recipes.faults import Fault
from loratools.tensorfiles.destination import settled


def producers(outputs: Mapping[str, Sequence[str]]) -> dict[Path, str]:
    """Return written path → the step that writes it."""
    return {settled(Path(path)): name for name, paths in outputs.items() for path in paths}


def in_order(
    needs: Mapping[str, Sequence[str]], lines: Mapping[str, int], faults: list[Fault]
) -> list[str]:
    """Return the names so that each follows what it needs, else in the given order.

    A circle is added to ``faults``, once.
    """
    order: list[str] = []
    waiting = list(needs)
    while waiting:
        ready = next((name for name in waiting if set(needs[name]) <= set(order)), None)
        if ready is None:
            circle = _circle(needs, waiting)
            faults.append(Fault(lines[circle[0]], _told(circle)))
            break
        order.append(ready)
        waiting.remove(ready)
    return order


def _told(circle: Sequence[str]) -> str:
    if len(circle) == 1:
        return f"step {circle[0]} reads what it writes"
    return f"steps need each other in a circle: {' needs '.join([*circle, circle[0]])}"


def _circle(needs: Mapping[str, Sequence[str]], waiting: Sequence[str]) -> list[str]:
    """Return the names of one circle; each of ``waiting`` needs another of them."""
    path = [waiting[0]]
    while True:
        following = next(name for name in needs[path[-1]] if name in waiting)
        if following in path:
            return path[path.index(following) :]
        path.append(following)
