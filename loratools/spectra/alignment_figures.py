"""The figures of an alignment, for a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from loratools.report import Json, Note, Report
from loratools.spectra.alignment import LEADING_ENERGY, Alignment, PairAlignment
from loratools.suggest import counted

RULE = (
    "cosine: of all changes, a module that one adapter lacks being a zero change. overlap: mean "
    "squared cosine of the principal angles between the leading k singular directions, k the "
    f"least that holds {LEADING_ENERGY:.0%} of the energy of one of the two; mean over the shared "
    "modules. chance: what random directions would have"
)

Number = Callable[[int, int], Json]


def describe_alignment(alignment: Alignment, names: Sequence[str]) -> Report:
    """Return the report: matrices over the adapters, and a row for each pair and shared module."""
    count = len(names)
    facts: dict[str, Json] = {
        "what": "alignment",
        "compared": list(names),
        "rule": RULE,
        "modules_shared": _matrix(
            count, lambda i, j: len(alignment.between(i, j)), list(alignment.modules)
        ),
        "cosine": _matrix(count, alignment.cosine, [1.0] * count),
        **{
            name: _matrix(count, _mean_of(alignment, name), [1.0] * count)
            for name in ("overlap_out", "overlap_in")
        },
        **{
            name: _matrix(count, _mean_of(alignment, name), [None] * count)
            for name in ("chance_out", "chance_in")
        },
        "delta_norms": list(alignment.norms),
    }
    items = tuple(_row(pair, names) for pair in alignment.pairs)
    return Report("inspect", tuple(names), None, facts, items, tuple(_notes(alignment)))


def _mean_of(alignment: Alignment, name: str) -> Number:
    def number(pair: PairAlignment) -> float | None:
        value: float | None = getattr(pair, name)
        return value

    return lambda i, j: alignment.mean(i, j, number)


def _matrix(count: int, entry: Number, diagonal: Sequence[Json]) -> list[list[Json]]:
    return [[diagonal[i] if i == j else entry(i, j) for j in range(count)] for i in range(count)]


def _row(pair: PairAlignment, names: Sequence[str]) -> dict[str, Json]:
    return {**asdict(pair), "first": names[pair.first], "second": names[pair.second]}


def _notes(alignment: Alignment) -> list[Note]:
    reasons: dict[str, list[str]] = {}
    for path, why in alignment.uncovered.items():
        reasons.setdefault(why, []).append(path)
    return [
        Note(f"not compared, because {why}", "warning", _some(paths))
        for why, paths in reasons.items()
    ]


def _some(paths: Sequence[str]) -> str:
    if len(paths) == 1:
        return paths[0]
    return f"{paths[0]} and {counted(len(paths) - 1, 'other module')}"
