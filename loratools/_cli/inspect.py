"""``loratools inspect``."""

from __future__ import annotations

import click

from loratools._cli.options import PATH, examples, output_options
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "inspect",
    epilog=examples(
        "loratools inspect my-adapter -v",
        "loratools inspect my-adapter --base llama-3-8b --json",
    ),
)
@click.argument("path", type=PATH)
@click.option("--base", type=PATH, metavar="BASE", help="The adapter's base, to state its share.")
@output_options
def command(path: str, base: str | None, out: Output) -> None:
    """Say what is in PATH: an adapter (format, ranks, targets, oddities) or a base model."""
    import_torch()
    from loratools.summary import summarize

    out.report(summarize(path, base=base))
