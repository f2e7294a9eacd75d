"""``loratools methods``."""

from __future__ import annotations

import click

from loratools._cli.options import examples, output_options
from loratools._cli.output import Output
from loratools.merge_methods import METHODS
from loratools.report import Json, Report


@click.command(
    "methods",
    epilog=examples("loratools methods", "loratools methods --json | jq '.items[].method'"),
)
@output_options
def command(out: Output) -> None:
    """List the ways in which `compose` combines adapters, each with its paper."""
    items: list[dict[str, Json]] = [
        {
            "method": row.name,
            "space": row.space,
            "density": row.density,
            "rank": "needed" if row.needs_rank else None,
            "title": row.title,
            "paper": row.paper,
        }
        for row in METHODS
    ]
    out.listing(Report("methods", facts={"methods": len(items)}, items=tuple(items)))
