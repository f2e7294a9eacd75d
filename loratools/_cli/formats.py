"""``loratools formats``."""

from __future__ import annotations

import click

from loratools._cli.options import examples, output_options
from loratools._cli.output import Output
from loratools.formats import FORMATS
from loratools.report import Json, Report


@click.command(
    "formats",
    epilog=examples("loratools formats", "loratools formats --json | jq '.items[].format'"),
)
@output_options
def command(out: Output) -> None:
    """List the adapter formats: which are read and written, and what they hold."""
    items: list[dict[str, Json]] = [
        {
            "format": row.name,
            "read": True,
            "write": row.writes,
            "title": row.title,
            "models": list(row.models),
            "file": row.file,
            "kinds": list(row.kinds),
        }
        for row in FORMATS
    ]
    facts = {"formats": len(items), "written": sum(row.writes for row in FORMATS)}
    out.listing(Report("formats", facts=facts, items=tuple(items)))
