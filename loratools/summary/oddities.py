"""What a reader of an adapter should know: numbers that are none, layers that do nothing, gaps."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence

from loratools.adapter import Adapter, natural_key
from loratools.deltas import AdditiveDelta
from loratools.linalg.finite import is_finite
from loratools.report import Json, Note
from loratools.spectra.places import names_networks, place_of
from loratools.suggest import counted

_NUMBERS = re.compile(r"(?<=[._])\d+(?=[._]|$)")
_SHOWN = 8


def find_oddities(
    adapter: Adapter, items: Sequence[Mapping[str, Json]], *, values: bool = True
) -> Iterator[Note]:
    """Yield a note for each oddity.

    Args:
        adapter: the adapter.
        items: the rows of its layers.
        values: whether its tensors hold their numbers.
    """
    if values:
        yield from _non_finite(adapter)
    else:
        yield Note(
            "only the header was fetched: norms, NaN and untrained layers are not looked at; "
            "--spectrum fetches the weights"
        )
    zero = [item["module"] for item in items if item["delta_norm"] == 0]
    if zero:
        words = "layer changes nothing" if len(zero) == 1 else "layers change nothing"
        yield Note(f"{len(zero)} {words} (an untrained lora_B is zero)", "warning")
    for delta in adapter.layers.values():
        if delta.obstacle:
            yield Note(f"cannot be merged into the original base: {delta.obstacle}", "warning")
            break
        if not isinstance(delta, AdditiveDelta) and delta.kind == "moved_base":
            yield Note("its initialisation moved the base; merging recomputes the start")
            break
    yield from _gaps(adapter)


def _non_finite(adapter: Adapter) -> Iterator[Note]:
    for name, tensor in adapter.named_tensors():
        if not is_finite(tensor):
            yield Note("holds NaN or infinity; merging it is refused", "warning", name)


def _gaps(adapter: Adapter) -> Iterator[Note]:
    """Note targets that some blocks of a stack have and others in between lack.

    Stacks within stacks (a U-Net's) are left out: their blocks differ by design.
    """
    stacks: dict[str, dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for path in adapter.layers:
        place = place_of(path, networks=names_networks(adapter.naming))
        numbers = _NUMBERS.findall(place.block)
        if len(numbers) == 1:
            stack = _NUMBERS.sub("N", place.block)
            pattern = path.replace(place.block, stack, 1)
            stacks[place.network + stack][pattern].add(int(numbers[0]))
    for targets in stacks.values():
        present = set().union(*targets.values())
        for pattern, found in sorted(targets.items(), key=lambda item: natural_key(item[0])):
            if missing := sorted(present - found):
                yield Note(_gap(len(found), missing), subject=pattern)


def _gap(count: int, missing: list[int]) -> str:
    shown = ", ".join(str(number) for number in missing[:_SHOWN])
    more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
    return f"adapted in {counted(count, 'layer')}, but not in: {shown}{more}"
