"""Spectra and alignments as lines of text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from textwrap import wrap

from loratools.report import Json, Report
from loratools.suggest import counted

_SHOWN = 24
_LINE = 90


def _spectrum_lines(facts: Json) -> list[str]:
    """Return the summary of a spectrum and a table of its kinds of modules."""
    parts = facts["covered_in_part"].items()
    lines = [_covered(facts), *(f"{part}: {counted(count, 'layer')}" for part, count in parts)]
    if not facts["by_layer"]:
        return lines
    for share, ranks in facts["suggested_ranks"].items():
        lines.append(
            f"{float(share):.0%} of the energy at rank {ranks['all_layers']} in all layers alike, "
            f"or {_spread(ranks['by_layer'])} layer by layer"
        )
    if any(" / " in line for line in lines):
        lines.append("(of several layers: the least / the median / the most)")
    energies = (f"{rank}: {share:.0%}" for rank, share in facts["energy_at_rank"].items())
    lines.append(f"energy at rank  {'  '.join(energies)}")
    rows = [_module_cells(row) for row in facts["by_module"][:_SHOWN]]
    left = len(facts["by_module"]) - len(rows)
    return [*lines, *_table_lines(rows), *([f"... {left} more with --json"] if left else [])]


def _covered(facts: Json) -> str:
    reasons: dict[str, int] = {}
    for why in facts["not_covered"].values():
        reasons[why] = reasons.get(why, 0) + 1
    words = [counted(len(facts["by_layer"]), "layer")]
    words += [f"not {counted(count, 'other')}: {why}" for why, count in reasons.items()]
    return "; ".join(words)


def _module_cells(row: Mapping[str, Json]) -> dict[str, str]:
    return {
        "module": " ".join(filter(None, (row["network"], row["module"]))),
        "layers": str(row["layers"]),
        "norm": f"{row['norm']:.4g}",
        "energy": f"{row['share_of_energy']:.1%}",
        "effective rank": _spread(row["effective_rank"]),
        "stable rank": _spread(row["stable_rank"]),
        **{
            f"rank for {float(share):.0%}": _spread(ranks)
            for share, ranks in row["suggested_ranks"].items()
        },
    }


def _spread(numbers: Mapping[str, Json]) -> str:
    """Return least, middle and greatest number, or the one that they all are."""
    words = [
        f"{value:.1f}" if isinstance(value, float) else str(value) for value in numbers.values()
    ]
    return words[0] if len(set(words)) == 1 else " / ".join(words)


def rows_of(report: Report) -> Sequence[Mapping[str, Json]]:
    """Return the rows that -v shows: of the spectrum, if there is one."""
    spectrum = report.facts.get("spectrum")
    if spectrum is not None and spectrum["by_layer"]:
        return _layer_rows(spectrum)
    return report.items


def _layer_rows(facts: Json) -> list[dict[str, Json]]:
    """Return the rows of the table of layers, without the singular values themselves."""
    return [
        {
            **{name: row[name] for name in ("module", "kind", "shape", "norm")},
            "energy": f"{row['share_of_energy']:.2%}",
            "effective_rank": f"{row['effective_rank']:.1f}",
            "stable_rank": f"{row['stable_rank']:.1f}",
            **{
                f"rank_for_{float(share):.0%}": rank
                for share, rank in row["suggested_ranks"].items()
            },
        }
        for row in facts["by_layer"]
    ]


def _table_lines(rows: Sequence[Mapping[str, str]]) -> list[str]:
    """Return a heading and a line for each row, in columns."""
    names = list(rows[0])
    cells = [names, *([row[name] for name in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in cells
    ]


def _matrix_lines(matrix: Sequence[Sequence[Json]]) -> list[str]:
    """Return a table of adapters by adapters, which have their numbers."""
    return _table_lines(
        [
            {"": str(n), **{str(m): _entry(value) for m, value in enumerate(row, 1)}}
            for n, row in enumerate(matrix, 1)
        ]
    )


def _entry(value: Json) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.4f}"


def _numbered(names: Sequence[str]) -> list[str]:
    return [f"{number} {name}" for number, name in enumerate(names, 1)]


def _norms(norms: Sequence[float]) -> list[str]:
    return ["  ".join(f"{number}: {norm:.4g}" for number, norm in enumerate(norms, 1))]


def _paragraph(text: str) -> list[str]:
    return wrap(text, _LINE)


PRESENTERS: Mapping[str, Callable[[Json], list[str]]] = {
    "spectrum": _spectrum_lines,
    "compared": _numbered,
    "rule": _paragraph,
    "delta_norms": _norms,
    **dict.fromkeys(
        (
            "modules_shared",
            "cosine",
            "overlap_out",
            "overlap_in",
            "chance_out",
            "chance_in",
        ),
        _matrix_lines,
    ),
}
"""Fact → its lines."""
