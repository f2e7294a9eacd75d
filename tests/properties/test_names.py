"""NameIndex: the tensor that a name means, under any prefix, and never another module's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from loratools.keymaps.names import NameIndex
from loratools.keymaps.transformers_rows import PREFIXES
from tests.strategies import module_paths

# Prefixes that no row knows, so that only the rules on endings act.
prefixes = st.sampled_from(("net.", "wrapped.core.", "a.b.c.", "student."))
leaves = st.sampled_from(("weight", "bias"))
names = st.builds(lambda path, leaf: f"{path}.{leaf}", module_paths, leaves)
vocabularies = st.lists(names, min_size=1, max_size=12, unique=True)
# Short names over few letters are suffixes of each other again and again.
few = st.sampled_from(("a", "b", "1", "q"))
tangled = st.lists(few, min_size=1, max_size=5).map(lambda parts: ".".join([*parts, "weight"]))


def endings_with(vocabulary: list[str], name: str) -> list[str]:
    """Return the longer names whose last components are all of ``name``'s."""
    parts = name.split(".")
    return sorted(
        other
        for other in vocabulary
        if len(other.split(".")) > len(parts) and other.split(".")[-len(parts) :] == parts
    )


def longest_tail(vocabulary: list[str], name: str) -> list[str]:
    """Return the vocabulary's longest proper tail of ``name`` with at least two components."""
    parts = name.split(".")
    tails = [".".join(parts[start:]) for start in range(1, len(parts) - 1)]
    return next(([tail] for tail in tails if tail in vocabulary), [])


@given(vocabularies)
def test_as_it_is(vocabulary: list[str]) -> None:
    index = NameIndex(vocabulary)
    assert all(index.find(name) == [name] for name in vocabulary)


@given(vocabularies, prefixes)
def test_prefix_missing(vocabulary: list[str], prefix: str) -> None:
    """The checkpoint has a prefix that the adapter lacks."""
    index = NameIndex(prefix + name for name in vocabulary)
    assert all(index.find(name) == [prefix + name] for name in vocabulary)


@given(vocabularies, prefixes)
def test_prefix_too_many(vocabulary: list[str], prefix: str) -> None:
    """The adapter has a prefix that the checkpoint lacks."""
    index = NameIndex(vocabulary)
    assert all(index.find(prefix + name) == [name] for name in vocabulary)


@given(vocabularies, st.lists(prefixes, min_size=2, max_size=3, unique=True), st.data())
def test_ambiguous(vocabulary: list[str], several: list[str], data: st.DataObject) -> None:
    """Two towers with the same inner names: all of them are told, and none is chosen."""
    towers = [prefix + name for prefix in several for name in vocabulary]
    name = data.draw(st.sampled_from(vocabulary))
    assert NameIndex(towers).find(name) == sorted(prefix + name for prefix in several)


@given(
    # A parameter of the model itself has no module in its name; it is nobody's tail.
    st.lists(tangled | st.just("weight"), min_size=1, max_size=10, unique=True),
    st.lists(tangled, min_size=1, max_size=10),
)
def test_against_the_rules(vocabulary: list[str], asked: list[str]) -> None:
    """Exact, else all longer names with this ending, else the longest tail; nothing else."""
    index = NameIndex(vocabulary)
    for name in asked:
        expected = [name] if name in vocabulary else endings_with(vocabulary, name)
        assert index.find(name) == (expected or longest_tail(vocabulary, name))


@given(vocabularies, names)
def test_found_names_share_their_ending(vocabulary: list[str], name: str) -> None:
    """No row and no rule leads from one module's leaf to another's."""
    for found in NameIndex(vocabulary).find(name):
        assert found in vocabulary
        assert found.split(".")[-2:] == name.split(".")[-2:]


@given(st.sampled_from(PREFIXES), st.booleans(), names)
def test_rows_lead_both_ways(row: tuple[str, str], back: bool, name: str) -> None:
    asked, stored = (row[1], row[0]) if back else row
    index = NameIndex([stored + name])
    # Another row may fit the same prefix, but only this tensor is there.
    assert index.find(asked + name) == [stored + name]


def test_stacks_of_experts_are_never_guessed() -> None:
    """Two towers with experts: without a tower's name neither is taken."""
    inner = "layers.0.mlp.experts.0.gate_proj.weight", "layers.0.mlp.experts.0.up_proj.weight"
    index = NameIndex(f"{tower}.{tensor}" for tower in ("one", "two") for tensor in inner)
    assert index.find_experts("layers.0.mlp.experts.gate_up_proj", 1) == []
    both = index.find_experts("one.layers.0.mlp.experts.gate_up_proj", 1)
    assert both == [[f"one.{tensor}" for tensor in inner]]
