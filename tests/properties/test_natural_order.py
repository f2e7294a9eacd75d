"""Natural order: numbers inside names count as numbers."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from loratools.adapter import in_natural_order, natural_key
from loratools.deltas import LoRA
from tests.strategies import make_tensor, module_paths

LORA = LoRA(make_tensor(1, 1, 1), make_tensor(2, 1, 1), 1.0)
# Any text at all: names come from files.
names = st.one_of(module_paths, st.text(max_size=8), st.text(alphabet="a.01²٣", max_size=6))


def chunks(name: str) -> list[str | int]:
    """Split into runs of decimal digits, as numbers, and the characters between them."""
    result: list[str | int] = []
    run = ""
    for character in [*name, ""]:
        if character.isdecimal():
            run += character
            continue
        if run:
            result.append(int(run))
        run = ""
        result.append(character)
    return result[:-1] if result[-1:] == [""] else result


@given(first=module_paths, second=module_paths)
def test_numbers_decide_where_names_first_differ(first: str, second: str) -> None:
    """Independent rule: at the first difference, numbers go by size."""
    ours, theirs = chunks(first), chunks(second)
    for one, other in zip(ours, theirs, strict=False):
        if one != other:
            if type(one) is type(other):
                assert (natural_key(first) < natural_key(second)) == (one < other)
            return
    assert (first == second) == (natural_key(first) == natural_key(second))


@given(st.lists(names, unique=True))
def test_any_names_can_be_ordered(found: list[str]) -> None:
    """A total order on whatever a file may call its tensors."""
    ordered = sorted(found, key=natural_key)
    assert all(natural_key(one) <= natural_key(other) for one, other in pairwise(ordered))


@given(st.lists(module_paths, unique=True).flatmap(st.permutations))
def test_order_does_not_depend_on_the_input(paths: list[str]) -> None:
    ordered = in_natural_order(dict.fromkeys(paths, LORA))
    assert list(ordered) == list(in_natural_order(dict.fromkeys(sorted(paths), LORA)))
    assert set(ordered) == set(paths)


def test_layers() -> None:
    numbers = [100, 2, 10, 0, 1, 11]
    layers = {f"model.layers.{n}.mlp": LORA for n in numbers}
    assert list(in_natural_order(layers)) == [f"model.layers.{n}.mlp" for n in sorted(numbers)]
