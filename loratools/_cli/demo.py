"""``loratools demo``."""

from __future__ import annotations

import click

from loratools._cli.options import OUT, OVERWRITE, examples, output_options
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "demo", epilog=examples("loratools demo", "loratools demo -o demo-files --overwrite")
)
@click.option(
    "-o",
    "--output",
    type=OUT,
    metavar="OUT",
    help="Keep base, adapter and merged in this folder; otherwise they are temporary.",
)
@OVERWRITE
@output_options
def command(output: str | None, overwrite: bool, out: Output) -> None:
    """Make a small base and adapter, merge them, and prove merged == base + adapter.

    The proof is a forward pass in plain code that knows nothing of the merge.
    """
    import_torch()
    from loratools.demo import run_demo

    out.report(run_demo(output, overwrite=overwrite))
