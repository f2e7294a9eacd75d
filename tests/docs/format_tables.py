"""The table of formats and operations, from the rows of ``FORMATS``.

Which fact of a row decides an operation is said here once; tests/contracts tries every cell.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from loratools.formats import FORMATS, FormatRow

from .regions import prose, table

OPERATIONS: Mapping[str, Callable[[FormatRow], bool]] = {
    "`inspect`, `diff`": lambda row: True,
    "`merge`, `unmerge`": lambda row: True,
    "`convert`, `compose` from": lambda row: True,
    "`convert`, `compose` to": lambda row: row.writes,
    "`resize`, `rebase`": lambda row: row.writes,
    "`extract` to": lambda row: row.extracts,
}
"""Column → whether the format takes part; what is read at all can be read by every command."""


def formats_table(_: str) -> str:
    """Return the Markdown table of all formats."""
    head = ("format", "whose files", "models", *OPERATIONS, "file for `push`, `pull`")
    rows = [
        (
            f"`{row.name}`",
            prose(row.title),
            ", ".join(row.models),
            *("yes" if works(row) else "no" for works in OPERATIONS.values()),
            f"`{row.file}`",
        )
        for row in FORMATS
    ]
    return table(head, rows)
