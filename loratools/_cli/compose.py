"""``loratools compose``."""

from __future__ import annotations

from typing import Any

import click

from loratools._cli.options import (
    ADAPTER_OUTPUT,
    ARCH,
    DRY_RUN,
    DTYPE,
    FORMAT_NAME,
    METHOD_NAME,
    OVERWRITE,
    PATH,
    Strengths,
    adapters_argument,
    examples,
    output_options,
)
from loratools._cli.output import Output
from loratools._cli.startup import import_torch


@click.command(
    "compose",
    epilog=examples(
        "loratools compose style:0.7 task:-0.3 -o both --rank 16",
        "loratools compose style task -o both --method core-ties --density 0.3",
    ),
)
@adapters_argument(required=True, word="WEIGHT")
@ADAPTER_OUTPUT
@click.option(
    "--method",
    type=METHOD_NAME,
    default="linear",
    show_default=True,
    metavar="M",
    help="How; see `methods`.",
)
@click.option("--rank", type=int, metavar="N", help="Largest rank; without it the exact result.")
@click.option(
    "--density", type=float, metavar="F", help="Share of elements that pruning methods keep."
)
@click.option(
    "--seed", type=int, default=0, show_default=True, metavar="N", help="For DARE and DELLA."
)
@click.option(
    "--weights",
    multiple=True,
    metavar="PATTERN=W,W",
    help="Other weights, one for each ADAPTER, where the pattern fits.",
)
@click.option(
    "--to",
    type=FORMAT_NAME,
    metavar="FORMAT",
    help="Format of OUT; that of the first ADAPTER if not said.",
)
@DTYPE
@ARCH
@click.option(
    "--base", type=PATH, metavar="BASE", help="The base model, for replaced tensors (see docs)."
)
@OVERWRITE
@DRY_RUN
@output_options
def command(adapters: Strengths, output: str, out: Output, **options: Any) -> None:
    """Combine ADAPTERs into one adapter.

    Each ADAPTER, of any format, may carry a weight after its last colon. The default method is the
    exact sum of the changes, weighted. PATTERN is a regular expression, searched for in the names
    of modules.
    """
    import_torch()
    from loratools.compose import compose_adapters

    out.report(compose_adapters(list(adapters), output, **options))
