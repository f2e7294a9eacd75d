"""``loratools formats``."""

from __future__ import annotations

import click

from loratools._cli.options import examples, output_options
from loratools._cli.output import Output
from loratools.formats import FORMATS
from loratools.report import Report


@click.command(
    "formats",
    epilog=examples("loratools formats", "loratools formats --json | jq '.items[].format'"),
)
@output_options
def command(out: Output) -> None:
    """List the adapter formats that loratools reads and writes."""
    items = tuple({"format": row.name, "title": row.title} for row in FORMATS)
    out.listing(Report("formats", facts={"formats": len(items)}, items=items))
