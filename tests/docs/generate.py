"""Makes the regions of the pages that come from the code; ``make pages`` runs it.

``python -m tests.docs.generate`` writes them, with ``--check`` it only says which are stale.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from .api_entries import api_entries, error_tree, type_table
from .format_tables import formats_table
from .option_tables import options_table
from .regions import Maker, made_again

ROOT = Path(__file__).parents[2]
MAKERS: Mapping[str, Maker] = {
    "api": api_entries,
    "errors": error_tree,
    "formats": formats_table,
    "options": options_table,
    "types": type_table,
}
"""Kind of region → what makes it."""


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def main(arguments: list[str]) -> int:
    """Write the regions, or with ``--check`` fail if one is stale."""
    stale = []
    for page in pages():
        text = page.read_text("utf-8")
        fresh = made_again(text, MAKERS)
        if fresh != text:
            stale.append(page.relative_to(ROOT).as_posix())
            if "--check" not in arguments:
                page.write_text(fresh, "utf-8")
    if stale:
        said = "stale:" if "--check" in arguments else "written:"
        sys.stdout.write(" ".join([said, *stale]) + "\n")
    return int(bool(stale) and "--check" in arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
