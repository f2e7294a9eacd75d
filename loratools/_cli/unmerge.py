"""``loratools unmerge``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    ARCH,
    DEVICE,
    DRY_RUN,
    OVERWRITE,
    PATH,
    Strengths,
    adapters_argument,
    examples,
    output_option,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "unmerge",
    epilog=examples(
        "loratools unmerge merged my-adapter:0.7 -o original --base llama-3-8b",
        "loratools unmerge merged my-adapter:0.7 -o nearly-original",
    ),
)
@click.argument("merged", type=PATH)
@adapters_argument(required=False)
@output_option("What to write: a folder if MERGED is one, else a file like it.")
@click.option(
    "--base",
    type=PATH,
    metavar="BASE",
    help="The model that the adapters were merged into: restores exactly.",
)
@DEVICE
@ARCH
@OVERWRITE
@DRY_RUN
@output_options
def command(merged: str, adapters: Strengths, out: Output, **options: Any) -> None:
    """Take ADAPTERs out of MERGED again, with the strengths they were merged with.

    With --base the touched tensors are copied back, which is exact. Without it their change is
    subtracted, and the report says how far the result may be from the original.
    """
    import_torch()
    from loratools.merge import unmerge_from_base

    with out.progress("unmerging") as progress:
        report = unmerge_from_base(merged, list(adapters), progress=progress, **options)
    out.report(report)
